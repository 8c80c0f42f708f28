"""Training a convolution whose batch norm is already part of its rounded weights.

In use the weights are gamma W / sigma, so these are what must be rounded in training, too. Statistics of a
batch would move the grid at every step: weights are scaled by the running sigma, and the output put right:

    until frozen   y = conv(x, Q(gamma W / sigma)) sigma / sigma_B + beta + (b - mu_B) gamma / sigma_B
    from then on   y = conv(x, Q(gamma W / sigma))                + beta + (b - mu)   gamma / sigma

which is the batch norm in training, and the one in use, but for the rounding Q. Those with an index B are
of the batch, from a second convolution with the float weights; the others are running averages, which stop to
move when frozen.

Krishnamoorthi 2018, arXiv:1806.08342, section 3.2.2, where the correction factor is c = sigma_B / sigma.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from effjax.compress.rounding import fake_fitted
from effjax.compress.storage.uniform import Uniform
from effjax.errors import UsageError
from effjax.layers.activations import activation
from effjax.layers.conv import ConvNorm
from effjax.layers.dense import named, zeros
from effjax.layers.stored import RANGES


class FoldedConvNorm(ConvNorm):
    """A `ConvNorm` with batch norm, for the same parameters, that rounds the merged weights.

    The training steps done stand in the collection `ranges`. `merge` gives the convolution for use.

    Attributes:
      weights: the grid of the merged weights; None does not round.
      freeze: training steps after which the running statistics serve, and stay.
    """

    weights: Uniform | None = Uniform(8, 0, scale="float32")
    freeze: int = 200_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm != "batch":
            raise UsageError(f"norm={self.norm!r}: only 'batch' can be folded into a convolution.")

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool = False, features: int | None = None
    ) -> Float[Array, "b h2 w2 o"]:
        """Convolves, normalises and bends the maps; `features` serves where the field says none."""
        if self.merged:
            return super().__call__(x, train, features)
        features = self.features or features or x.shape[-1]
        conv = self.convolution(features, x.shape[-1])
        plain = conv(x)  # [B, H', W', O]
        steps = self.variable(RANGES, "steps", jnp.zeros, (), jnp.int32)
        frozen = (steps.value >= self.freeze) | (not train)
        scale, shift, (mean, var), (batch_mean, batch_var) = _Statistics(name="norm")(plain, train, frozen)
        if train and not self.is_initializing() and self.is_mutable_collection(RANGES):
            steps.value = steps.value + 1
        params = nn.meta.unbox(conv.variables)["params"]
        bias = params.get("bias", jnp.zeros_like(mean))  # [O]
        sigma, batch_sigma = jnp.sqrt(var + self.epsilon), jnp.sqrt(batch_var + self.epsilon)  # [O]
        kernel = jnp.asarray(params["kernel"])
        merged = kernel * (scale / sigma).reshape((1,) * (kernel.ndim - 1) + (-1,))  # [..., O]
        if self.weights is not None:
            merged = fake_fitted(self.weights, merged.reshape(-1, features)).reshape(kernel.shape)
        alone = self.convolution(features, x.shape[-1], name=None).clone(use_bias=False, parent=None)
        y: Any = alone.apply({"params": {"kernel": merged.astype(x.dtype)}}, x)  # [B, H', W', O]
        right = jnp.where(frozen, 1.0, sigma / batch_sigma)  # [O]
        centre = jnp.where(frozen, (bias - mean) / sigma, (bias - batch_mean) / batch_sigma)  # [O]
        y = y * right.astype(y.dtype)[None, None, None]
        y = y + (shift + scale * centre).astype(y.dtype)[None, None, None]
        return y if self.activation is None else activation(self.activation)(y)


class _Statistics(nn.Module):
    """The parameters and running averages of a batch norm, which is applied elsewhere."""

    @nn.compact
    def __call__(
        self, y: Float[Array, "b h w c"], train: bool, frozen: Bool[Array, ""]
    ) -> tuple[Array, Array, tuple[Array, Array], tuple[Array, Array]]:
        channels = y.shape[-1]
        scale = self.param("scale", named(nn.initializers.ones, ("norm",)), (channels,), jnp.float32)
        shift = self.param("bias", named(zeros, ("norm",)), (channels,), jnp.float32)
        mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
        kept = mean.value, var.value
        wide = y.astype(jnp.float32)
        batch = jnp.mean(wide, (0, 1, 2)), jnp.var(wide, (0, 1, 2))
        if train and not self.is_initializing():
            for variable, new in zip((mean, var), batch, strict=True):
                moved = 0.9 * variable.value + 0.1 * jax.lax.stop_gradient(new)
                variable.value = jnp.where(frozen, variable.value, moved)
        return jnp.asarray(scale), jnp.asarray(shift), kept, batch


def folded(definition: ConvNorm, weights: Uniform | None, freeze: int = 200_000) -> FoldedConvNorm:
    """The same layer, trained with its merged weights rounded."""
    fields = {
        field.name: getattr(definition, field.name)
        for field in dataclasses.fields(ConvNorm)
        if field.name not in ("parent", "name")
    }
    return FoldedConvNorm(**fields, weights=weights, freeze=freeze, name=definition.name)
