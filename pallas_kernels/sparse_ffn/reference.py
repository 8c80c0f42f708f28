"""The gated perceptron of one token in plain JAX: the specification, and what runs without a kernel."""

import jax
import jax.numpy as jnp


def sparse_ffn(
    gate: jax.Array, x: jax.Array, expand: jax.Array, contract: jax.Array, *, active: int | None = None
) -> jax.Array:
    """All products, of which those with a gate of zero add nothing.

    Args:
      gate: `[F]`, of each neuron.
      x: `[V]`, what values are made of.
      expand: `[F, V]`, a row a neuron.
      contract: `[F, C]`, likewise.
      active: no matter.

    Returns:
      `[C]`, in the type of x.
    """
    del active
    value = jnp.dot(expand, x, preferred_element_type=jnp.float32)  # [F]
    h = (gate.astype(jnp.float32) * value).astype(jnp.result_type(x, contract))  # [F]
    return jnp.dot(h, contract, preferred_element_type=jnp.float32).astype(x.dtype)  # [C]
