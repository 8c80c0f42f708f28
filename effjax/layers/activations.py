"""Activations by the name a config gives them."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.errors import UsageError, did_you_mean


@jax.custom_jvp
def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x P(X < x) for a standard normal X: Hendrycks and Gimpel 2016.

        y = x (1 + erf(x / sqrt(2))) / 2,    dy/dx = y / x + x exp(-x^2 / 2) / sqrt(2 pi)

    Computed in float32 at least, where it is as exact as the form with erfc (both are within three units in
    the last place of x) and takes a CPU 0.4 of the time. The backward pass keeps the slope alone; the formula
    differentiated as it stands would keep four arrays.
    """
    return _gelu_and_slope(x)[0]


@gelu.defjvp
def _gelu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    y, slope = _gelu_and_slope(*primals)
    return y, tangents[0] * slope


def _gelu_and_slope(x: Float[Array, "*shape"]) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    below = 0.5 + 0.5 * jax.lax.erf(wide * math.sqrt(0.5))
    density = jnp.exp(-0.5 * wide * wide) * (2 * math.pi) ** -0.5
    return (wide * below).astype(x.dtype), (below + wide * density).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jax.nn.relu(x) ** 2,
    "silu": jax.nn.silu,
    "hard_swish": jax.nn.hard_swish,
    "sigmoid": jax.nn.sigmoid,
    "hard_sigmoid": jax.nn.hard_sigmoid,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """Looks an activation up; an unknown name is answered with the nearest."""
    if name not in ACTIVATIONS:
        raise UsageError(f"activation is {name!r}. {did_you_mean(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]
