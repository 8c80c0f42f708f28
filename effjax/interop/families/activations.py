"""Activations by the names that transformers gives them."""

from effjax.errors import UsageError, did_you_mean

_OURS = {
    "gelu": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu_squared",
    "silu": "silu",
    "swish": "silu",
}


def ours(name: str) -> str:
    """The name in `effjax.layers.activations`.

    Raises:
      UsageError: for an activation that is not there.
    """
    if name not in _OURS:
        raise UsageError(f"activation {name!r} is not known here. {did_you_mean(name, _OURS)}")
    return _OURS[name]
