"""Mamba-2: a gated state space layer whose heads read and write like attention's.

    z, (x, B, C), dt = t W_gate, silu(conv(t W_in)), softplus(t W_dt + b_dt)            for every token t
    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,   y_t = h_t C_t + D x_t                 a head
    out = rms(y silu(z)) W_out

What stands between the projections is `effjax.mixers.duality`. Unlike in Mamba all of x, B, C and dt come
from the token in one step, and A is a number a head. A decoding step needs the last `width - 1` inputs of the
convolutions and a state of `I S` numbers, whatever came before.

Sources: Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured
State Space Duality", ICML 2024, section 7.1, figure 6; defaults and initial values of their code, where the
norm of several groups is taken over each.
"""

from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from effjax.layers.dense import Dense
from effjax.mixers.cached import Recurrent
from effjax.mixers.context import Context
from effjax.mixers.duality import Duality, GatedNorm, project
from effjax.mixers.mamba import existing
from effjax.mixers.selective import kept


@flax.struct.dataclass
class State:
    """What one Mamba-2 layer keeps of the tokens so far.

    The fields are annotated `Any` because the same class also carries their shapes and shardings.

    Attributes:
      inputs: `[B, width - 1, I]`, the last inputs of the convolution that makes x.
      chosen: `[B, width - 1, 2 G S]`, of the one that makes B and C.
      hidden: `[B, H, P, S]` float32, the state.
      written: `[]` int, tokens so far.
    """

    inputs: Any
    chosen: Any
    hidden: Any
    written: Any


AXES = State(
    inputs=("batch", None, "mlp"),
    chosen=("batch", None, None),
    hidden=("batch", "mlp", None, None),
    written=(),
)


class Mamba2(Recurrent, Duality):
    """A gated state space layer of heads, with the attributes of `Duality` and these.

    Attributes:
      inner: channels `I`; None means `expand` times the width.
      expand: inner channels where `inner` is not given.
      use_bias: biases on all projections.
      epsilon: of the norm before the output.
    """

    inner: int | None = None
    expand: float = 2.0
    use_bias: bool = False
    epsilon: float = 1e-5

    @nn.nowrap
    def init_cache(self, batch: int, slots: int, width: int, dtype: DTypeLike = jnp.float32) -> State:
        """Makes the state before the first token; its size does not depend on `slots`."""
        inner, heads, selected = self.sizes(width, self.expand, self.inner)
        return State(
            inputs=jnp.zeros((batch, self.width - 1, inner), dtype),
            chosen=jnp.zeros((batch, self.width - 1, selected), dtype),
            hidden=jnp.zeros((batch, heads, self.head, self.state), jnp.float32),
            written=jnp.zeros((), jnp.int32),
        )

    @nn.nowrap
    def cache_axes(self) -> State:
        """Names of the axes of a state."""
        return AXES

    @nn.compact
    def mix(
        self, x: Float[Array, "b n c"], context: Context, cache: State | None
    ) -> tuple[Float[Array, "b n c"], Any]:
        """Both views of a sequence: whole, or going on from a state."""
        b, n, c = x.shape
        inner, heads, selected = self.sizes(c, self.expand, self.inner)
        exists = existing(context)  # [B, N] or None
        u, chosen, step = project(x, inner, selected, heads, self.use_bias)  # [B, N, I | 2 G S | H]
        z = Dense(inner, ("embed", "mlp"), use_bias=self.use_bias, name="gate")(x)  # [B, N, I]
        u, chosen = kept(u, exists), kept(chosen, exists)
        before = cache or self.init_cache(b, 0, c, u.dtype)
        taps = jnp.concatenate([before.inputs.astype(u.dtype), u], axis=1)  # [B, width - 1 + N, I]
        others = jnp.concatenate([before.chosen.astype(u.dtype), chosen], axis=1)
        hidden = None if cache is None else cache.hidden
        y, hidden = self.recur(taps, others, step, hidden, context.segments, exists)  # [B, N, I] float32
        y = GatedNorm(self.groups, self.epsilon, name="norm")(y, z)  # [B, N, I]
        y = Dense(c, ("mlp", "embed"), use_bias=self.use_bias, name="output")(y)  # [B, N, C]
        if cache is None:
            return y, None
        left = State(
            taps[:, n:].astype(before.inputs.dtype),
            others[:, n:].astype(before.chosen.dtype),
            hidden,
            before.written + n,
        )
        return y, left
