"""Structured state space duality: a state space whose every head forgets at one rate, as matrix products.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,     y_t = h_t C_t + D x_t           x_t [P], B_t, C_t [S]
    y_t = sum_s exp(A (dt_{s+1} + .. + dt_t)) (C_t B_s) dt_s x_s + D x_t            over s <= t: the same

The second line is attention whose weights are discounted and not normalised: C are queries, B keys, and A is
a negative number a head. A chunk of `Q` tokens is computed by it, and a state `[P, S]` a head goes from chunk
to chunk by the first line, so that `N` tokens cost a head `N Q P + 2 N P S`, and a group `N Q S` for the
scores that its heads share. Where there are several chunks they are computed again in the backward pass:
memory grows with the chunk and not with the sequence. Decays and the state are float32 whatever the network
computes in.

Source: Dao and Gu, "Transformers are SSMs", ICML 2024, sections 5 and 6, listing 1.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effjax.errors import UsageError
from effjax.layers.dense import Dense, named, zeros
from effjax.mixers.selective import (
    causal_convolution,
    first_of_each,
    kept,
    log_uniform_softplus,
    uniform,
)


class Duality(nn.Module):
    """The parameters of one direction, at whose level they stand in what inherits from it.

    Attributes:
      state: numbers `S` that every channel of a head remembers.
      head: channels `P` of a head.
      groups: `G`, each of which shares what is written and read among its heads.
      width: taps of the convolution.
      conv_bias: bias of the convolution.
      smallest: initial step sizes are drawn between this
      largest: and this, evenly in their logarithm.
      slowest: initial rates -A are drawn between this
      fastest: and this.
      chunk: tokens that are computed as one product; it changes time and memory and not the result.
    """

    state: int = 128
    head: int = 64
    groups: int = 1
    width: int = 4
    conv_bias: bool = True
    smallest: float = 1e-3
    largest: float = 1e-1
    slowest: float = 1.0
    fastest: float = 16.0
    chunk: int = 256

    @nn.nowrap
    def recur(
        self,
        taps: Float[Array, "b m i"],
        chosen: Float[Array, "b m k"],
        step: Float[Array, "b n h"],
        hidden: Float[Array, "b h p s"] | None = None,
        segments: Int[Array, "b n"] | None = None,
        exists: Bool[Array, "b n"] | None = None,
    ) -> tuple[Float[Array, "b n i"], Float[Array, "b h p s"]]:
        """Returns the outputs y and the state after the last token, in float32.

        Args:
          taps: what becomes x, behind the `width - 1` before them.
          chosen: what becomes B and C, likewise.
          step: what becomes the step sizes.
          hidden: state before the first token; None is an empty one.
          segments: documents of a packed row, which do not see each other.
          exists: tokens that are no padding.
        """
        b, n, heads = step.shape
        x = kept(self.convolve(taps, "conv", "mlp", segments), exists)  # [B, N, I]
        x = nn.with_logical_constraint(x, ("batch", "length", "mlp"))
        selected = kept(self.convolve(chosen, "select_conv", None, segments), exists)  # [B, N, 2 G S]
        wide = jnp.promote_types(step.dtype, jnp.float32)
        B, C = jnp.split(selected.astype(wide).reshape(b, n, 2 * self.groups, self.state), 2, axis=2)
        rates = named(_log_uniform(self.slowest, self.fastest), ("mlp",))
        A = -jnp.exp(self.param("A_log", rates, (heads,)).astype(wide))  # [H]
        D = self.param("D", named(nn.initializers.ones_init(), ("mlp",)), (heads,), jnp.float32)
        sizes = named(log_uniform_softplus(self.smallest, self.largest), ("mlp",))
        bias = self.param("step_bias", sizes, (heads,), jnp.float32).astype(wide)
        dt = jax.nn.softplus(step.astype(wide) + bias[None, None])  # [B, N, H]
        x = x.astype(wide).reshape(b, n, heads, self.head)  # [B, N, H, P]
        if hidden is None:
            hidden = jnp.zeros((b, heads, self.head, self.state), wide)
        first = None if segments is None else first_of_each(segments)  # [B, N]
        y, hidden = dual_scan(x, dt, A, B, C, hidden, first, self.chunk)
        y = y + x * D.astype(wide)[None, None, :, None]  # [B, N, H, P]
        return y.reshape(b, n, -1), hidden

    @nn.nowrap
    def convolve(
        self, taps: Float[Array, "b m k"], name: str, axis: str | None, segments: Int[Array, "b n"] | None
    ) -> Float[Array, "b n k"]:
        """The causal depthwise convolution and its activation; `name` is that of its parameters."""
        shape, init = (self.width, taps.shape[2]), named(uniform(self.width**-0.5), (None, axis))
        kernel = jnp.asarray(self.param(f"{name}_kernel", init, shape, jnp.float32))
        y = causal_convolution(taps, kernel, segments)
        if self.conv_bias:
            bias = self.param(f"{name}_bias", named(zeros, (axis,)), shape[1:], jnp.float32)
            y = y + bias.astype(y.dtype)[None, None, :]
        return jax.nn.silu(y)

    @nn.nowrap
    def sizes(self, width: int, expand: float, inner: int | None = None) -> tuple[int, int, int]:
        """Returns inner channels, heads, and the channels of B and C together.

        Raises:
          UsageError: where heads or groups do not divide.
        """
        inner = round(width * expand) if inner is None else inner
        if inner % self.head or inner // self.head % self.groups:
            raise UsageError(
                f"{inner} inner channels make no heads of {self.head} in {self.groups} equal groups: change "
                f"head, groups or expand."
            )
        return inner, inner // self.head, 2 * self.groups * self.state


def project(
    x: Float[Array, "b n c"], inner: int, selected: int, heads: int, use_bias: bool
) -> tuple[Float[Array, "b n i"], Float[Array, "b n k"], Float[Array, "b n h"]]:
    """What a token says before any other is looked at; the parameters stand in the module that calls it.

    Args:
      x: tokens.
      inner: channels of x.
      selected: channels of B and C together.
      heads: each has a step size.
      use_bias: biases of all three.

    Returns:
      What becomes x, what becomes B and C, and what becomes the step sizes.
    """
    u = Dense(inner, ("embed", "mlp"), use_bias=use_bias, name="input")(x)  # [B, N, I]
    chosen = Dense(selected, ("embed", None), use_bias=use_bias, name="select")(x)  # [B, N, 2 G S]
    step = Dense(heads, ("embed", "mlp"), use_bias=use_bias, name="step_size")(x)  # [B, N, H]
    return u, chosen, step


class GatedNorm(nn.Module):
    """`rms(y silu(z)) scale`, the mean square taken over the channels of each group.

    Attributes:
      groups: of channels; 1 takes it over all.
      epsilon: added to the mean square.
    """

    groups: int = 1
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, y: Float[Array, "b n i"], z: Float[Array, "b n i"]) -> Float[Array, "b n i"]:
        """Gates and normalises in float32, and returns the dtype of the gate."""
        gated = y * jax.nn.silu(z.astype(y.dtype))
        parts = gated.reshape(*y.shape[:-1], self.groups, -1)  # [B, N, G, I / G]
        parts = parts * jax.lax.rsqrt(jnp.mean(parts**2, axis=-1, keepdims=True) + self.epsilon)
        ones = named(nn.initializers.ones_init(), ("mlp",))
        scale = self.param("scale", ones, y.shape[-1:], jnp.float32).astype(y.dtype)
        return (parts.reshape(y.shape) * scale[None, None]).astype(z.dtype)


def dual_scan(
    x: Float[Array, "b n h p"],
    dt: Float[Array, "b n h"],
    A: Float[Array, " h"],
    B: Float[Array, "b n g s"],
    C: Float[Array, "b n g s"],
    hidden: Float[Array, "b h p s"],
    first: Bool[Array, "b n"] | None = None,
    chunk: int = 256,
) -> tuple[Float[Array, "b n h p"], Float[Array, "b h p s"]]:
    """`h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T` and `y_t = h_t C_t`, chunk by chunk.

    Args:
      x: inputs.
      dt: step sizes, positive; a token with step size 0 leaves the state as it is.
      A: rates, negative.
      B: what each token writes with; `h / g` heads share it.
      C: what each token reads with.
      hidden: state before the first token.
      first: tokens before which the state is emptied.
      chunk: tokens of one product.

    Returns:
      The outputs, and the state after the last token.
    """
    (b, n, heads, p), (g, s) = x.shape, B.shape[2:]
    chunk, shared = min(chunk, n), heads // g

    def cut(a: Array, *axes: int) -> Array:  # [B, N, ...] to [N / chunk, B, *axes, chunk, ...]
        padding = [(0, 0), (0, -n % chunk), *[(0, 0)] * (a.ndim - 2)]
        a = jnp.pad(a, padding).reshape(b, -1, chunk, *axes, *a.shape[3:])
        return jnp.moveaxis(jnp.moveaxis(a, 2, 2 + len(axes)), 1, 0)

    def one(hidden: Array, slices: tuple[Array, Array, Array, Array, Any]) -> tuple[Array, Array]:
        x, dt, B, C, first = slices  # [B, G, R, Q, P], [B, G, R, Q], [B, G, Q, S], [B, G, Q, S], [B, Q]
        past = jnp.cumsum(dt * A.reshape(1, g, shared, 1), axis=-1)  # [B, G, R, Q], logarithms
        inherited, left = jnp.exp(past), jnp.exp(past[..., -1:] - past)  # [B, G, R, Q]
        seen = jnp.tril(jnp.ones((chunk, chunk), bool))[None, None, None]  # [1, 1, 1, Q, K]
        if first is not None:
            document = jnp.cumsum(first, axis=1)  # [B, Q], 0 is the one that began in an earlier chunk
            inherited = jnp.where((document == 0)[:, None, None], inherited, 0.0)
            left = jnp.where((document == document[:, -1:])[:, None, None], left, 0.0)
            seen = seen & (document[:, :, None] == document[:, None, :])[:, None, None]
        # Masked before the exponential, which of later tokens could be infinite, and its gradient no number.
        discount = jnp.exp(jnp.where(seen, past[..., :, None] - past[..., None, :], -jnp.inf))
        scores = jnp.einsum("bgqs,bgks->bgqk", C, B)
        x = x * dt[..., None]
        y = jnp.einsum("bgrqk,bgrkp->bgrqp", scores[:, :, None] * discount, x)
        y = y + jnp.einsum("bgqs,bgrps->bgrqp", C, hidden) * inherited[..., None]
        written = jnp.einsum("bgrkp,bgks->bgrps", x * left[..., None], B)
        return hidden * inherited[..., -1, None, None] + written, y

    slices = (
        cut(x, g, shared),
        cut(dt, g, shared),
        cut(B, g),
        cut(C, g),
        None if first is None else cut(first),
    )
    hidden = hidden.reshape(b, g, shared, p, s)
    if chunk == n:
        hidden, y = one(hidden, jax.tree.map(lambda a: a[0], slices))
        y = y[None]
    else:
        hidden, y = jax.lax.scan(jax.checkpoint(one), hidden, slices)  # y [N / chunk, B, G, R, chunk, P]
    y = jnp.moveaxis(y, (0, 4), (1, 2)).reshape(b, -1, heads, p)[:, :n]
    return y, hidden.reshape(b, heads, p, s)


def _log_uniform(low: float, high: float) -> Any:
    """Logarithms of numbers that are spread evenly."""

    def init(key: Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
        return jnp.log(jax.random.uniform(key, shape, dtype, low, high))

    return init
