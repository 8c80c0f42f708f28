"""One number, one key, one mean for each example of a batch.

Noise for sampling is drawn from a key of its own for each example, so a picture depends on its key alone:
not on the batch it was made in, nor on how the batch lies on devices.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Num, PRNGKeyArray, Shaped


def across(values: Shaped[Array, " b"], like: Shaped[Array, "b *rest"]) -> Shaped[Array, "b *ones"]:
    """Reshapes one number an example to `[B, 1, ..., 1]`, so that it multiplies `like`."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def look_up(table: np.ndarray, t: Int[Array, " b"], like: Num[Array, "b *rest"]) -> Float[Array, "b *ones"]:
    """Row `t` of a float64 table, as float32 `[B, 1, ..., 1]`."""
    return across(jnp.asarray(table, jnp.float32)[t], like)


def mean_of_each(
    x: Float[Array, "b *rest"], where: Bool[Array, "b *some"] | None = None
) -> Float[Array, " b"]:
    """Mean over everything but the batch, or over what counts of it; 0 where nothing does."""
    axes = tuple(range(1, x.ndim))
    if where is None:
        return jnp.mean(x, axis=axes)
    where = jnp.broadcast_to(where, x.shape)
    return jnp.sum(x, axis=axes, where=where) / jnp.maximum(jnp.sum(where, axis=axes), 1)


def example_keys(key: PRNGKeyArray, index: Int[Array, " b"]) -> Key[Array, " b"]:
    """One key for each example, from its number in the whole request."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


def example_noise(
    keys: Key[Array, " b"], step: Int[Array, ""] | int, shape: Sequence[int]
) -> Float[Array, "b *shape"]:
    """Standard normal noise of `shape` for each example at one step of a sampler."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, step), tuple(shape)))(keys)
