"""Routers: from a token to a number for every expert.

    linear    s = x W                                                     Shazeer et al. 2017
    cosine    s_e = cos(x W + b, m_e) / tau,   tau >= 0.01 learned        Hwang et al. 2022, Tutel

The cosine router does not see how long a token is: a few long ones cannot drive it, and neither can a router
grow sharper by growing. Its width, 256, and tau, 0.5 at first, are those of Tutel's code.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.layers.dense import Dense, named, xavier


class Linear(nn.Module):
    """One matrix."""

    @nn.compact
    def __call__(self, tokens: Float[Array, "t c"], experts: int) -> Float[Array, "t e"]:
        """Returns the logits of all experts."""
        shape = tokens.shape[-1], experts
        kernel = self.param("kernel", named(xavier, ("embed", "expert")), shape, jnp.float32)
        tokens, kernel = nn.dtypes.promote_dtype(tokens, kernel)
        return tokens @ kernel


class Cosine(nn.Module):
    """The angle between a projection of the token and a direction of each expert.

    Attributes:
      width: of the projection.
      temperature: tau at first.
      coldest: what tau does not fall below.
    """

    width: int = 256
    temperature: float = 0.5
    coldest: float = 0.01

    @nn.compact
    def __call__(self, tokens: Float[Array, "t c"], experts: int) -> Float[Array, "t e"]:
        """Returns the logits of all experts, in float32."""
        wide = jnp.promote_types(tokens.dtype, jnp.float32)
        x = Dense(self.width, ("embed", None), name="project")(tokens).astype(wide)  # [T, W]
        init = named(nn.initializers.normal(0.01), (None, "expert"))
        directions = self.param("directions", init, (self.width, experts), jnp.float32).astype(wide)
        init = named(nn.initializers.constant(-math.log(self.temperature)), (None,))
        scale = jnp.asarray(self.param("log_scale", init, (1,), jnp.float32)).astype(wide)
        scale = jnp.exp(jnp.minimum(scale, -math.log(self.coldest)))  # [1]
        return unit(x, -1) @ unit(directions, 0) * scale[None]  # [T, E]


def unit(x: Float[Array, "a b"], axis: int) -> Float[Array, "a b"]:
    """Vectors along an axis brought to length one; zero stays zero."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=axis, keepdims=True), 1e-24))


KINDS = {"linear": Linear, "cosine": Cosine}
