"""The gated perceptron with weights for each modality: see `effjax.layers.modal`."""

import flax.linen as nn
from jaxtyping import Array, Float

from effjax.layers.activations import activation
from effjax.layers.modal import ModalDense, Modalities


class ModalGated(nn.Module):
    """`effjax.ffn.gated.Gated` without biases, with three matrices for each modality.

    Attributes:
      hidden: channels of each expansion.
      modalities: how many.
      activation: a name in `effjax.layers.activations`.
    """

    hidden: int
    modalities: int = 2
    activation: str = "silu"

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"], modality: Modalities) -> Float[Array, "b n c"]:
        """Mixes the channels of each token."""
        rows, sizes = modality.sort(x), modality.sizes  # [T, C]
        gate = ModalDense(self.hidden, self.modalities, ("embed", "mlp"), name="gate")(rows, sizes)
        value = ModalDense(self.hidden, self.modalities, ("embed", "mlp"), name="expand")(rows, sizes)
        h = activation(self.activation)(gate) * value  # [T, F]
        y = ModalDense(x.shape[-1], self.modalities, ("mlp", "embed"), name="contract")(h, sizes)
        return modality.restore(y)  # [B, N, C]
