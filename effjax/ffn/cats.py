"""CATS: the gated perceptron without the neurons whose gate is small.

    y = (c_t(silu(x W_gate)) * (x W_expand)) W_contract,     c_t(z) = z where |z| >= t, else 0

The threshold t of each layer is no parameter but measured: `effjax.compress.cats` makes a trained model into
one of these. With t = 0 it is `effjax.ffn.gated` to the bit. Which columns of W_expand and rows of W_contract
a token needs is known once the gate is, so that at decoding 2/3 of the weights are read only in part:
`effjax.ffn.active`.

Lee, Lee, Zhang, Tiwari and Mirhoseini, "CATS: Contextually-Aware Thresholding for Sparsity in Large Language
Models", COLM 2024, arXiv:2404.08763, section 3.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.ffn.active import Implementation, perceptron
from effjax.layers.activations import activation


class CATS(nn.Module):
    """A gated perceptron with a threshold on its gate.

    The threshold is the variable `threshold` of the collection `thresholds`. Whoever makes the collection
    `magnitudes` mutable is told |activation(x W_gate)| of every neuron before the threshold, as the upper 16
    bits of its float32.

    Attributes:
      hidden: number of neurons.
      activation: of the gate, a name in `effjax.layers.activations`.
      by_rows: whether every matrix has a row a neuron, for decoding: see `effjax.ffn.active`.
      implementation: of the step that reads the rows of active neurons: see there too.
    """

    hidden: int
    activation: str = "silu"
    by_rows: bool = False
    implementation: Implementation = "plain"

    @nn.compact
    def __call__(self, x: Float[Array, "*batch c"], train: bool = False) -> Float[Array, "*batch c"]:
        """Mixes the channels of each token."""
        threshold = self.variable("thresholds", "threshold", jnp.zeros, (), jnp.float32).value

        def sparse(products: Float[Array, "*batch f"]) -> Float[Array, "*batch f"]:
            gate = activation(self.activation)(products)
            size = jnp.abs(gate.astype(jnp.float32))
            if self.is_mutable_collection("magnitudes") and not self.is_initializing():
                bits = jax.lax.bitcast_convert_type(size, jnp.uint32) >> 16
                self.sow("magnitudes", "sizes", bits.astype(jnp.uint16))
            return jnp.where(size >= threshold, gate, 0)

        return perceptron(
            x,
            x,
            sparse,
            hidden=self.hidden,
            width=x.shape[-1],
            by_rows=self.by_rows,
            train=train,
            implementation=self.implementation,
        )
