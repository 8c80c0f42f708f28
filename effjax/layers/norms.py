"""Normalisation over channels, computed in float32 and returned in the dtype of the input.

layer:  y = (x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias      Ba et al. 2016
rms:    y = x / sqrt(mean(x^2) + epsilon) * scale                      Zhang and Sennrich 2019
group:  the layer norm with mean and variance over all places too      Wu and He 2018, with one group
batch:  the same over all places and examples, a running average of
        both in evaluation                                             Ioffe and Szegedy 2015
rep_batch, and a section that says `progressive`: see `effjax.layers.progressive`
none:   y = x

`norm` makes either by the name a config gives it. The `offset` kinds keep their scale as its distance from
one, as the Gemma and Nemotron families do, so that weight decay pulls it to one.
"""

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.layers.dense import named, zeros
from effjax.layers.progressive import Progressive, ProgressiveNorm, RepBatchNorm

NormName = Literal[
    "rms",
    "rms_offset",
    "layer",
    "layer_no_bias",
    "layer_plain",
    "layer_offset",
    "group",
    "batch",
    "rep_batch",
    "none",
]
NormKind = NormName | Progressive


def norm(
    kind: NormKind,
    epsilon: float,
    name: str | None,
    reduced: int = 1,
    scaled: int = 1,
    train: bool = False,
    initial: float = 1.0,
) -> nn.Module:
    """A norm by its kind.

    Args:
      kind: `rms` and `layer` as above; `layer_no_bias` has a scale alone, `layer_plain` neither scale nor
        bias (DiT leaves them to a modulation, OLMo out); `rms_offset` and `layer_offset` multiply by
        `1 + scale`.
      epsilon: added to the mean square or to the variance.
      name: of the module among the parameters; None where it is named by what it is assigned to.
      reduced: how many trailing axes mean and variance are taken over.
      scaled: how many trailing axes scale and bias span.
      train: whether a batch norm takes mean and variance from the batch, and moves its running averages
        towards them by a tenth. Under `jit` the batch is the whole batch, over all devices.
      initial: what the scale starts at; the `offset` kinds know only one.
    """
    if isinstance(kind, Progressive):
        return ProgressiveNorm(kind, epsilon, train, name=name)
    if kind == "rep_batch":
        return RepBatchNorm(epsilon, train, name=name)
    if kind == "none":
        return Identity(name=name)
    filled = nn.initializers.constant(initial)
    if kind in ("batch", "group"):
        affine = dict(scale_init=named(filled, ("norm",)), bias_init=named(zeros, ("norm",)))
        common: dict[str, Any] = dict(epsilon=epsilon, name=name, **affine)
        return (
            nn.BatchNorm(not train, momentum=0.9, **common) if kind == "batch" else nn.GroupNorm(1, **common)
        )
    if kind.endswith("offset"):
        return OffsetNorm(kind == "layer_offset", epsilon, name=name)
    axes = _names(scaled)
    if kind == "rms":
        return nn.RMSNorm(
            epsilon=epsilon,
            scale_init=named(filled, axes),
            reduction_axes=tuple(range(-reduced, 0)),
            feature_axes=tuple(range(-scaled, 0)),
            name=name,
        )
    use_scale, use_bias = kind != "layer_plain", kind == "layer"
    return LayerNorm(epsilon, reduced, scaled, use_scale, use_bias, initial, name=name)


def norm_size(kind: NormKind, channels: int) -> int:
    """How many parameters a norm over so many channels has."""
    if isinstance(kind, Progressive):
        return (4 if kind.before == "layer" else 3) * channels + 1
    vectors = {"rms": 1, "rms_offset": 1, "layer_no_bias": 1, "layer_plain": 0, "none": 0}
    return channels * vectors.get(kind, 2) + (kind == "rep_batch")


def _names(scaled: int) -> tuple[str | None, ...]:
    """Names of the axes of a scale; a name stands for one axis of an array only."""
    return (*(None,) * (scaled - 1), "norm")


class Identity(nn.Module):
    """No norm at all, as after one was folded into what follows."""

    def __call__(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
        """Returns its input."""
        return x


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def standardised(x: Float[Array, "*shape"], reduced: int, epsilon: float) -> Float[Array, "*shape"]:
    """(x - mean) / sqrt(variance + epsilon) over the last `reduced` axes.

    The backward pass keeps the result and a number a vector; the formula differentiated as it stands would
    keep three arrays of the size of x.
    """
    return _standardised(x, reduced, epsilon)[0]


@standardised.defjvp
def _standardised_jvp(
    reduced: int, epsilon: float, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    y, factor = _standardised(*primals, reduced, epsilon)
    moved, axes = tangents[0], tuple(range(-reduced, 0))
    straight = jnp.mean(moved, axes, keepdims=True) + y * jnp.mean(y * moved, axes, keepdims=True)
    return y, factor * (moved - straight)


def _standardised(
    x: Float[Array, "*shape"], reduced: int, epsilon: float
) -> tuple[Float[Array, "*shape"], Float[Array, "..."]]:
    axes = tuple(range(-reduced, 0))
    # Both means in one pass; rounding may take their difference below zero.
    mean = jnp.mean(x, axes, keepdims=True)
    variance = jnp.maximum(jnp.mean(x * x, axes, keepdims=True) - mean * mean, 0.0)
    factor = jax.lax.rsqrt(variance + epsilon)
    return (x - mean) * factor, factor


class LayerNorm(nn.Module):
    """The layer norm over trailing axes.

    Attributes:
      epsilon: added to the variance.
      reduced: how many axes mean and variance are taken over.
      scaled: how many axes scale and bias span.
      use_scale: whether there is a scale.
      use_bias: whether there is a bias.
      initial: what the scale starts at.
    """

    epsilon: float
    reduced: int = 1
    scaled: int = 1
    use_scale: bool = True
    use_bias: bool = True
    initial: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Normalises."""
        spanned, axes = x.shape[x.ndim - self.scaled :], _names(self.scaled)
        shape = (1,) * (x.ndim - self.scaled) + spanned
        y = standardised(x.astype(jnp.promote_types(x.dtype, jnp.float32)), self.reduced, self.epsilon)
        dtype = x.dtype
        if self.use_scale:
            init = named(nn.initializers.constant(self.initial), axes)
            scale = self.param("scale", init, spanned, jnp.float32)
            y, dtype = y * scale.astype(y.dtype).reshape(shape), jnp.promote_types(dtype, scale.dtype)
        if self.use_bias:
            bias = self.param("bias", named(zeros, axes), spanned, jnp.float32)
            y, dtype = y + bias.astype(y.dtype).reshape(shape), jnp.promote_types(dtype, bias.dtype)
        return y.astype(dtype)


class OffsetNorm(nn.Module):
    """Multiplies by `1 + scale`; with `centred` it is a layer norm and has a bias.

    Attributes:
      centred: layer norm instead of RMS norm.
      epsilon: added to the mean square or to the variance.
    """

    centred: bool
    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
        """Normalises the last axis."""
        shape = (1,) * (x.ndim - 1) + x.shape[-1:]
        scale = self.param("scale", named(zeros, ("norm",)), x.shape[-1:], jnp.float32)
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.centred:
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y**2, axis=-1, keepdims=True) + self.epsilon)
        y = y * (1 + scale.astype(y.dtype)).reshape(shape)
        if self.centred:
            bias = self.param("bias", named(zeros, ("norm",)), x.shape[-1:], jnp.float32)
            y = y + bias.astype(y.dtype).reshape(shape)
        return y.astype(x.dtype)
