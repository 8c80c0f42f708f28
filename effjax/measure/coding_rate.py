"""How many nats tokens take: coding rates of a set of vectors, and how sparse they are.

    R(Z)         = 1/2 logdet(I + d / (N eps^2) Z^T Z)
    R^c(Z | U)   = sum_k 1/2 logdet(I + p / (N eps^2) (Z U_k)^T (Z U_k))

for N vectors of d numbers, to a precision of eps, freely or in K subspaces with bases `U_k [d, p]`. A
representation is good where `R - R^c - lambda |Z|_0` is large: spread out as a whole, compact in its
subspaces, and sparse.

Source: White-Box Transformers via Sparse Rate Reduction, Yu et al. 2023, equations 1, 7 and 8.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def coding_rate(z: Float[Array, "n d"], epsilon: float = 0.5) -> Float[Array, ""]:
    """R(Z) in nats, of `n` vectors to a precision of `epsilon`, by the smaller of the two Gram matrices."""
    n, d = z.shape
    gram = z.T @ z if d <= n else z @ z.T
    return 0.5 * jnp.linalg.slogdet(jnp.eye(len(gram), dtype=z.dtype) + d / (n * epsilon**2) * gram)[1]


def subspace_coding_rate(
    z: Float[Array, "n d"], bases: Float[Array, "d k p"], epsilon: float = 0.5
) -> Float[Array, ""]:
    """R^c(Z | U) in nats: the rates of what lies in each of `k` subspaces, summed.

    Args:
      z: vectors.
      bases: one basis a subspace, laid out as `SubspaceAttention` has them.
      epsilon: the precision.
    """
    parts = jnp.einsum("nd,dkp->knp", z, bases)
    return jnp.sum(jax.vmap(lambda part: coding_rate(part, epsilon))(parts))


def density(z: Float[Array, "*shape"]) -> Float[Array, ""]:
    """The share of numbers that are not zero: |Z|_0 / (N d)."""
    return jnp.mean((z != 0).astype(jnp.float32))
