"""Density peaks: the tokens that stand for all others, one for each crowd.

    rho_i = exp(-mean of |x_i - x_j|^2 / C over the k nearest of i)
    delta_i = min_{j denser than i} |x_i - x_j| / sqrt(C),  of the densest the largest distance there is
    the tokens of largest rho_i delta_i are kept

A token of high score lies in a crowd and far from every denser one. The published code counts a token as its
own nearest, which `neighbours` here does too, and breaks ties of density by noise; here the earlier is the
denser, so equal inputs give equal choices.

Sources: Rodriguez and Laio, "Clustering by fast search and find of density peaks", Science 2014; Du et al.,
"Study on density peaks clustering based on k-nearest neighbors and principal component analysis", 2016; as
it selects frames in Li et al., "Hourglass Tokenizer for Efficient Transformer-Based 3D Human Pose
Estimation", CVPR 2024, section 3.3.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.errors import UsageError


def density_peaks(x: Float[Array, "b n c"], keep: int, neighbours: int) -> Int[Array, "b m"]:
    """Places of the `keep` tokens of highest score, in their order; no gradient.

    Raises:
      UsageError: where there are fewer tokens than shall be kept, or than neighbours are looked at.
    """
    count = x.shape[1]
    if not 1 <= keep <= count:
        raise UsageError(f"keep={keep} of {count} tokens cannot be kept.")
    if not 1 <= neighbours <= count:
        raise UsageError(f"neighbours={neighbours} are not there: there are {count} tokens.")
    scores = peak_scores(x, neighbours)  # [B, N]
    return jnp.sort(jax.lax.top_k(scores, keep)[1], axis=-1)


def peak_scores(x: Float[Array, "b n c"], neighbours: int) -> Float[Array, "b n"]:
    """rho_i delta_i of every token."""
    squares = squared_distances(jax.lax.stop_gradient(x)) / x.shape[-1]  # [B, N, N]
    nearest = -jax.lax.top_k(-squares, neighbours)[0]  # [B, N, k]
    density = jnp.exp(-jnp.mean(nearest, axis=-1))  # [B, N]
    here, there = density[:, :, None], density[:, None, :]
    earlier = jnp.tri(x.shape[1], k=-1, dtype=bool)[None]  # of row and column the column
    denser = (there > here) | ((there == here) & earlier)  # [B, N, N]
    largest = jnp.max(squares, axis=(1, 2), keepdims=True)  # [B, 1, 1]
    delta = jnp.sqrt(jnp.min(jnp.where(denser, squares, largest), axis=-1))  # [B, N]
    return density * delta


def squared_distances(x: Float[Array, "b n c"]) -> Float[Array, "b n n"]:
    """|x_i - x_j|^2, through products of what is left without the mean, so that little cancels."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=1, keepdims=True)
    lengths = jnp.sum(x**2, axis=-1)  # [B, N]
    products = jax.lax.dot_general(x, x, (((2,), (2,)), ((0,), (0,))), precision="highest")  # [B, N, N]
    # Twice the products, the same in both directions to the last bit: two that are nearest to each other are
    # equally dense.
    doubled = products + jnp.swapaxes(products, 1, 2)  # [B, N, N]
    squares = jnp.maximum(lengths[:, :, None] + lengths[:, None, :] - doubled, 0.0)
    return jnp.where(jnp.eye(x.shape[1], dtype=bool)[None], 0.0, squares)
