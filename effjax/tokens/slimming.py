"""Token slimming: every new token is an average of all old ones, with weights that the tokens choose.

    A = softmax_N(s (W_q gelu(norm(x) W_k)^T)),   A in R^{M x N}, W_k in R^{C x C/2}, W_q in R^{M x C/2}
    x <- A x

`s = 1 / tau` is learned and starts at one. Rows of A sum to one, so that a constant field stays what it is,
and as the tokens alone choose, their order makes no difference. The class token is left aside. M is a part of
the parameters: a slimmed network has one schedule.

The reverse module makes one token for each of the N again, so that a teacher's tokens can be matched while
training; at test it is gone:

    y = W_2 gelu(W_1 norm(x) + b_1) + b_2,   W_1 in R^{4N x M}, W_2 in R^{N x 4N}
    x <- y + mlp(norm(y))

Source: Zong et al., "Self-slimmed Vision Transformer", ECCV 2022, arXiv:2111.12624, sections 3.2 and 3.3.
Norm, biases and the two-layer form of the reverse are those of the published code (models/lvvit.py), with
which its figures were made.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax import ffn
from effjax.errors import UsageError
from effjax.layers.activations import gelu
from effjax.layers.axes import constrain
from effjax.layers.dense import Dense, named
from effjax.layers.norms import norm
from effjax.mixers.dot_product import softmax
from effjax.tokens.assignment import Mixture, apply
from effjax.tokens.tokens import Tokens


class Slimming(nn.Module):
    """M weighted averages of the tokens between the ends: an entry of a schedule.

    Attributes:
      count: M.
      ratio: channels between the two projections, as a share of the width.
      epsilon: of the norm.
    """

    count: int
    ratio: float = 0.5
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, tokens: Tokens, train: bool) -> Tokens:
        """Slims the bag; the new tokens share its size evenly.

        Raises:
          UsageError: where there are fewer tokens than asked for.
        """
        if not 0 < self.count <= tokens.count:
            raise UsageError(f"slimming to count={self.count} tokens: there are {tokens.count}.")
        return apply(Mixture(self._weights(tokens.inner(tokens.x))), tokens, proportional=False)

    @nn.nowrap
    def _weights(self, x: Float[Array, "b n c"]) -> Float[Array, "b m n"]:
        """A, in float32."""
        hidden = int(x.shape[-1] * self.ratio)
        h = norm("layer", self.epsilon, "norm")(x)  # [B, N, C]
        h = gelu(Dense(hidden, ("embed", "mlp"), name="hidden")(h))  # [B, N, C/2]
        scores = Dense(self.count, ("mlp", None), name="scores")(h)  # [B, N, M]
        scale = self.param("scale", named(nn.initializers.ones, ()), (), jnp.float32)
        return softmax((scores.astype(jnp.float32) * scale.astype(jnp.float32)).swapaxes(1, 2))  # [B, M, N]


class Recalibration(nn.Module):
    """The reverse: as many tokens as there were before slimming.

    Attributes:
      ratio: hidden width of both perceptrons, in tokens and in channels.
      epsilon: of the norms.
    """

    ratio: float = 4.0
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "b m c"], count: int) -> Float[Array, "b n c"]:
        """Makes `count` tokens of the slimmed ones."""
        h = norm("layer", self.epsilon, "token_norm")(x).swapaxes(1, 2)  # [B, C, M]
        h = gelu(Dense(int(count * self.ratio), (None, "mlp"), name="expand")(h))  # [B, C, 4 N]
        y = constrain(Dense(count, ("mlp", None), name="contract")(h).swapaxes(1, 2))  # [B, N, C]
        mix = ffn.MLP(ratio=self.ratio, name="ffn")
        return y + mix(norm("layer", self.epsilon, "ffn_norm")(y))
