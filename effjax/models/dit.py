"""Diffusion transformer: a stack of blocks whose norms are steered by time and class.

    z = patches W + positions
    c = MLP(frequencies(t)) + table[label]
    z <- z + g_1 * mixer((1 + a_1) * norm(z) + b_1)            (b_1, a_1, g_1, b_2, a_2, g_2) = silu(c) W_c
    z <- z + g_2 * ffn((1 + a_2) * norm(z) + b_2)
    prediction = unpatch(((1 + a) * norm(z) + b) W_out)                     (b, a) = silu(c) W_f

`W_c`, `W_f` and `W_out` start at zero (adaLN-Zero): every block starts as the identity and the network as 0.

Source: Peebles and Xie, "Scalable Diffusion Models with Transformers", ICCV 2023, figure 3 and section 3.2.
The official code draws query, key and value as one Xavier matrix of three times the width; here they are
three matrices, whose Xavier bound is sqrt(2) larger.
"""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effjax import tokens
from effjax.config import part
from effjax.errors import UsageError
from effjax.layers.dense import Dense, named, zeros
from effjax.layers.modulation import Modulation, TimeEmbed, modulate
from effjax.layers.norms import norm
from effjax.layers.patches import PatchEmbed, add_positions, sincos_table, unpatch
from effjax.layers.stack import Stack
from effjax.mixers.context import Context
from effjax.models.blocks import denoising
from effjax.models.blocks.adaln import Layer
from effjax.models.blocks.several import members

_normal = nn.initializers.normal(0.02)


class Condition(nn.Module):
    """What a block is told: time plus class.

    Attributes:
      rows: of the label table.
      dim: channels.
      frequencies, inclusive: of the time embedding.
    """

    rows: int
    dim: int
    frequencies: int
    inclusive: bool

    def setup(self) -> None:
        """Names the two embeddings."""
        init = named(_normal, (None, "embed"))
        self.label_embed = nn.Embed(self.rows, self.dim, embedding_init=init)
        self.time_embed = TimeEmbed(self.dim, self.frequencies, self.inclusive)

    def __call__(
        self, t: Float[Array, " b"], label: Int[Array, " b"], dtype: jax.typing.DTypeLike
    ) -> tuple[Float[Array, "b c"], Float[Array, "b c"]]:
        """Embeds times and labels in `dtype`; returns their sum, and the times alone."""
        time = self.time_embed(t, dtype)  # [B, C]
        return time + self.label_embed(label).astype(time.dtype), time

    def time(self, t: Float[Array, " b"], dtype: jax.typing.DTypeLike) -> Float[Array, "b c"]:
        """Embeds times alone."""
        embedded: Array = self.time_embed(t, dtype)
        return embedded


@flax.struct.dataclass
class Stream:
    """What runs through the layers of a denoiser, between `begin`, `layers` and `finish`.

    Attributes:
      x: `[B, N, C]`, the tokens.
      c: `[B, C]`, the embedded condition that the last modulation reads, and the layers where `each` is None.
      each: `[depth, B, C]`, the condition of each layer, or None.
      route: what the time alone decides for each layer, or None.
      grid: rows and columns of tokens.
      channels: of the noisy picture.
    """

    x: Any
    c: Any
    each: Any
    route: Any
    grid: tuple[int, int] = flax.struct.field(pytree_node=False)
    channels: int = flax.struct.field(pytree_node=False)


class DiT(nn.Module):
    """Predicts noise, clean picture or velocity from a noisy picture, its time and its class.

    The network is `begin`, `layers` and `finish` one behind the other, which step caches call by themselves.

    Attributes:
      patch: side of a patch in pixels (of the latent, where there is one).
      dim: channels of a token.
      depth: how often the block is repeated; a cycle of blocks is one.
      classes: number of labels; the label `classes` means "no label" where there is a null class.
      block: what the stack repeats, with an `epsilon` that the last norm shares.
      null_class: whether the label table has a row for "no label", which classifier-free guidance needs.
      learned_sigma: whether the network also predicts variances, in as many channels again.
      frequencies: sines and cosines in the time embedding.
      remat: rematerialisation policy, a name in `effjax.layers.stack.REMAT`.
      unroll: layers a scan iteration.
      condition: whether all blocks share one embedding of time and class, or each has its own; the last
        modulation reads the first block's. diffusers stores it a block, in its published weights all alike.
      inclusive_frequencies: whether the last time frequency is the lowest itself, see `time_frequencies`.
      position_span: the grid that positions are stretched over; None counts patches, see `sincos_table`.
      reduce: how every mixer's tokens are merged before it and restored behind it, a kind in `effjax.tokens`
        that reads features alone; it has no part in the parameters.
    """

    patch: int
    dim: int
    depth: int
    classes: int
    block: nn.Module = part(denoising.KINDS)
    null_class: bool = True
    learned_sigma: bool = True
    frequencies: int = 256
    remat: str = "none"
    unroll: int = 1
    condition: Literal["shared", "per_block"] = "shared"
    inclusive_frequencies: bool = False
    position_span: int | None = None
    reduce: Any = part(tokens.METHODS, default=None)
    layer_blocks: tuple[nn.Module, ...] = part(denoising.LAYERS, default=())

    @property
    def branches(self) -> int:
        """Mixers and FFNs of one block."""
        return 2 * len(members(self.block))

    def setup(self) -> None:
        """Names the parts that stand in front of the last modulation."""
        self.embed = PatchEmbed(self.patch, self.dim)
        fields = (self.classes + self.null_class, self.dim, self.frequencies, self.inclusive_frequencies)
        if self.condition == "shared":
            self.conditioned = Condition(*fields)
            nn.share_scope(self, self.conditioned)  # its parameters stand beside the others
        else:
            own = nn.vmap(
                Condition,
                in_axes=None,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                axis_size=self.depth,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            self.conditions = own(*fields)
        block, blocks = self.block, self.layer_blocks
        if self.reduce is not None:
            block, *changed = (_reducing(each, self.reduce) for each in (block, *blocks))
            blocks = tuple(changed)
        self.blocks = Stack(block, self.depth, remat=self.remat, unroll=self.unroll, blocks=blocks)
        self.router = block.router(self.depth) if hasattr(block, "router") else None
        if self.router is not None and self.condition != "shared":
            raise UsageError(
                f"{type(block).__name__} is routed by one embedding of the time, and condition="
                f"{self.condition!r} has one a block: take condition='shared'."
            )

    def __call__(
        self,
        x_t: Float[Array, "b height width channels"],
        t: Float[Array, " b"],
        label: Int[Array, " b"],
        train: bool = False,
    ) -> Float[Array, "b height width out"]:
        """Returns the prediction: `channels` channels, then as many of the variance where it is learned.

        Args:
          x_t: noisy pictures; both sides must be multiples of the patch.
          t: times in the unit of training steps, 0 to 1000; `Process.network_time` gives them.
          label: classes, already dropped to the null class where training drops them.
          train: passed on to mixer and FFN.

        Raises:
          UsageError: where patches do not tile the picture.
        """
        return self.finish(self.layers(self.begin(x_t, t, label), train=train))

    def null(self, label: Int[Array, " b"]) -> Int[Array, " b"]:
        """The label that means "no label", for each example."""
        return jnp.full_like(label, self.classes)

    def begin(
        self, x_t: Float[Array, "b height width channels"], t: Float[Array, " b"], label: Int[Array, " b"]
    ) -> Stream:
        """What enters the first layer."""
        x = self.embed(x_t)  # [B, h, w, C]
        grid = x.shape[1], x.shape[2]
        x = x.reshape(x.shape[0], -1, self.dim)  # [B, h w, C]
        table = sincos_table(grid, self.dim, span=self.position_span)
        x = add_positions(x, jnp.asarray(table))  # [B, h w, C]
        x = nn.with_logical_constraint(x, ("batch", "length", "features"))
        if self.condition == "per_block":
            each, _ = self.conditions(t, label, x.dtype)  # [depth, B, C]
            return Stream(x, each[0], each, None, grid, x_t.shape[-1])
        c, time = self.conditioned(t, label, x.dtype)  # 2 x [B, C]
        route = None
        if self.router is not None:
            route = self.router(t, time, lambda t: self.conditioned.time(t, x.dtype))  # [depth, ...]
        return Stream(x, c, None, route, grid, x_t.shape[-1])

    def layers(self, stream: Stream, part: tuple[int, int] | None = None, train: bool = False) -> Stream:
        """Runs the layers of `part`, from the first to before the second; None means all."""
        c = stream.c if stream.each is None else None
        each, context = Layer(stream.each, route=stream.route), Context(grid=stream.grid)
        x, _ = self.blocks(stream.x, c, context, each=each, train=train, part=part)  # [B, h w, C]
        return dataclasses.replace(stream, x=x)

    def recall(
        self,
        stream: Stream,
        fresh: Bool[Array, "depth branches"],
        kept: Float[Array, "depth branches b n c"],
    ) -> tuple[Stream, Float[Array, "depth branches b n c"]]:
        """Runs all layers, where mixers and FFNs that are not fresh give what was kept of them."""
        c = stream.c if stream.each is None else None
        each = Layer(stream.each, fresh, kept, stream.route)
        x, kept = self.blocks(stream.x, c, Context(grid=stream.grid), each=each)
        return dataclasses.replace(stream, x=x), kept

    @nn.compact
    def finish(self, stream: Stream) -> Float[Array, "b height width out"]:
        """The prediction from what left the last layer."""
        shift, scale = Modulation(2, self.dim, name="modulation")(stream.c)  # 2 x [B, C]
        x = norm("layer_plain", self.block.epsilon, "norm")(stream.x)  # [B, h w, C]
        x = modulate(x, shift, scale)  # [B, h w, C]
        out = stream.channels * (2 if self.learned_sigma else 1)
        project = Dense(self.patch**2 * out, ("embed", None), kernel_init=zeros, name="output")
        x = project(x)  # [B, h w, p p out]
        return unpatch(x, stream.grid, self.patch)  # [B, H, W, out]


def _reducing(block: nn.Module, reduce: Any) -> nn.Module:
    """The block, or all members of it, with tokens merged around the mixer."""
    if members(block) == (block,):
        return block.clone(reduce=reduce)
    return block.clone(members=tuple(member.clone(reduce=reduce) for member in members(block)))
