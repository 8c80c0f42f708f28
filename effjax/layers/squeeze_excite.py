"""Squeeze and excitation: every channel is weighed by what the whole map holds.

    y = x * gate(W_2 activation(W_1 mean_hw(x) + b_1) + b_2)

Source: Hu et al. 2018, "Squeeze-and-Excitation Networks", section 3.
"""

from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.layers.activations import activation
from effjax.layers.dense import Dense


class SqueezeExcite(nn.Module):
    """A gate for each channel of a map.

    Attributes:
      ratio: channels between the two projections, as a share of those of the map.
      hidden: the same as a number; None takes the ratio.
      activation: between the projections, a name in `effjax.layers.activations`.
      gate: what bounds the weights.
    """

    ratio: float = 0.25
    hidden: int | None = None
    activation: str = "relu"
    gate: Literal["sigmoid", "hard_sigmoid"] = "sigmoid"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Weighs the channels."""
        channels = x.shape[-1]
        hidden = self.hidden or max(1, round(channels * self.ratio))
        pooled = jnp.mean(x, (1, 2), keepdims=True)  # [B, 1, 1, C]
        h = Dense(hidden, ("embed", "mlp"), name="reduce")(pooled)  # [B, 1, 1, F]
        h = activation(self.activation)(h)
        weights = Dense(channels, ("mlp", "embed"), name="expand")(h)  # [B, 1, 1, C]
        return x * activation(self.gate)(weights)
