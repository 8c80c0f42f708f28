"""Global response normalisation: channels compete by how strongly they answer to the map as a whole.

    y = gamma * x * n + beta + x,  n_c = |x_c| / (mean_c |x_c| + epsilon)

with |x_c| the Euclidean norm of channel c over all places.

Source: ConvNeXt V2, Woo et al. 2023, section 3.2, equations 1 to 3 and algorithm 1.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.layers.dense import named, zeros


class GlobalResponseNorm(nn.Module):
    """A factor a channel, from all places and all channels.

    Attributes:
      use_bias: whether beta is added.
      epsilon: added to the mean of the norms.
    """

    use_bias: bool = True
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Rescales every channel by its own norm over the mean of all."""
        shape = 1, 1, 1, x.shape[-1]
        scale = self.param("scale", named(zeros, ("mlp",)), shape[-1:], jnp.float32).astype(x.dtype)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        squared = jnp.sum(wide**2, (1, 2), keepdims=True)  # [B, 1, 1, C]
        # A map of zeros, where the root has no slope, keeps a finite gradient.
        size = jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)
        response = size / (jnp.mean(size, -1, keepdims=True) + self.epsilon)  # [B, 1, 1, C]
        y = x * (1 + scale.reshape(shape) * response.astype(x.dtype))  # [B, H, W, C]
        if self.use_bias:
            bias = self.param("bias", named(zeros, ("mlp",)), shape[-1:], jnp.float32)
            y = y + bias.astype(x.dtype).reshape(shape)
        return y
