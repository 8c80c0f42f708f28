"""LEGO: a denoiser of bricks, each from a picture at full resolution to a picture at full resolution.

    u = [x_t, rows, columns]                                        rows and columns from -1 to 1
    e_1 = brick_1(u),   e_k = brick_k([e_{k-1}, u]),   prediction = e_K

A brick cuts its input into squares of `size` pixels, and is a small DiT on each square by itself: patches,
positions within the square, adaLN-Zero blocks, pixels again (`enrichment` of local features by the patches,
`orchestration` by attention among them). Small squares see little and cost little; the largest is the whole
picture. Growing squares are progressive growth (PG), shrinking ones progressive refinement (PR), and a U goes
down and up again.

Every brick is trained to predict the same, so that one may be left out: what it was given is passed on, and
the first is given x_t. Bricks of small squares may be left out at much noise, say the authors, and those of
the whole picture at little. Any picture that all squares tile can be drawn, also one larger than those of
training.

Source: Zheng et al., "Learning Stackable and Skippable LEGO Bricks for Efficient, Reconfigurable, and
Variable-Resolution Diffusion Modeling", ICLR 2024, arXiv:2310.06389, and its code (JegZheng/LEGODiffusion),
which settles the coordinates, the loss on every brick, and that no square is left out in training: `share`
is the paper's alone. In that code the label is a matrix and a bias; here it is a table of their sums, and
the modulation of a picture's squares, which is theirs in common, is computed once.
"""

import dataclasses
from typing import Any, ClassVar

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from effjax.config import part
from effjax.errors import UsageError
from effjax.layers.dense import Dense, zeros
from effjax.layers.modulation import Modulation, modulate
from effjax.layers.norms import norm
from effjax.layers.patches import PatchEmbed, check_divides, sincos_table, unpatch
from effjax.layers.stack import Stack
from effjax.mixers.apart import Apart
from effjax.mixers.context import Context
from effjax.models.blocks import denoising
from effjax.models.blocks.adaln import Layer
from effjax.models.dit import Condition

# What bricks predicted on the way, and where, for the loss: see `effjax.train.tasks.diffusion`.
PREDICTIONS = "predictions"


@dataclasses.dataclass(frozen=True)
class Brick:
    """One brick of a denoiser.

    Attributes:
      size: side of its squares in pixels.
      patch: side of a patch in pixels.
      depth: number of blocks.
      share: of its squares those that a training step computes, drawn for each picture; the others pass on.
      runs: whether it does outside of training; or from which time to which, both included, 0 to 1000.
    """

    size: int
    patch: int
    depth: int
    share: float = 1.0
    runs: bool | tuple[float, float] = True

    def __post_init__(self) -> None:
        if self.patch < 1 or self.size % self.patch:
            raise UsageError(f"size={self.size} of a brick must be a multiple of its patch={self.patch}.")
        if not 0 < self.share <= 1:
            raise UsageError(f"share={self.share:g} of the squares must be above 0 and at most 1.")
        if not isinstance(self.runs, bool) and not self.runs[0] <= self.runs[1]:
            raise UsageError(f"runs={self.runs}: a brick runs from a time to one that is not before it.")

    def at(self, t: float) -> bool:
        """Whether it runs at a time."""
        return self.runs if isinstance(self.runs, bool) else self.runs[0] <= t <= self.runs[1]

    def squares(self, height: int, width: int) -> int:
        """How many tile a picture."""
        check_divides(height, width, self.size)
        return (height // self.size) * (width // self.size)


class BrickNetwork(nn.Module):
    """What is inside a brick: a DiT without a condition of its own, on squares.

    Attributes:
      patch, dim, depth, block: of the DiT.
      remat, unroll: of its stack.
    """

    patch: int
    dim: int
    depth: int
    block: nn.Module
    remat: str = "none"
    unroll: int = 1

    @nn.compact
    def __call__(
        self, squares: Float[Array, "b l r r i"], c: Float[Array, "b c"], out: int, train: bool = False
    ) -> Float[Array, "b l r r {out}"]:
        """Maps `l` squares of each picture, which share a condition, each by itself."""
        batch, count, side = squares.shape[:3]
        x = PatchEmbed(self.patch, self.dim, name="embed")(squares.reshape(-1, *squares.shape[2:]))
        grid = x.shape[1], x.shape[2]
        table = jnp.asarray(sincos_table(grid, self.dim), x.dtype)  # [n, C]
        x = x.reshape(batch, count, -1, self.dim) + table[None, None]  # [B, L, n, C]
        x = x.reshape(batch, -1, self.dim)  # [B, L n, C]
        x = nn.with_logical_constraint(x, ("batch", "length", "features"))
        block = self.block.clone(mixer=Apart(self.block.mixer, len(table)), parent=None)
        stack = Stack(block, self.depth, remat=self.remat, unroll=self.unroll, name="blocks")
        x, _ = stack(x, c, Context(), each=Layer(), train=train)  # [B, L n, C]
        shift, scale = Modulation(2, self.dim, name="modulation")(c)  # 2 x [B, C]
        x = modulate(norm("layer_plain", self.block.epsilon, "norm")(x), shift, scale)
        project = Dense(self.patch**2 * out, ("embed", None), kernel_init=zeros, name="output")
        x = project(x).reshape(batch * count, len(table), -1)  # [B L, n, p p out]
        return unpatch(x, grid, self.patch).reshape(batch, count, side, side, out)


class Lego(nn.Module):
    """Predicts noise, clean picture or velocity by bricks from a noisy picture, its time and its class.

    Attributes:
      dim: channels of a token, in all bricks.
      bricks: in the order in which they run.
      classes: number of labels; the label `classes` means "no label" where there is a null class.
      block: what every brick repeats.
      joint: whether all bricks are trained to predict, or the last alone; only with the first may one be
        left out.
      null_class: whether the label table has a row for "no label".
      frequencies: sines and cosines in the time embedding.
      remat: rematerialisation policy, a name in `effjax.layers.stack.REMAT`.
      unroll: layers a scan iteration.
    """

    dim: int
    bricks: tuple[Brick, ...]
    classes: int
    block: nn.Module = part(denoising.KINDS)
    joint: bool = True
    null_class: bool = True
    frequencies: int = 256
    remat: str = "none"
    unroll: int = 1

    learned_sigma: ClassVar[bool] = False

    def setup(self) -> None:
        """Names the condition and the bricks, `bricks_0`, `bricks_1`, ..."""
        if not self.bricks:
            raise UsageError(
                "a LEGO needs at least one brick: bricks=(dict(size=..., patch=..., depth=...),)."
            )
        if hasattr(self.block, "router"):
            raise UsageError(f"{type(self.block).__name__} is routed by a DiT, and bricks have no router.")
        self.conditioned = Condition(self.classes + self.null_class, self.dim, self.frequencies, False)
        nn.share_scope(self, self.conditioned)
        self.networks = [
            BrickNetwork(
                brick.patch,
                self.dim,
                brick.depth,
                self.block,
                self.remat,
                self.unroll,
                name=f"bricks_{number}",
            )
            for number, brick in enumerate(self.bricks)
        ]

    def __call__(
        self,
        x_t: Float[Array, "b height width channels"],
        t: Float[Array, " b"],
        label: Int[Array, " b"],
        train: bool = False,
    ) -> Float[Array, "b height width channels"]:
        """Returns the last brick's prediction; in training sows what each of them predicted, and where.

        Args:
          x_t: noisy pictures, both sides a multiple of every brick's squares.
          t: times in the unit of training steps, 0 to 1000.
          label: classes, already dropped to the null class where training drops them.
          train: runs all bricks, on as many squares as each has a share of where there is a key to draw them.

        Raises:
          UsageError: where squares do not tile the picture.
        """
        c, _ = self.conditioned(t, label, x_t.dtype)  # [B, C]
        seen = jnp.concatenate([x_t, _coordinates(x_t)], axis=-1)  # [B, H, W, C + 2]
        estimate = x_t  # [B, H, W, C]
        always = train or self.is_initializing()
        for number, brick in enumerate(self.bricks):
            brick.squares(*x_t.shape[1:3])
            if always:
                estimate, where = self._trained(number, estimate, seen, c, train)
                if self.joint or number == len(self.bricks) - 1:
                    self._told(estimate, where, train)
            elif brick.runs is True:
                estimate = self.brick(number, estimate, seen, c)
            elif brick.runs is not False:
                estimate = self._sometimes(number, estimate, seen, c, t)
        return estimate

    def null(self, label: Int[Array, " b"]) -> Int[Array, " b"]:
        """The label that means "no label", for each example."""
        return jnp.full_like(label, self.classes)

    @nn.nowrap
    def brick(
        self,
        number: int,
        estimate: Float[Array, "b height width channels"],
        seen: Float[Array, "b height width more"],
        c: Float[Array, "b c"],
        train: bool = False,
    ) -> Float[Array, "b height width channels"]:
        """What one brick makes of an estimate and of what is seen of the picture."""
        squares = cut(self._given(number, estimate, seen), self.bricks[number].size)  # [B, L, r, r, I]
        made = self.networks[number](squares, c, estimate.shape[-1], train=train)  # [B, L, r, r, C]
        return laid(made, estimate.shape[1], estimate.shape[2])

    @nn.nowrap
    def _given(self, number: int, estimate: Array, seen: Array) -> Array:
        """The first brick is given no estimate, there being none."""
        return seen if number == 0 else jnp.concatenate([estimate, seen], axis=-1)

    @nn.nowrap
    def _sometimes(self, number: int, estimate: Array, seen: Array, c: Array, t: Array) -> Array:
        """Runs a brick where the time of any picture asks for it, and keeps it for those that do."""
        least, greatest = self.bricks[number].runs  # type: ignore[misc]
        here = (least <= t) & (t <= greatest)  # [B]
        made = nn.cond(
            jnp.any(here),
            lambda lego, estimate, seen, c: lego.brick(number, estimate, seen, c),
            lambda lego, estimate, seen, c: estimate,
            self,
            estimate,
            seen,
            c,
        )
        return jnp.where(here[:, None, None, None], made, estimate)

    @nn.nowrap
    def _trained(
        self, number: int, estimate: Array, seen: Array, c: Array, train: bool
    ) -> tuple[Array, Bool[Array, "b height width 1"] | None]:
        """What a training step makes of a brick, and where, None meaning everywhere."""
        brick, (batch, height, width, channels) = self.bricks[number], estimate.shape
        count = brick.squares(height, width)
        kept = max(1, round(brick.share * count))
        if kept == count or not self.has_rng("dropout"):
            return self.brick(number, estimate, seen, c, train), None
        keys = jax.random.split(self.make_rng("dropout"), batch)
        index = jax.vmap(lambda key: jax.random.permutation(key, count)[:kept])(keys)  # [B, kept]
        squares = cut(self._given(number, estimate, seen), brick.size)  # [B, L, r, r, I]
        chosen = jnp.take_along_axis(squares, index[:, :, None, None, None], axis=1)
        made = self.networks[number](chosen, c, channels, train=train)  # [B, kept, r, r, C]
        rows = jnp.arange(batch)[:, None]
        whole = laid(cut(estimate, brick.size).at[rows, index].set(made), height, width)
        flags = jnp.zeros((batch, count), bool).at[rows, index].set(True)  # [B, L]
        flags = jnp.broadcast_to(flags[:, :, None, None, None], (batch, count, brick.size, brick.size, 1))
        return whole, laid(flags, height, width)

    @nn.nowrap
    def _told(self, estimate: Array, where: Any, train: bool) -> None:
        """Tells the task of a prediction that counts, where it asks."""
        if train and self.is_mutable_collection(PREDICTIONS) and not self.is_initializing():
            where = jnp.ones((*estimate.shape[:3], 1), bool) if where is None else where
            self.sow(PREDICTIONS, "bricks", (estimate, where))


def cut(x: Float[Array, "b height width c"], size: int) -> Float[Array, "b l {size} {size} c"]:
    """The squares of a picture, row by row."""
    return einops.rearrange(x, "b (h r) (w s) c -> b (h w) r s c", r=size, s=size)


def laid(squares: Array, height: int, width: int) -> Array:
    """The picture that squares `[B, L, r, r, C]` tile: the inverse of `cut`."""
    size = squares.shape[2]
    tile = "b (h w) r s c -> b (h r) (w s) c"
    return einops.rearrange(squares, tile, h=height // size, w=width // size)


def _coordinates(x: Float[Array, "b height width c"]) -> Float[Array, "b height width 2"]:
    """Row and column of each pixel, from -1 to 1 over the picture whatever its size."""
    axes = [np.linspace(-1.0, 1.0, side, dtype=np.float32) for side in x.shape[1:3]]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)  # [H, W, 2]
    return jnp.broadcast_to(jnp.asarray(grid, x.dtype)[None], (*x.shape[:3], 2))
