"""Multi-head convolutional attention: a convolution apart in every head, and a projection across them.

    y = relu(norm(K * x)) W,    K of 3 x 3 places in groups of `head_dim` channels

Source: Li et al. 2022, "Next-ViT: Next Generation Vision Transformer for Efficient Deployment in Realistic
Industrial Scenarios", equations 2 to 4.
"""

import flax.linen as nn
from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.layers.activations import activation
from effjax.layers.conv import Conv
from effjax.layers.dense import Dense
from effjax.layers.norms import norm
from effjax.mixers.context import Context


class MultiHeadConv(nn.Module):
    """A grouped convolution as a mixer.

    Attributes:
      head_dim: channels of a head.
      activation: a name in `effjax.layers.activations`.
      epsilon: of the batch norm.
    """

    head_dim: int = 32
    activation: str = "relu"
    epsilon: float = 1e-5

    @nn.compact
    def __call__(
        self, x: Float[Array, "b height width c"], context: Context, train: bool = False
    ) -> Float[Array, "b height width c"]:
        """Mixes the places.

        Raises:
          UsageError: where heads do not tile the channels.
        """
        channels = x.shape[-1]
        if channels % self.head_dim:
            raise UsageError(f"heads of {self.head_dim} channels do not tile the width {channels}.")
        h = Conv(channels, groups=channels // self.head_dim, use_bias=False, name="conv")(x)  # [B, H, W, C]
        h = norm("batch", self.epsilon, "norm", train=train)(h)
        h = activation(self.activation)(h)
        return Dense(channels, (None, "embed"), use_bias=False, name="project")(h)  # [B, H, W, C]
