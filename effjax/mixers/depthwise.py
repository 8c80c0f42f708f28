"""Depthwise convolution as a mixer: every channel mixes its neighbourhood by a kernel of its own.

    y[b, i, j, c] = sum_uv x[b, i + u - r, j + v - r, c] K[u, v, c] + bias[c],    r = floor(k / 2)

The first layer of a ConvNeXt block, with k = 7: A ConvNet for the 2020s, Liu et al. 2022, section 2.5.
"""

import flax.linen as nn
from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.layers.depthwise import DepthwiseConv, Implementation
from effjax.mixers.context import Context


class Depthwise(nn.Module):
    """A depthwise convolution of odd side; zeros lie beyond the edges.

    Attributes:
      kernel: side k of the kernel.
      use_bias: whether to add a bias a channel.
      implementation: of the convolution, as `effjax.layers.depthwise` has it.
    """

    kernel: int = 7
    use_bias: bool = True
    implementation: Implementation = "plain"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel % 2 == 0:
            raise UsageError(f"kernel={self.kernel} has no middle: a mixer needs an odd side.")

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], context: Context, train: bool = False
    ) -> Float[Array, "b h w c"]:
        """Mixes every place with its neighbours."""
        conv = DepthwiseConv(
            self.kernel, use_bias=self.use_bias, implementation=self.implementation, name="conv"
        )
        return conv(x)  # [B, H, W, C]
