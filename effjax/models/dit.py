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
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effjax import ffn, mixers, tokens
from effjax.config import part
from effjax.layers.dense import Dense, named, zeros
from effjax.layers.norms import norm
from effjax.layers.patches import PatchEmbed, add_positions, sincos_table, unpatch
from effjax.layers.stack import Stack
from effjax.mixers.context import Context
from effjax.tokens.around import around

_normal = nn.initializers.normal(0.02)


def modulate(
    x: Float[Array, "b n c"], shift: Float[Array, "b c"], scale: Float[Array, "b c"]
) -> Float[Array, "b n c"]:
    """Scales by `1 + scale` and shifts every token of an example alike."""
    return x * (1 + scale[:, None]) + shift[:, None]


def time_frequencies(
    t: Float[Array, " b"], count: int, longest: float = 10_000.0, inclusive: bool = False
) -> Float[Array, "b count"]:
    """Cosines, then sines, of `t` times `count / 2` frequencies that fall from 1 towards `1 / longest`.

    `inclusive` spaces them so that the last one is `1 / longest`, as diffusers does. Computed in float32,
    whatever the network computes in: at `t = 999` half precision would lose the phase.
    """
    half = count // 2
    frequencies = jnp.exp(-math.log(longest) * jnp.arange(half, dtype=jnp.float32) / (half - inclusive))
    angle = t.astype(jnp.float32)[:, None] * frequencies[None]  # [B, count / 2]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class Modulation(nn.Module):
    """`parts` vectors of `dim` channels from the conditioning: silu(c) W + b, zero at the start.

    Attributes:
      parts: how many vectors.
      dim: channels of each.
    """

    parts: int
    dim: int

    @nn.compact
    def __call__(self, c: Float[Array, "b cond"]) -> tuple[Float[Array, "b dim"], ...]:
        """Returns the vectors in the order they are used."""
        axes = ("embed", None, "mlp")
        out = Dense((self.parts, self.dim), axes, kernel_init=zeros, name="projection")(nn.silu(c))
        return tuple(out[:, i] for i in range(self.parts))  # parts x [B, C]


class TimeEmbed(nn.Module):
    """Turns a time into a vector: frequencies, then two layers with SiLU between them.

    Attributes:
      dim: channels of the vector.
      frequencies: sines and cosines together.
      inclusive: whether the last frequency is the lowest itself, see `time_frequencies`.
    """

    dim: int
    frequencies: int = 256
    inclusive: bool = False

    @nn.compact
    def __call__(self, t: Float[Array, " b"], dtype: jax.typing.DTypeLike) -> Float[Array, "b dim"]:
        """Embeds times in the unit of training steps, 0 to 1000; `dtype` is what the network computes in."""
        h = time_frequencies(t, self.frequencies, inclusive=self.inclusive).astype(dtype)  # [B, frequencies]
        h = Dense(self.dim, (None, "mlp"), kernel_init=_normal, name="expand")(h)  # [B, C]
        return Dense(self.dim, ("mlp", "embed"), kernel_init=_normal, name="contract")(nn.silu(h))  # [B, C]


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

    @nn.compact
    def __call__(
        self, t: Float[Array, " b"], label: Int[Array, " b"], dtype: jax.typing.DTypeLike
    ) -> Float[Array, "b c"]:
        """Embeds times and labels in `dtype` and adds them."""
        init = named(_normal, (None, "embed"))
        label_embed = nn.Embed(self.rows, self.dim, embedding_init=init, name="label_embed")(label)  # [B, C]
        time_embed = TimeEmbed(self.dim, self.frequencies, self.inclusive, name="time_embed")(t, dtype)
        return time_embed + label_embed.astype(time_embed.dtype)


@flax.struct.dataclass
class Layer:
    """What is one block's own.

    Attributes:
      c: `[B, C]`, its condition; None where all share one.
      fresh: `[branches]`, which of its branches are computed.
      kept: `[branches, B, N, C]`, what they gave before; None computes all and keeps nothing.
    """

    c: Any = None
    fresh: Any = None
    kept: Any = None

    def branch(self, number: int, compute: Callable[..., Array], block: nn.Module, h: Array) -> Array:
        """What a branch gives: computed, or what was kept of it."""
        if self.kept is None:
            return compute(block, h)
        again: Array = nn.cond(self.fresh[number], compute, lambda block, h: self.kept[number], block, h)
        return again


class DiTBlock(nn.Module):
    """The adaLN-Zero block: mixer and FFN, each behind a modulated norm and a gate.

    Attributes:
      mixer: how tokens mix.
      ffn: how channels mix.
      epsilon: of the layer norms.
      ffn_epsilon: of the second one; None means `epsilon`.
      ffn_affine: whether the second one has a scale and a bias of its own besides the modulation.
      reduce: how tokens are merged before the mixer and restored behind it, a kind in `effjax.tokens` that
        reads features alone.
    """

    mixer: nn.Module = part(mixers.KINDS)
    ffn: nn.Module = part(ffn.KINDS)
    epsilon: float = 1e-6
    ffn_epsilon: float | None = None
    ffn_affine: bool = False
    reduce: Any = part(tokens.METHODS, default=None)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n c"],
        each: Layer,
        c: Float[Array, "b c"] | None,
        context: Context,
        train: bool = False,
    ) -> tuple[Float[Array, "b n c"], Float[Array, "2 b n c"] | None]:
        """Returns `(x, kept)`; conditioned by `c` like every block, or by `each.c`, this block's own.

        Where `each.kept` holds what the branches gave before, one that is not fresh gives that again, and
        `kept` is what they gave now.
        """
        c = c if each.c is None else each.c
        assert c is not None
        b_1, a_1, g_1, b_2, a_2, g_2 = Modulation(6, x.shape[-1], name="modulation")(c)  # 6 x [B, C]
        h = modulate(norm("layer_plain", self.epsilon, "mixer_norm")(x), b_1, a_1)  # [B, N, C]
        mixed = each.branch(0, lambda block, h: block._mixed(h, context, train), self, h)  # [B, N, C]
        x = x + g_1[:, None] * mixed  # [B, N, C]
        epsilon = self.epsilon if self.ffn_epsilon is None else self.ffn_epsilon
        h = norm("layer" if self.ffn_affine else "layer_plain", epsilon, "ffn_norm")(x)  # [B, N, C]
        h = modulate(h, b_2, a_2)
        fed = each.branch(1, lambda block, h: block.ffn(h, train=train), self, h)  # [B, N, C]
        x = x + g_2[:, None] * fed  # [B, N, C]
        kept = None if each.kept is None else jnp.stack([mixed, fed])  # [2, B, N, C]
        return nn.with_logical_constraint(x, ("batch", "length", "features")), kept

    @nn.nowrap
    def _mixed(self, h: Float[Array, "b n c"], context: Context, train: bool) -> Float[Array, "b n c"]:
        if self.reduce is None:
            return self.mixer(h, context, train=train)
        return around(self.reduce, h, lambda h, context: self.mixer(h, context, train=train), context)


@flax.struct.dataclass
class Stream:
    """What runs through the layers of a denoiser, between `begin`, `layers` and `finish`.

    Attributes:
      x: `[B, N, C]`, the tokens.
      c: `[B, C]`, the embedded condition that the last modulation reads, and the layers where `each` is None.
      each: `[depth, B, C]`, the condition of each layer, or None.
      grid: rows and columns of tokens.
      channels: of the noisy picture.
    """

    x: Any
    c: Any
    each: Any
    grid: tuple[int, int] = flax.struct.field(pytree_node=False)
    channels: int = flax.struct.field(pytree_node=False)


class DiT(nn.Module):
    """Predicts noise, clean picture or velocity from a noisy picture, its time and its class.

    The network is `begin`, `layers` and `finish` one behind the other, which step caches call by themselves.

    Attributes:
      block: the block that the stack repeats.
      patch: side of a patch in pixels (of the latent, where there is one).
      dim: channels of a token.
      depth: number of blocks.
      classes: number of labels; the label `classes` means "no label" where there is a null class.
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

    block: DiTBlock
    patch: int
    dim: int
    depth: int
    classes: int
    null_class: bool = True
    learned_sigma: bool = True
    frequencies: int = 256
    remat: str = "none"
    unroll: int = 1
    condition: Literal["shared", "per_block"] = "shared"
    inclusive_frequencies: bool = False
    position_span: int | None = None
    reduce: Any = part(tokens.METHODS, default=None)

    branches: ClassVar[int] = 2

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
        block = self.block if self.reduce is None else self.block.clone(reduce=self.reduce)
        self.blocks = Stack(block, self.depth, remat=self.remat, unroll=self.unroll)

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
        if self.condition == "shared":
            return Stream(x, self.conditioned(t, label, x.dtype), None, grid, x_t.shape[-1])
        each = self.conditions(t, label, x.dtype)  # [depth, B, C]
        return Stream(x, each[0], each, grid, x_t.shape[-1])

    def layers(self, stream: Stream, part: tuple[int, int] | None = None, train: bool = False) -> Stream:
        """Runs the layers of `part`, from the first to before the second; None means all."""
        c = stream.c if stream.each is None else None
        each = Layer(stream.each)
        x, _ = self.blocks(stream.x, c, Context(), each=each, train=train, part=part)  # [B, h w, C]
        return dataclasses.replace(stream, x=x)

    def recall(
        self,
        stream: Stream,
        fresh: Bool[Array, "depth 2"],
        kept: Float[Array, "depth 2 b n c"],
    ) -> tuple[Stream, Float[Array, "depth 2 b n c"]]:
        """Runs all layers, where mixers and FFNs that are not fresh give what was kept of them."""
        c = stream.c if stream.each is None else None
        x, kept = self.blocks(stream.x, c, Context(), each=Layer(stream.each, fresh, kept))
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
