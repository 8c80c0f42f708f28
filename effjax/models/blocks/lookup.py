"""Two sets of tokens: few that are worked on, and many that they look things up in.

    S = Q_p K_l^T / sqrt(d)                        p compressed tokens, l lookup tokens; the only scores
    z_p <- z_p + softmax_l(S) V_l                  gather
    z_p <- z_p + mixer(norm(z_p)),  z_p <- z_p + ffn(norm(z_p))
    z_l <- z_l + softmax_p(S^T) V_p                infuse, with what the compressed tokens have become
    z_l <- z_l + light(norm(z_l))                  a narrow perceptron

The same scores serve both directions: normalised over the lookup tokens on the way in, over the compressed
ones on the way out.

Source: Koner et al., "LookupViT: Compressing visual information to a limited number of tokens", ECCV 2024,
arXiv:2407.12753, section 3.
"""

import flax.linen as nn
from jaxtyping import Array, Float

from effjax import mixers
from effjax.config import part
from effjax.errors import UsageError
from effjax.ffn import KINDS as FFNS
from effjax.layers.axes import constrain
from effjax.layers.dense import Dense
from effjax.layers.drop import stochastic_depth
from effjax.layers.norms import norm
from effjax.mixers.context import Context
from effjax.mixers.dot_product import dot_products, softmax, weighted_sum

Pair = tuple[Array, Array]


class LookupBlock(nn.Module):
    """Gathers, works on the compressed tokens, and infuses.

    Attributes:
      heads: of the attention between the two sets.
      mixer: how the compressed tokens mix.
      ffn: how their channels mix.
      light: how the channels of the lookup tokens mix.
      epsilon: of the norms.
    """

    heads: int
    mixer: nn.Module = part(mixers.KINDS)
    ffn: nn.Module = part(FFNS)
    light: nn.Module = part(FFNS)
    epsilon: float = 1e-6

    @nn.compact
    def __call__(
        self, tokens: Pair, drop_rate: Float[Array, ""], context: Context, train: bool = False
    ) -> tuple[Pair, None]:
        """Maps compressed `[B, P, C]` and lookup tokens `[B, N, C]` to the same; returns None beside them."""
        p, fine = tokens
        width = p.shape[-1]
        if width % self.heads:
            raise UsageError(f"heads={self.heads} does not divide the width {width}.")

        def add(x: Array, branch: Array) -> Array:
            return constrain(x + stochastic_depth(self, branch, drop_rate, train))

        looked = self._norm("lookup_norm", fine)  # [B, N, C]
        q = self._heads("query", self._norm("gather_norm", p))  # [B, P, H, D]
        k, v = self._heads("key", looked), self._heads("value", looked)  # [B, N, H, D]
        scores = dot_products(q, k) * q.shape[-1] ** -0.5  # [B, H, P, N]
        p = add(p, self._output("output", softmax(scores), v))  # [B, P, C]
        p = add(p, self.mixer(self._norm("mixer_norm", p), context, train=train))
        p = add(p, self.ffn(self._norm("ffn_norm", p), train=train))
        v = self._heads("infuse_value", self._norm("infuse_norm", p))  # [B, P, H, D]
        fine = add(fine, self._output("infuse_output", softmax(scores.swapaxes(2, 3)), v))
        fine = add(fine, self.light(self._norm("light_norm", fine), train=train))
        return (p, fine), None

    @nn.nowrap
    def _norm(self, name: str, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        return norm("layer", self.epsilon, name)(x)

    @nn.nowrap
    def _heads(self, name: str, x: Float[Array, "b n c"]) -> Float[Array, "b n h d"]:
        head, axes = (self.heads, x.shape[-1] // self.heads), ("embed", "heads", "head_dim")
        return Dense(head, axes, name=name)(x)

    @nn.nowrap
    def _output(
        self, name: str, weights: Float[Array, "b h m n"], v: Float[Array, "b n h d"]
    ) -> Float[Array, "b m c"]:
        y = weighted_sum(weights.astype(v.dtype), v)  # [B, M, H, D]
        width = v.shape[2] * v.shape[3]
        return Dense(width, ("heads", "head_dim", "embed"), inputs=2, name=name)(y)
