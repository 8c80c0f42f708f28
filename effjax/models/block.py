"""The pre-norm residual block of vision transformers.

    x <- x + drop(s_1 * mixer(norm(x)))
    x <- x + drop(s_2 * ffn(norm(x)))                                    Dosovitskiy et al. 2021, eqs. 2 and 3

`drop` is stochastic depth and `s` an optional learned scale a channel (LayerScale, Touvron et al. 2021).
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax import ffn, mixers
from effjax.config import part
from effjax.layers.dense import named
from effjax.layers.drop import drop_path
from effjax.layers.norms import layer_norm
from effjax.mixers.context import Context


class Block(nn.Module):
    """One mixer and one FFN, each behind a layer norm and a residual connection.

    Attributes:
      mixer: how tokens mix.
      ffn: how channels mix.
      epsilon: of both layer norms.
      dropout: rate of ordinary dropout on both branches.
      layer_scale: initial value of the channel scales; None leaves them out.
    """

    mixer: nn.Module = part(mixers.KINDS)
    ffn: nn.Module = part(ffn.KINDS)
    epsilon: float = 1e-6
    dropout: float = 0.0
    layer_scale: float | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n c"], drop_rate: Float[Array, ""], context: Context, train: bool = False
    ) -> tuple[Float[Array, "b n c"], None]:
        """Returns `(x, None)`; `drop_rate` is this layer's stochastic depth."""
        h = self.mixer(layer_norm(self.epsilon, name="mixer_norm")(x), context, train=train)  # [B, N, C]
        x = x + self._branch(h, drop_rate, "mixer_scale", train)
        h = self.ffn(layer_norm(self.epsilon, name="ffn_norm")(x), train=train)  # [B, N, C]
        x = x + self._branch(h, drop_rate, "ffn_scale", train)
        return nn.with_logical_constraint(x, ("batch", "length", "features")), None

    @nn.nowrap
    def _branch(
        self, h: Float[Array, "b n c"], drop_rate: Float[Array, ""], name: str, train: bool
    ) -> Float[Array, "b n c"]:
        if self.layer_scale is not None:
            init = named(nn.initializers.constant(self.layer_scale), ("norm",))
            h = h * self.param(name, init, (h.shape[-1],), jnp.float32).astype(h.dtype)[None, None, :]
        if self.dropout:
            h = nn.Dropout(self.dropout, deterministic=not train)(h)
        if train and self.has_rng("dropout"):
            h = drop_path(h, drop_rate, self.make_rng("dropout"))
        return h
