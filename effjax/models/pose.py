"""Video pose transformer: 2-D joints of a clip in, 3-D joints of every frame out.

    z = joints W + b + positions_joint                                          [F, J, C]
    z <- norm_s(Block_s(z)) over the joints of each frame
    z <- norm_t(Block_t(z)) over the frames of each joint, depth times; before the first + positions_frame
    pose = head(norm(z))                                                        [F, J, 3]

The two norms are the same at every depth: Zhang et al., "MixSTE: Seq2seq Mixed Spatio-Temporal Encoder for 3D
Human Pose Estimation in Video", CVPR 2022.

An hourglass keeps some frames after the first layers and makes all anew at the end:

    places = density peaks of the mean over the joints, in order,   z <- z[places] + positions_kept
    z_t <- q_t + W_o softmax((q_t W_q) (z W_k)^T / sqrt(d)) z W_v   for each joint, q learned, from zero

Li et al., "Hourglass Tokenizer for Efficient Transformer-Based 3D Human Pose Estimation", CVPR 2024. Queries
are the same for every example and joint, and are projected once.
"""

import dataclasses
from typing import Literal

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.errors import UsageError
from effjax.layers.dense import Dense, named, zeros
from effjax.layers.drop import linear_rates
from effjax.layers.norms import norm, standardised
from effjax.layers.stack import Stack
from effjax.mixers.context import Context
from effjax.mixers.dot_product import softmax_attention
from effjax.models.blocks.metaformer import Block
from effjax.tokens.density_peaks import density_peaks
from effjax.tokens.tokens import rows


@dataclasses.dataclass(frozen=True)
class Hourglass:
    """Few frames between the first layers and the head.

    Attributes:
      after: layers that see all frames.
      keep: frames that stay.
      select: which: density peaks, or every so many.
      neighbours: frames that the density of a frame is taken from, itself among them.
      recover: all frames by attention of learned queries, or on straight lines between those kept.
      heads: of this attention.
    """

    after: int
    keep: int
    select: Literal["density_peaks", "uniform"] = "density_peaks"
    neighbours: int = 2
    recover: Literal["attention", "linear"] = "attention"
    heads: int = 8


class PoseTransformer(nn.Module):
    """Lifts the joints of a clip to three dimensions.

    Attributes:
      space: the block over joints.
      time: the block over frames.
      frames: of a clip.
      joints: of a body.
      dim: channels of a token.
      depth: layers, each with a block of both kinds.
      coordinates: of a joint in the output.
      drop_path: stochastic depth of the last layer, growing linearly from 0.
      remat: rematerialisation policy, a name in `effjax.layers.stack.REMAT`.
      unroll: layers a scan iteration.
      hourglass: how frames are left out on their way; None keeps all.
    """

    space: Block
    time: Block
    frames: int
    joints: int
    dim: int
    depth: int
    coordinates: int = 3
    drop_path: float = 0.0
    remat: str = "none"
    unroll: int = 1
    hourglass: Hourglass | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < 2:
            raise UsageError(f"depth={self.depth}: there must be two layers or more.")
        waist = self.hourglass
        if waist is None:
            return
        if not 1 <= waist.after < self.depth:
            raise UsageError(f"hourglass.after={waist.after} is not between 1 and {self.depth - 1}.")
        if not 1 <= waist.keep <= self.frames:
            raise UsageError(f"hourglass.keep={waist.keep} is not between 1 and the {self.frames} frames.")

    @nn.compact
    def __call__(
        self, joints: Float[Array, "b f j inputs"], train: bool = False
    ) -> Float[Array, "b f j coordinates"]:
        """Returns the joints of every frame.

        Args:
          joints: as seen by the camera.
          train: switches dropout and stochastic depth on; then a `dropout` key must be given.

        Raises:
          UsageError: for a clip of another length, or a body of other joints.
        """
        if joints.shape[1:3] != (self.frames, self.joints):
            raise UsageError(
                f"clips must have {self.frames} frames of {self.joints} joints, not "
                f"{joints.shape[1]} of {joints.shape[2]}."
            )
        x = Dense(self.dim, (None, "embed"), name="embed")(joints)  # [B, F, J, C]
        x = x + self._positions("joint_positions", self.joints, x)[None, None]
        times = self._positions("frame_positions", self.frames, x)  # [F, C]
        shared = Shared(self.space.epsilon, *(Affine(name=f"{n}_norm")(self.dim) for n in ("space", "time")))

        rates = linear_rates(self.drop_path, self.depth)
        # Copies all the way down: a block that shares its mixer with another shares its parameters.
        copies = [block.copy(parent=None) for block in (self.space, self.time) * 2]
        first = SpaceTime(*copies[:2], name="first")
        x, _ = first(x, rates[0], shared, times, train=train)  # [B, F, J, C]
        layers = SpaceTime(*copies[2:])
        stack = Stack(layers, self.depth - 1, remat=self.remat, unroll=self.unroll, name="blocks")
        if self.hourglass is None:
            x, _ = stack(x, shared, each=rates[1:], train=train)  # [B, F, J, C]
        else:
            x = self._hourglass(self.hourglass, stack, x, shared, rates[1:], train)  # [B, F, J, C]

        x = norm("layer", 1e-5, "norm")(x)
        return Dense(self.coordinates, ("embed", None), name="head")(x)  # [B, F, J, 3]

    @nn.nowrap
    def _positions(self, name: str, count: int, x: Float[Array, "b f j c"]) -> Float[Array, "n c"]:
        table = self.param(name, named(zeros, ("length_table", "embed")), (count, self.dim), jnp.float32)
        return table.astype(x.dtype)

    @nn.nowrap
    def _hourglass(
        self,
        waist: Hourglass,
        stack: Stack,
        x: Float[Array, "b f j c"],
        shared: "Shared",
        rates: Float[Array, " layers"],
        train: bool,
    ) -> Float[Array, "b f j c"]:
        """Runs the layers behind the first, the last of them on the frames that stay, and makes all again."""
        table = self._positions("kept_positions", waist.keep, x)  # [K, C]
        places: list[Int[Array, "b k"]] = []

        def prune(x: Float[Array, "b f j c"], train: bool) -> Float[Array, "b k j c"]:
            places.append(kept_frames(waist, x))
            return rows(x, places[0]) + table[None, :, None]

        x, _ = stack(x, shared, each=rates, train=train, before={waist.after - 1: prune})  # [B, K, J, C]
        if not self.is_initializing():
            self.sow("tokens", "frames", places[0])
        if waist.recover == "linear":
            return interpolated(x, places[0], self.frames)
        return Recover(self.frames, waist.heads, name="recover")(x)


class SpaceTime(nn.Module):
    """A block over the joints of each frame, then one over the frames of each joint."""

    space: nn.Module
    time: nn.Module

    def __call__(
        self,
        x: Float[Array, "b f j c"],
        drop_rate: Float[Array, ""],
        shared: "Shared",
        times: Float[Array, "f c"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "b f j c"], None]:
        """Returns `(x, None)`; `times` are added between the two."""
        b, f, j, c = x.shape
        x, _ = self.space(x.reshape(b * f, j, c), drop_rate, Context(), train=train)  # [B F, J, C]
        x = shared.norm(x, shared.space).reshape(b, f, j, c).swapaxes(1, 2)  # [B, J, F, C]
        x = x if times is None else x + times[None, None]
        x, _ = self.time(x.reshape(b * j, f, c), drop_rate, Context(), train=train)  # [B J, F, C]
        return shared.norm(x, shared.time).reshape(b, j, f, c).swapaxes(1, 2), None  # [B, F, J, C]


@flax.struct.dataclass
class Shared:
    """The norms behind the blocks, which all layers share: scale and bias of each, `[C]`."""

    epsilon: float = flax.struct.field(pytree_node=False)
    space: tuple[Array, Array]
    time: tuple[Array, Array]

    def norm(self, x: Float[Array, "b n c"], affine: tuple[Array, Array]) -> Float[Array, "b n c"]:
        """The layer norm, computed in float32 or wider."""
        wide = jnp.promote_types(x.dtype, jnp.float32)
        scale, bias = (value.astype(wide)[None, None] for value in affine)
        return (standardised(x.astype(wide), 1, self.epsilon) * scale + bias).astype(x.dtype)


class Affine(nn.Module):
    """Scale and bias of a norm that stands in many places."""

    @nn.compact
    def __call__(self, width: int) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
        """Returns both."""
        ones = nn.initializers.ones_init()
        scale = self.param("scale", named(ones, ("norm",)), (width,), jnp.float32)
        return scale, self.param("bias", named(zeros, ("norm",)), (width,), jnp.float32)


class Recover(nn.Module):
    """All frames from few: learned queries that attend to those that were kept, joint by joint.

    Attributes:
      frames: to be made.
      heads: of attention.
    """

    frames: int
    heads: int

    @nn.compact
    def __call__(self, x: Float[Array, "b k j c"]) -> Float[Array, "b f j c"]:
        """Returns the frames."""
        b, kept, joints, c = x.shape
        if c % self.heads:
            raise UsageError(f"hourglass.heads={self.heads} does not divide the width {c}.")
        init = named(zeros, ("length_table", "embed"))
        queries = self.param("queries", init, (self.frames, c), jnp.float32).astype(x.dtype)[
            None
        ]  # [1, F, C]
        z = x.swapaxes(1, 2).reshape(b * joints, kept, c)  # [B J, K, C]
        head, axes = (self.heads, c // self.heads), ("embed", "heads", "head_dim")
        q = Dense(head, axes, name="query")(queries)  # [1, F, H, D]
        k, v = Dense(head, axes, name="key")(z), Dense(head, axes, name="value")(z)  # [B J, K, H, D]
        q = jnp.broadcast_to(q, (b * joints, *q.shape[1:]))
        y = softmax_attention(q, k, v, mask=None, causal=False)  # [B J, F, H, D]
        y = queries + Dense(c, ("heads", "head_dim", "embed"), inputs=2, name="output")(y)  # [B J, F, C]
        return y.reshape(b, joints, self.frames, c).swapaxes(1, 2)


def kept_frames(waist: Hourglass, x: Float[Array, "b f j c"]) -> Int[Array, "b k"]:
    """Places of the frames that stay, in their order."""
    if waist.select == "density_peaks":
        return density_peaks(jnp.mean(x, axis=2), waist.keep, waist.neighbours)
    even = jnp.round(jnp.linspace(0, x.shape[1] - 1, waist.keep)).astype(jnp.int32)
    return jnp.broadcast_to(even[None], (x.shape[0], waist.keep))


def interpolated(
    x: Float[Array, "b k j c"], places: Int[Array, "b k"], frames: int
) -> Float[Array, "b f j c"]:
    """All frames on straight lines between those at `places`; beyond the last ones copies."""
    at = jnp.arange(frames)[None]  # [1, F]
    passed = jnp.sum(places[:, None, :] <= at[:, :, None], axis=-1)  # [B, F]
    low = jnp.clip(passed - 1, 0, places.shape[1] - 1)
    high = jnp.clip(passed, 0, places.shape[1] - 1)
    start, end = rows(places, low), rows(places, high)  # [B, F]
    share = jnp.clip((at - start) / jnp.maximum(end - start, 1), 0.0, 1.0)[:, :, None, None]
    share = share.astype(x.dtype)
    return rows(x, low) * (1 - share) + rows(x, high) * share
