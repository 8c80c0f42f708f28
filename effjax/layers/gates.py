"""What a whole map says about its channels.

squeeze and excite  y = x * sigmoid(relu(mean(x) W_1 + b_1) W_2 + b_2)        Hu et al. 2018, eqs. 2 to 4
global response     y = gamma * x * n + beta + x,                             Woo et al. 2023, eqs. 1 to 3
                    n_c = |x_c| / (mean_c |x_c| + epsilon),  |x_c| the Euclidean norm over all places
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.layers.dense import Dense, named, zeros


class SqueezeExcite(nn.Module):
    """A factor in (0, 1) a channel, from the mean over the map.

    Attributes:
      reduction: how many times fewer channels the hidden layer has.
    """

    reduction: int = 4

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Scales every channel."""
        hidden = max(x.shape[-1] // self.reduction, 1)
        mean = jnp.mean(x, (1, 2), keepdims=True)  # [B, 1, 1, C]
        h = jax.nn.relu(Dense(hidden, ("embed", None), name="squeeze")(mean))  # [B, 1, 1, C / r]
        return x * jax.nn.sigmoid(Dense(x.shape[-1], (None, "embed"), name="excite")(h))  # [B, H, W, C]


class GlobalResponseNorm(nn.Module):
    """Channels compete by how strongly they answer to the map as a whole.

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
