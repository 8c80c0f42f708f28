"""The two-layer perceptron of fast convolutional networks, with a batch norm behind each layer.

y = N(relu(N(x W_1)) W_2),    the scale of the last N begins at zero        LeViT, Graham et al. 2021
"""

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from effjax.compress.merge import Fold, at, unchanged
from effjax.layers.conv import ConvNorm


class NormedMLP(nn.Module):
    """Expands the channels, applies an activation, projects back.

    Attributes:
      ratio: expansion.
      activation: a name in `effjax.layers.activations`.
      epsilon: of the batch norms.
      merged: whether they are part of the layers.
    """

    ratio: float = 2.0
    activation: str = "relu"
    epsilon: float = 1e-5
    merged: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool = False) -> Float[Array, "b h w c"]:
        """Mixes the channels of each place."""
        width = x.shape[-1]
        form = dict[str, Any](epsilon=self.epsilon, merged=self.merged)
        expand = ConvNorm(round(width * self.ratio), 1, activation=self.activation, name="expand", **form)
        return ConvNorm(width, 1, initial=0.0, name="contract", **form)(
            expand(x, train), train
        )  # [B, H, W, C]

    @nn.nowrap
    def merge(self) -> tuple["NormedMLP", Fold]:
        """The batch norms become part of the layers."""
        if self.merged:
            return self, unchanged
        fold = ConvNorm(epsilon=self.epsilon).merge()[1]
        return self.clone(merged=True), at(dict.fromkeys(("expand", "contract"), fold))
