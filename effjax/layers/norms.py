"""Normalisation over channels, computed in float32 and returned in the dtype of the input.

layer_norm:  y = (x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias      Ba et al. 2016
rms_norm:    y = x / sqrt(mean(x^2) + epsilon) * scale                      Zhang and Sennrich 2019
"""

from collections.abc import Callable

import flax.linen as nn

from effjax.errors import UsageError, did_you_mean
from effjax.layers.dense import named, zeros

_ones = nn.initializers.ones_init()


def layer_norm(epsilon: float = 1e-6, affine: bool = True, name: str | None = None) -> nn.LayerNorm:
    """Layer norm; `affine=False` leaves scale and bias to a modulation, as DiT does."""
    return nn.LayerNorm(
        epsilon=epsilon,
        use_scale=affine,
        use_bias=affine,
        scale_init=named(_ones, ("norm",)),
        bias_init=named(zeros, ("norm",)),
        name=name,
    )


def rms_norm(epsilon: float = 1e-6, name: str | None = None) -> nn.RMSNorm:
    """RMS norm with a learned scale."""
    return nn.RMSNorm(epsilon=epsilon, scale_init=named(_ones, ("norm",)), name=name)


NORMS: dict[str, Callable[..., nn.Module]] = {"layer": layer_norm, "rms": rms_norm}
"""Norms with learned parameters, by the name a config gives them."""


def norm_layer(kind: str, epsilon: float = 1e-6, name: str | None = None) -> nn.Module:
    """Makes a norm of `NORMS`; an unknown name is answered with the nearest."""
    if kind not in NORMS:
        raise UsageError(f"norm is {kind!r}. {did_you_mean(kind, NORMS)}")
    return NORMS[kind](epsilon, name=name)
