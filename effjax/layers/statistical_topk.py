"""Statistical top-k: about the k largest entries, found by mean and spread instead of by sorting.

    theta = mean(x) + std(x) Q(1 - k/d),     y = max(x - theta, 0)

Q is the quantile function of the standard normal distribution: of d independent normal entries k are
expected above theta, give or take sqrt(k (1 - k/d)). k = d has no quantile; it means that no threshold is
drawn, and so does every k that is not less than the entries there are.

You et al., "Spark Transformer: Reactivating Sparsity in FFN and Attention", NeurIPS 2025, arXiv:2506.06644,
section 3. Its std, whether by d or d - 1, could not be read; here it is by d, as in the published Gemma 3n,
which has the same threshold.
"""

import statistics

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from effjax.errors import UsageError


def threshold(x: Float[Array, "*batch d"], k: int) -> Float[Array, "*batch 1"]:
    """theta, in float32 at least.

    Raises:
      UsageError: for a k that is not from 1 to below d.
    """
    count = x.shape[-1]
    if not 1 <= k < count:
        raise UsageError(f"k={k} of {count} entries has no threshold: choose from 1 to {count - 1}.")
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    quantile = statistics.NormalDist().inv_cdf(1 - k / count)
    return jnp.mean(wide, axis=-1, keepdims=True) + quantile * jnp.std(wide, axis=-1, keepdims=True)


def soft_top_k(x: Float[Array, "*batch d"], k: int) -> Float[Array, "*batch d"]:
    """y above: what the largest entries exceed theta by, and 0. `k = d` returns `x` as it is."""
    if k == x.shape[-1]:
        return x
    theta = threshold(x, k)
    return jnp.maximum(x.astype(theta.dtype) - theta, 0).astype(x.dtype)


def among(x: Float[Array, "*batch d"], allowed: Bool[Array, "*#batch d"], k: int) -> Bool[Array, "*batch d"]:
    """Which allowed entries are not below the theta of these; all, where there are not more than k.

    The largest always is among them, so that something is even where entries are as far from normal as equal
    ones are.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    count = jnp.sum(allowed, axis=-1, keepdims=True)
    entries = jnp.maximum(count, 1)
    mean = jnp.sum(jnp.where(allowed, wide, 0), axis=-1, keepdims=True) / entries
    variance = jnp.sum(jnp.where(allowed, jnp.square(wide - mean), 0), axis=-1, keepdims=True) / entries
    share = jnp.clip(k / entries, 1e-6, 1 - 1e-6).astype(wide.dtype)
    theta = mean - jnp.sqrt(variance) * jax.scipy.special.ndtri(share)  # Q(1 - p) = -Q(p)
    largest = jnp.max(jnp.where(allowed, wide, -jnp.inf), axis=-1, keepdims=True)
    return allowed & ((wide >= jnp.minimum(theta, largest)) | (count <= k))
