"""Stochastic depth.

y = x + mask / (1 - rate) * branch,    mask ~ Bernoulli(1 - rate) for each example     Huang et al. 2016
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PRNGKeyArray


def drop_path(
    branch: Float[Array, "b *rest"], rate: Float[Array, ""] | float, key: PRNGKeyArray | Key[Array, ""]
) -> Float[Array, "b *rest"]:
    """Zeroes a residual branch for whole examples and scales the others so that its mean stays.

    Args:
      branch: output of the residual branch.
      rate: probability of dropping, in [0, 1); it may be traced, since a scan over depth gives each layer
        its own.
      key: randomness of this branch.
    """
    shape = (branch.shape[0],) + (1,) * (branch.ndim - 1)
    keep = 1.0 - jnp.asarray(rate, jnp.float32)
    scale = jax.random.bernoulli(key, keep, shape).astype(jnp.float32) / keep
    return branch * scale.astype(branch.dtype)


def stochastic_depth(
    module: nn.Module, branch: Float[Array, "b *rest"], rate: Float[Array, ""] | float, train: bool
) -> Float[Array, "b *rest"]:
    """`drop_path` with the randomness of a module, in training where it has some."""
    if not train or not module.has_rng("dropout"):
        return branch
    return drop_path(branch, rate, module.make_rng("dropout"))


def linear_rates(rate: float, depth: int) -> Float[Array, " depth"]:
    """Rates that grow linearly from 0 at the first layer to `rate` at the last, as DeiT and Swin set them."""
    return jnp.linspace(0.0, rate, depth, dtype=jnp.float32)
