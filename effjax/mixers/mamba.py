"""Mamba: a selective state space, whose step size, input and output depend on the token.

    u = silu(conv(x W_in + b_in)),   z = x W_gate + b_gate
    (r, B, C) = u W_select,          dt = softplus(r W_dt + b_dt)
    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t,     A = -exp(A_log)
    y_t = C_t h_t + D u_t,           out = (y silu(z)) W_out + b_out

Every one of `I` channels has a state of `S` numbers; the convolution is depthwise and causal. Gu and Dao
2023, section 3.2, algorithm 2 and figure 3; initial values as section 3.6 and the published code have them.

A whole sequence is cut into chunks: an associative scan inside a chunk, a sequential scan over chunks that
carries the state and computes each chunk again in the backward pass, so that memory grows with the chunk and
not with the sequence. A step needs the last `width - 1` inputs of the convolution and the state, whose size
does not depend on how many tokens there were.
"""

import math
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.linen.initializers import Initializer
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from effjax.errors import UsageError
from effjax.layers.dense import Dense, named, zeros
from effjax.mixers.context import Context


@flax.struct.dataclass
class State:
    """What one Mamba layer keeps of the tokens so far.

    The fields are annotated `Any` because the same class also carries their shapes and shardings.

    Attributes:
      inputs: `[B, width - 1, I]`, the last inputs of the convolution.
      hidden: `[B, I, S]` float32, the state.
      written: `[]` int, tokens so far.
    """

    inputs: Any
    hidden: Any
    written: Any


AXES = State(inputs=("batch", None, "mlp"), hidden=("batch", "mlp", None), written=())


class Mamba(nn.Module):
    """A gated selective state space layer.

    Attributes:
      inner: channels `I`; None means `expand` times the width.
      expand: inner channels where `inner` is not given.
      state: numbers `S` that each inner channel remembers.
      width: taps of the convolution.
      rank: channels that the step size is made of; None means a sixteenth of the width, rounded up.
      use_bias: biases on the input, gate and output projections.
      conv_bias: bias of the convolution.
      activation: of convolution and gate; the paper's is the only one.
      selection_epsilon: RMS norm without a scale on r, B and C, as Falcon Mamba has; None leaves it out.
      smallest: initial step sizes are drawn between this
      largest: and this, evenly in their logarithm.
      chunk: tokens that one associative scan covers; it changes time and memory and not the result.
    """

    inner: int | None = None
    expand: float = 2.0
    state: int = 16
    width: int = 4
    rank: int | None = None
    use_bias: bool = False
    conv_bias: bool = True
    activation: Literal["silu"] = "silu"
    selection_epsilon: float | None = None
    smallest: float = 1e-3
    largest: float = 1e-1
    chunk: int = 64

    def __call__(
        self, x: Float[Array, "b n c"], context: Context, train: bool = False
    ) -> Float[Array, "b n c"]:
        """Mixes the tokens of whole sequences; documents of a packed row do not see each other."""
        y, _ = self.mix(x, context, None)
        return y

    def step(
        self, x: Float[Array, "b n c"], cache: State, context: Context
    ) -> tuple[Float[Array, "b n c"], State]:
        """Mixes the next `n` tokens, given the state that those before have left.

        Args:
          x: one token or a whole prompt.
          cache: what `init_cache` made and earlier steps filled.
          context: of it `positions` count, negative for padding in front.

        Raises:
          UsageError: for a context with segments, valid or size.
        """
        if not (context.segments is context.valid is context.size is None):
            raise UsageError("a step knows padding by position alone: give no segments, valid or size.")
        return self.mix(x, context, cache)

    @nn.nowrap
    def init_cache(self, batch: int, slots: int, width: int, dtype: DTypeLike = jnp.float32) -> State:
        """Makes the state before the first token; its size does not depend on `slots`."""
        inner, _ = self.sizes(width)
        return State(
            inputs=jnp.zeros((batch, self.width - 1, inner), dtype),
            hidden=jnp.zeros((batch, inner, self.state), jnp.float32),
            written=jnp.zeros((), jnp.int32),
        )

    @nn.nowrap
    def cache_axes(self) -> State:
        """Names of the axes of a state."""
        return AXES

    @nn.nowrap
    def sizes(self, width: int) -> tuple[int, int]:
        """Returns the inner channels and the rank of the step size."""
        inner = round(width * self.expand) if self.inner is None else self.inner
        return inner, math.ceil(width / 16) if self.rank is None else self.rank

    @nn.compact
    def mix(
        self, x: Float[Array, "b n c"], context: Context, cache: State | None
    ) -> tuple[Float[Array, "b n c"], Any]:
        """Both views of a sequence: whole, or going on from a state."""
        b, n, c = x.shape
        inner, _ = self.sizes(c)
        exists = _existing(context)  # [B, N] or None
        axes = ("embed", "mlp")
        u = _kept(Dense(inner, axes, use_bias=self.use_bias, name="input")(x), exists)  # [B, N, I]
        z = Dense(inner, axes, use_bias=self.use_bias, name="gate")(x)  # [B, N, I]
        past = jnp.zeros((b, self.width - 1, inner), u.dtype) if cache is None else cache.inputs
        taps = jnp.concatenate([past.astype(u.dtype), u], axis=1)  # [B, width - 1 + N, I]
        u = _kept(jax.nn.silu(self.convolve(taps, context.segments)), exists)  # [B, N, I]
        u = nn.with_logical_constraint(u, ("batch", "length", "mlp"))

        dt, B, C = self.select(u, c)  # [B, N, I], [B, N, S], [B, N, S], float32
        A = -jnp.exp(self.param("A_log", named(_log_range, ("mlp", None)), (inner, self.state)))
        D = self.param("D", named(nn.initializers.ones_init(), ("mlp",)), (inner,), jnp.float32)
        hidden = jnp.zeros((b, inner, self.state), dt.dtype) if cache is None else cache.hidden
        first = None
        if context.segments is not None:  # a document's first token starts from an empty state
            before = jnp.pad(context.segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
            first = context.segments != before  # [B, N]
        y, hidden = selective_scan(
            u.astype(dt.dtype), dt, A.astype(dt.dtype), B, C, hidden, first, self.chunk
        )
        y = y + u.astype(dt.dtype) * D.astype(dt.dtype)[None, None, :]
        y = y.astype(x.dtype) * jax.nn.silu(z)  # [B, N, I]
        y = Dense(c, ("mlp", "embed"), use_bias=self.use_bias, name="output")(y)  # [B, N, C]
        if cache is None:
            return y, None
        return y, State(taps[:, n:].astype(cache.inputs.dtype), hidden, cache.written + n)

    @nn.nowrap
    def convolve(
        self, taps: Float[Array, "b m i"], segments: Int[Array, "b n"] | None
    ) -> Float[Array, "b n i"]:
        """The causal depthwise convolution: output `t` reads inputs `t - width + 1` to `t` of a document."""
        inner, count = taps.shape[2], taps.shape[1] - self.width + 1
        scale = self.width**-0.5
        init = named(_uniform(scale), (None, "mlp"))
        kernel = self.param("conv_kernel", init, (self.width, inner), jnp.float32).astype(taps.dtype)
        y = jnp.zeros((taps.shape[0], count, inner), taps.dtype)
        for tap in range(self.width):
            term = taps[:, tap : tap + count] * kernel[None, None, tap]
            back = self.width - 1 - tap
            if segments is not None and back:
                earlier = jnp.pad(segments, ((0, 0), (back, 0)), constant_values=-1)[:, :count]
                term = jnp.where((earlier == segments)[:, :, None], term, 0)
            y = y + term
        if self.conv_bias:
            bias = self.param("conv_bias", named(zeros, ("mlp",)), (inner,), jnp.float32)
            y = y + bias.astype(y.dtype)[None, None, :]
        return y

    @nn.nowrap
    def select(
        self, u: Float[Array, "b n i"], width: int
    ) -> tuple[Float[Array, "b n i"], Float[Array, "b n s"], Float[Array, "b n s"]]:
        """Returns the step size of every channel, and what is written to and read from the state."""
        inner, rank = self.sizes(width)
        features = rank + 2 * self.state
        # What is selected is exponentiated in every layer, so that rounding here grows with depth.
        chosen = Dense(features, ("mlp", None), use_bias=False, block=128, name="select")(
            u
        )  # [B, N, R + 2 S]
        parts = jnp.split(chosen, (rank, rank + self.state), axis=-1)
        if self.selection_epsilon is not None:
            parts = [_rms(part, self.selection_epsilon) for part in parts]
        r, B, C = parts
        scale = rank**-0.5
        dt = Dense(
            inner,
            (None, "mlp"),
            kernel_init=_uniform(scale),
            bias_init=_log_uniform_softplus(self.smallest, self.largest),
            name="step_size",
        )(r)
        wide = jnp.promote_types(u.dtype, jnp.float32)
        return jax.nn.softplus(dt.astype(wide)), B.astype(wide), C.astype(wide)


def selective_scan(
    u: Float[Array, "b n i"],
    dt: Float[Array, "b n i"],
    A: Float[Array, "i s"],
    B: Float[Array, "b n s"],
    C: Float[Array, "b n s"],
    hidden: Float[Array, "b i s"],
    first: Bool[Array, "b n"] | None = None,
    chunk: int = 64,
) -> tuple[Float[Array, "b n i"], Float[Array, "b i s"]]:
    """`h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t` and `y_t = C_t h_t`, chunk by chunk.

    Args:
      u: inputs.
      dt: step sizes, positive; a token with step size 0 leaves the state as it is.
      A: rates, negative.
      B: what each token writes.
      C: what each token reads.
      hidden: state before the first token.
      first: tokens before which the state is emptied.
      chunk: tokens that are in memory, times `i s`, at once.

    Returns:
      The outputs, and the state after the last token.
    """
    n = u.shape[1]
    chunk = min(chunk, n)
    first = jnp.zeros(u.shape[:2], bool) if first is None else first

    def cut(x: Array) -> Array:  # [B, N, ...] to [N / chunk, B, chunk, ...]
        padding = [(0, 0), (0, -n % chunk), *[(0, 0)] * (x.ndim - 2)]
        return jnp.moveaxis(jnp.pad(x, padding).reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one(hidden: Array, slices: tuple[Array, ...]) -> tuple[Array, Array]:
        u, dt, B, C, first = slices
        decay = jnp.exp(dt[..., None] * A[None, None])  # [B, chunk, I, S]
        decay = jnp.where(first[..., None, None], 0.0, decay)
        written = (dt * u)[..., None] * B[:, :, None, :]  # [B, chunk, I, S]
        kept, added = jax.lax.associative_scan(_compose, (decay, written), axis=1)
        states = kept * hidden[:, None] + added  # [B, chunk, I, S]
        return states[:, -1], jnp.einsum("bnis,bns->bni", states, C)

    hidden, y = jax.lax.scan(one, hidden, tuple(map(cut, (u, dt, B, C, first))))
    return jnp.moveaxis(y, 0, 1).reshape(u.shape[0], -1, u.shape[2])[:, :n], hidden


def _compose(earlier: tuple[Array, Array], later: tuple[Array, Array]) -> tuple[Array, Array]:
    """Two maps `h -> a h + b`, one after the other."""
    return earlier[0] * later[0], later[0] * earlier[1] + later[1]


def _existing(context: Context) -> Bool[Array, "b n"] | None:
    """Which tokens are no padding; None where all exist."""
    if context.valid is not None:
        return context.valid
    if context.segments is not None:
        return context.segments > 0
    return None if context.positions is None else context.positions >= 0


def _kept(x: Float[Array, "b n i"], exists: Bool[Array, "b n"] | None) -> Float[Array, "b n i"]:
    """Zero on padding, which then writes nothing to convolution and state."""
    return x if exists is None else jnp.where(exists[:, :, None], x, 0)


def _rms(x: Float[Array, "b n c"], epsilon: float) -> Float[Array, "b n c"]:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + epsilon)).astype(x.dtype)


def _log_range(key: Array, shape: tuple[int, int]) -> Float[Array, "i s"]:
    """`log(1), log(2), .. log(S)` for every channel: the real initial values of S4D."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=jnp.float32))[None, :], shape)


def _uniform(bound: float) -> Initializer:
    """Between `-bound` and `bound`."""

    def init(key: Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def _log_uniform_softplus(smallest: float, largest: float) -> Initializer:
    """Biases whose softplus is spread evenly in its logarithm."""

    def init(key: Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
        low, high = math.log(smallest), math.log(largest)
        size = jnp.exp(jax.random.uniform(key, shape, dtype, low, high))
        return size + jnp.log(-jnp.expm1(-size))  # the inverse of softplus

    return init
