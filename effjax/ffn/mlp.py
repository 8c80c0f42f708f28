"""The two-layer perceptron.

y = activation(x W_1 + b_1) W_2 + b_2                                  Vaswani et al. 2017, eq. 2
"""

import flax.linen as nn
from jaxtyping import Array, Float

from effjax.layers.activations import activation
from effjax.layers.axes import constrain
from effjax.layers.dense import Dense


class MLP(nn.Module):
    """Expands the channels, applies an activation, projects back.

    Attributes:
      hidden: channels between the two layers; None means `ratio` times the width.
      ratio: expansion where `hidden` is not given.
      activation: a name in `effjax.layers.activations`.
      use_bias: biases on both layers.
    """

    hidden: int | None = None
    ratio: float = 4.0
    activation: str = "gelu"
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*batch c"], train: bool = False) -> Float[Array, "*batch c"]:
        """Mixes the channels of each token."""
        width = x.shape[-1]
        hidden = self.hidden or round(width * self.ratio)
        h = Dense(hidden, ("embed", "mlp"), use_bias=self.use_bias, name="expand")(x)  # [..., F]
        h = activation(self.activation)(h)
        h = constrain(h, "mlp")
        return Dense(width, ("mlp", "embed"), use_bias=self.use_bias, name="contract")(h)  # [..., C]
