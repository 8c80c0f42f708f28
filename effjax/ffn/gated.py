"""The gated perceptron; with `silu` it is SwiGLU.

y = (activation(x W_gate) * (x W_expand)) W_contract                  Shazeer 2020, eq. 6
"""

import flax.linen as nn
from jaxtyping import Array, Float

from effjax.layers.activations import activation
from effjax.layers.axes import constrain
from effjax.layers.dense import Dense


class Gated(nn.Module):
    """Two expansions multiplied, one of them through an activation, then the projection back.

    Attributes:
      hidden: channels of each expansion.
      activation: a name in `effjax.layers.activations`.
      use_bias: biases on all three layers.
    """

    hidden: int
    activation: str = "silu"
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*batch c"], train: bool = False) -> Float[Array, "*batch c"]:
        """Mixes the channels of each token."""
        gate = Dense(self.hidden, ("embed", "mlp"), use_bias=self.use_bias, name="gate")(x)  # [..., F]
        value = Dense(self.hidden, ("embed", "mlp"), use_bias=self.use_bias, name="expand")(x)  # [..., F]
        h = activation(self.activation)(gate) * value
        h = constrain(h, "mlp")
        return Dense(x.shape[-1], ("mlp", "embed"), use_bias=self.use_bias, name="contract")(h)  # [..., C]
