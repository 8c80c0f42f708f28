"""Activations by the name a config gives them."""

from collections.abc import Callable

import jax

from effjax.errors import UsageError, did_you_mean

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
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
