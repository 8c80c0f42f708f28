"""One step of the iterative shrinkage-thresholding algorithm, as a layer that makes tokens sparse.

    y = relu(x + eta D^T (x - D x) - eta lambda)

for every token x, with a square dictionary D. It is one proximal gradient step, begun at a = x, on

    1/2 |x - D a|^2 + lambda |a|_1,    a >= 0

so that its output takes the place of its input: there is no residual connection around it.

Source: White-Box Transformers via Sparse Rate Reduction, Yu et al. 2023, equation 17.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.layers.dense import named

_kaiming = nn.initializers.variance_scaling(2.0, "fan_in", "uniform")


class ISTA(nn.Module):
    """A sparse code of each token; two products with one matrix.

    Attributes:
      step: eta, the length of the step.
      threshold: lambda, what sparsity is worth.
    """

    step: float = 0.1
    threshold: float = 0.1

    @nn.compact
    def __call__(self, x: Float[Array, "*batch c"], train: bool = False) -> Float[Array, "*batch c"]:
        """Takes the step."""
        width = x.shape[-1]
        kernel = self.param("kernel", named(_kaiming, ("embed", "mlp")), (width, width), jnp.float32)
        x, kernel = nn.dtypes.promote_dtype(x, kernel)  # the kernel is D^T: x D^T for a row x
        error = x - x @ kernel  # [..., C]
        return jax.nn.relu(x + self.step * (error @ kernel.T) - self.step * self.threshold)
