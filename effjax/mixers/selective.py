"""A selective state space behind a causal convolution: what every direction of a Mamba layer computes.

    v = silu(conv(u))
    (r, B, C) = v W_select,          dt = softplus(r W_dt + b_dt)
    h_t = exp(dt_t A) h_{t-1} + dt_t B_t v_t,     A = -exp(A_log)
    y_t = C_t h_t + D v_t

Every one of `I` channels has a state of `S` numbers; the convolution is depthwise and causal. Gu and Dao
2023, section 3.2 and algorithm 2; initial values as section 3.6 and the published code have them.

A whole sequence is cut into chunks: an associative scan inside a chunk (on CPUs token after token, which is
faster there), a sequential scan over chunks that carries the state and computes each chunk again in the
backward pass, so that memory grows with the chunk and not with the sequence. Or it goes through the kernels
of `pallas_kernels.selective_scan`, for TPUs and Hopper GPUs, whose states stay where they are computed.
"""

import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from flax.linen.initializers import Initializer
from jaxtyping import Array, Bool, Float, Int

from effjax.errors import UsageError
from effjax.layers.dense import Dense, named, zeros
from effjax.parallel.each_device import on_each_device


class Selective(nn.Module):
    """The parameters of one direction, at whose level they stand in what inherits from it.

    Attributes:
      state: numbers `S` that each inner channel remembers.
      width: taps of the convolution.
      rank: channels that the step size is made of; None means a sixteenth of the model's width, rounded up.
      conv_bias: bias of the convolution.
      selection_epsilon: RMS norm without a scale on r, B and C, as Falcon Mamba has; None leaves it out.
      smallest: initial step sizes are drawn between this
      largest: and this, evenly in their logarithm.
      chunk: tokens that one associative scan covers; it changes time and memory and not the result.
      implementation: `chunks` is what stands here, on every platform. `kernel` is the kernel of the platform;
        where it has none, or with a warning none for these shapes, what `reference` is everywhere.
    """

    state: int = 16
    width: int = 4
    rank: int | None = None
    conv_bias: bool = True
    selection_epsilon: float | None = None
    smallest: float = 1e-3
    largest: float = 1e-1
    chunk: int = 64
    implementation: Literal["chunks", "kernel", "reference"] = "chunks"

    @nn.nowrap
    def recur(
        self,
        taps: Float[Array, "b m i"],
        rank: int,
        hidden: Float[Array, "b i s"] | None = None,
        segments: Int[Array, "b n"] | None = None,
        exists: Bool[Array, "b n"] | None = None,
        gaps: Int[Array, "b n"] | None = None,
        reverse: bool = False,
    ) -> tuple[Float[Array, "b n i"], Float[Array, "b i s"]]:
        """Returns the outputs y and the state after the last token, in float32.

        Args:
          taps: inputs u, behind the `width - 1` before them; where the last is read first, before these.
          rank: channels that the step size is made of.
          hidden: state before the first token; None is an empty one.
          segments: documents of a packed row, which do not see each other.
          exists: tokens that are no padding.
          gaps: how many tokens are missing before each. The state decays over them too, by the step that a
            token without content has, softplus(b_dt).
          reverse: whether the last token is read first. Kernels do that in place, where no segments are.
        """
        u = kept(jax.nn.silu(self.convolve(taps, segments, reverse)), exists)  # [B, N, I]
        u = nn.with_logical_constraint(u, ("batch", "length", "mlp"))
        inner = u.shape[-1]
        dt, B, C = self.select(u, rank)  # [B, N, I], [B, N, S], [B, N, S], float32
        A = -jnp.exp(self.param("A_log", named(_log_range, ("mlp", None)), (inner, self.state)))
        D = self.param("D", named(nn.initializers.ones_init(), ("mlp",)), (inner,), jnp.float32)
        first = None if segments is None else first_of_each(segments)  # [B, N]
        decay = None
        if gaps is not None:
            bias: Array = meta.unbox(self.get_variable("params", "step_size"))["bias"].astype(dt.dtype)
            decay = dt + gaps[:, :, None].astype(dt.dtype) * jax.nn.softplus(bias)[None, None]
        scan = self._by_chunks if self.implementation == "chunks" else self._by_kernel
        y, hidden = scan((u, dt, A.astype(dt.dtype), B, C, hidden, decay, first), reverse)
        return y + u.astype(dt.dtype) * D.astype(dt.dtype)[None, None, :], hidden

    @nn.nowrap
    def _by_chunks(self, arrays: tuple[Any, ...], reverse: bool) -> tuple[Array, Array]:
        if reverse:
            raise UsageError(
                "chunks are read from their first token: reverse the tokens, or take the kernel."
            )
        u, dt, A, B, C, hidden, decay, first = arrays
        if hidden is None:
            hidden = jnp.zeros((u.shape[0], *A.shape), dt.dtype)
        return selective_scan(u.astype(dt.dtype), dt, A, B, C, hidden, first, self.chunk, decay)

    @nn.nowrap
    def _by_kernel(self, arrays: tuple[Any, ...], reverse: bool) -> tuple[Array, Array]:
        # Pallas is slow to import, and most programs have no use for it.
        from pallas_kernels import selective_scan as kernels

        chosen: Any = "reference" if self.implementation == "reference" else None

        def scan(*arrays: Any) -> Any:
            return kernels.selective_scan(*arrays, reverse=reverse, implementation=chosen)

        # Each device has its own rows and channels.
        whole, state, selected = ("batch", None, "mlp"), ("batch", "mlp", None), ("batch", None, None)
        inputs = (whole, whole, ("mlp", None), selected, selected, state, whole, ("batch", None))
        y, hidden = on_each_device(scan, inputs, whole, state)(*arrays)
        return y.astype(arrays[1].dtype), hidden

    @nn.nowrap
    def convolve(
        self, taps: Float[Array, "b m i"], segments: Int[Array, "b n"] | None, reverse: bool = False
    ) -> Float[Array, "b n i"]:
        """The causal depthwise convolution: output `t` reads inputs `t - width + 1` to `t` of a document.

        In reverse it reads inputs `t` to `t + width - 1`, by the same weights in the other order.
        """
        inner, scale = taps.shape[2], self.width**-0.5
        init = named(uniform(scale), (None, "mlp"))
        kernel = self.param("conv_kernel", init, (self.width, inner), jnp.float32)
        kernel = jnp.asarray(kernel)
        y = causal_convolution(taps, kernel[::-1] if reverse else kernel, segments)
        if self.conv_bias:
            bias = self.param("conv_bias", named(zeros, ("mlp",)), (inner,), jnp.float32)
            y = y + bias.astype(y.dtype)[None, None, :]
        return y

    @nn.nowrap
    def select(
        self, u: Float[Array, "b n i"], rank: int
    ) -> tuple[Float[Array, "b n i"], Float[Array, "b n s"], Float[Array, "b n s"]]:
        """Returns the step size of every channel, and what is written to and read from the state."""
        features = rank + 2 * self.state
        # What is selected is exponentiated in every layer, so that rounding here grows with depth.
        project = Dense(features, ("mlp", None), use_bias=False, block=128, name="select")
        chosen = project(u)  # [B, N, R + 2 S]
        parts = jnp.split(chosen, (rank, rank + self.state), axis=-1)
        if self.selection_epsilon is not None:
            parts = [_rms(part, self.selection_epsilon) for part in parts]
        r, B, C = parts
        scale = rank**-0.5
        dt = Dense(
            u.shape[-1],
            (None, "mlp"),
            kernel_init=uniform(scale),
            bias_init=log_uniform_softplus(self.smallest, self.largest),
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
    decay: Float[Array, "b n i"] | None = None,
) -> tuple[Float[Array, "b n i"], Float[Array, "b i s"]]:
    """`h_t = exp(e_t A) h_{t-1} + dt_t B_t u_t` and `y_t = C_t h_t`, chunk by chunk.

    Args:
      u: inputs.
      dt: step sizes, positive; a token with step size 0 leaves the state as it is.
      A: rates, negative.
      B: what each token writes.
      C: what each token reads.
      hidden: state before the first token.
      first: tokens before which the state is emptied.
      chunk: tokens that are in memory, times `i s`, at once.
      decay: e, over which the state decays before each token: its own step, and those of tokens that were
        left out before it. None means `dt`.

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
        return jax.lax.platform_dependent(hidden, A, *slices, cpu=_token_by_token, default=_all_at_once)

    decay = dt if decay is None else decay
    hidden, y = jax.lax.scan(one, hidden, tuple(map(cut, (u, dt, decay, B, C, first))))
    return jnp.moveaxis(y, 0, 1).reshape(u.shape[0], -1, u.shape[2])[:, :n], hidden


def _all_at_once(
    hidden: Array, A: Array, u: Array, dt: Array, decay: Array, B: Array, C: Array, first: Array
) -> tuple[Array, Array]:
    """A chunk by an associative scan, in a logarithm of its length."""
    decay = jnp.exp(decay[..., None] * A[None, None])  # [B, chunk, I, S]
    decay = jnp.where(first[..., None, None], 0.0, decay)
    written = (dt * u)[..., None] * B[:, :, None, :]  # [B, chunk, I, S]
    kept, added = jax.lax.associative_scan(_compose, (decay, written), axis=1)
    states = kept * hidden[:, None] + added  # [B, chunk, I, S]
    return states[:, -1], jnp.einsum("bnis,bns->bni", states, C)


def _token_by_token(
    hidden: Array, A: Array, u: Array, dt: Array, decay: Array, B: Array, C: Array, first: Array
) -> tuple[Array, Array]:
    """A chunk one token after another, which on a CPU costs a few passes over one state instead of many."""

    def step(hidden: Array, now: tuple[Array, ...]) -> tuple[Array, Array]:
        u, dt, decay, B, C, first = now
        decay = jnp.where(first[:, None, None], 0.0, jnp.exp(decay[..., None] * A[None]))  # [B, I, S]
        hidden = decay * hidden + (dt * u)[..., None] * B[:, None, :]  # [B, I, S]
        return hidden, jnp.einsum("bis,bs->bi", hidden, C)

    turned = tuple(jnp.moveaxis(part, 1, 0) for part in (u, dt, decay, B, C, first))
    hidden, y = jax.lax.scan(step, hidden, turned)
    return hidden, jnp.moveaxis(y, 0, 1)


def _compose(earlier: tuple[Array, Array], later: tuple[Array, Array]) -> tuple[Array, Array]:
    """Two maps `h -> a h + b`, one after the other."""
    return earlier[0] * later[0], later[0] * earlier[1] + later[1]


def causal_convolution(
    taps: Float[Array, "b m i"], kernel: Float[Array, "width i"], segments: Int[Array, "b n"] | None
) -> Float[Array, "b n i"]:
    """Output `t` is the sum of inputs `t - width + 1` to `t` of a document, each channel by its own weights.

    Args:
      taps: inputs, behind the `width - 1` before them.
      kernel: the weights, of the earliest input first.
      segments: documents, which do not see each other.
    """
    width, kernel = kernel.shape[0], kernel.astype(taps.dtype)
    count = taps.shape[1] - width + 1
    y = jnp.zeros((taps.shape[0], count, taps.shape[2]), taps.dtype)
    for tap in range(width):
        term = taps[:, tap : tap + count] * kernel[None, None, tap]
        back = width - 1 - tap
        if segments is not None and back:
            earlier = jnp.pad(segments, ((0, 0), (back, 0)), constant_values=-1)[:, :count]
            term = jnp.where((earlier == segments)[:, :, None], term, 0)
        y = y + term
    return y


def first_of_each(segments: Int[Array, "b n"]) -> Bool[Array, "b n"]:
    """The first token of every document, before which the state is emptied."""
    before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return segments != before


def kept(x: Float[Array, "b n i"], exists: Bool[Array, "b n"] | None) -> Float[Array, "b n i"]:
    """Zero on padding, which then writes nothing to convolution and state."""
    return x if exists is None else jnp.where(exists[:, :, None], x, 0)


def _rms(x: Float[Array, "b n c"], epsilon: float) -> Float[Array, "b n c"]:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + epsilon)).astype(x.dtype)


def _log_range(key: Array, shape: tuple[int, int]) -> Float[Array, "i s"]:
    """`log(1), log(2), .. log(S)` for every channel: the real initial values of S4D."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=jnp.float32))[None, :], shape)


def uniform(bound: float) -> Initializer:
    """Between `-bound` and `bound`."""

    def init(key: Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def log_uniform_softplus(smallest: float, largest: float) -> Initializer:
    """Biases whose softplus is spread evenly in its logarithm."""

    def init(key: Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
        low, high = math.log(smallest), math.log(largest)
        size = jnp.exp(jax.random.uniform(key, shape, dtype, low, high))
        return size + jnp.log(-jnp.expm1(-size))  # the inverse of softplus

    return init
