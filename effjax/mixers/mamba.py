"""Mamba: a selective state space, whose step size, input and output depend on the token.

    u = silu(conv(x W_in + b_in)),   z = x W_gate + b_gate
    (r, B, C) = u W_select,          dt = softplus(r W_dt + b_dt)
    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t,     A = -exp(A_log)
    y_t = C_t h_t + D u_t,           out = (y silu(z)) W_out + b_out

Gu and Dao 2023, section 3.2 and figure 3; what stands between `u` and `y` is `effjax.mixers.selective`. A
step needs the last `width - 1` inputs of the convolution and the state, whose size does not depend on how
many tokens there were.
"""

import math
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float

from effjax.layers.dense import Dense
from effjax.mixers.cached import Recurrent
from effjax.mixers.context import Context
from effjax.mixers.selective import Selective, kept


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


class Mamba(Recurrent, Selective):
    """A gated selective state space layer, with the attributes of `Selective` and these.

    Attributes:
      inner: channels `I`; None means `expand` times the width.
      expand: inner channels where `inner` is not given.
      use_bias: biases on the input, gate and output projections.
      activation: of convolution and gate; the paper's is the only one.
    """

    inner: int | None = None
    expand: float = 2.0
    use_bias: bool = False
    activation: Literal["silu"] = "silu"

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
        inner, rank = self.sizes(c)
        exists = existing(context)  # [B, N] or None
        axes = ("embed", "mlp")
        u = kept(Dense(inner, axes, use_bias=self.use_bias, name="input")(x), exists)  # [B, N, I]
        z = Dense(inner, axes, use_bias=self.use_bias, name="gate")(x)  # [B, N, I]
        past = jnp.zeros((b, self.width - 1, inner), u.dtype) if cache is None else cache.inputs
        taps = jnp.concatenate([past.astype(u.dtype), u], axis=1)  # [B, width - 1 + N, I]
        before = None if cache is None else cache.hidden
        y, hidden = self.recur(taps, rank, before, context.segments, exists)  # [B, N, I], [B, I, S]
        y = y.astype(x.dtype) * jax.nn.silu(z)  # [B, N, I]
        y = Dense(c, ("mlp", "embed"), use_bias=self.use_bias, name="output")(y)  # [B, N, C]
        if cache is None:
            return y, None
        return y, State(taps[:, n:].astype(cache.inputs.dtype), hidden, cache.written + n)


def existing(context: Context) -> Bool[Array, "b n"] | None:
    """Which tokens are no padding; None where all exist."""
    if context.valid is not None:
        return context.valid
    if context.segments is not None:
        return context.segments > 0
    return None if context.positions is None else context.positions >= 0
