"""Convolution over the places of a map, alone and with a norm and an activation behind it.

    y[b, i, j, o] = sum_uvc x[b, s i + u - p, s j + v - p, c] K[u, v, c, o] + bias[o]

Padding is the same on all sides, as in torch; XLA's "SAME" pads a strided convolution on one side only.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.compress import fold
from effjax.compress.merge import Fold, Variables, unchanged
from effjax.errors import UsageError
from effjax.layers.activations import activation
from effjax.layers.dense import Dense, named, zeros
from effjax.layers.depthwise import DepthwiseConv
from effjax.layers.grouped import grouped_conv, together
from effjax.layers.norms import NormKind, norm
from effjax.layers.padding import Padding, pad_same
from effjax.layers.stored import Stored, kernel_of, parameter

# Fan-in scaling, a normal cut at two of its own standard deviations.
_fan_in = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


class Conv(nn.Module):
    """A dense or grouped convolution; one place with one place's channels is a `Dense`.

    Attributes:
      features: output channels.
      kernel: side of the kernel.
      stride: of the output places on the input.
      padding: zeros on each side; None is half of the kernel, which keeps the size at stride 1; "same" is
        TensorFlow's, see `effjax.layers.padding`.
      groups: how many groups of channels are convolved apart.
      use_bias: whether to add a bias an output channel.
    """

    features: int
    kernel: int = 3
    stride: int = 1
    padding: Padding = None
    groups: int = 1
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 o"]:
        """Convolves the maps.

        Raises:
          UsageError: where the groups do not divide the channels, or the kernel does not fit on the map.
        """
        channels, side = x.shape[-1], self.kernel // 2 if self.padding is None else self.padding
        if side == "same":
            x, side = pad_same(x, self.kernel, self.stride), 0  # [B, H + p, W + q, C]
        if channels % self.groups or self.features % self.groups:
            raise UsageError(f"groups={self.groups} must divide the channels {channels} and {self.features}.")
        if min(x.shape[1:3]) + 2 * side < self.kernel:
            raise UsageError(
                f"a kernel of {self.kernel} x {self.kernel} does not fit on a map of {x.shape[1]} x "
                f"{x.shape[2]} with a padding of {side}: use a larger picture."
            )
        shape = self.kernel, self.kernel, channels // self.groups, self.features
        init = kernel_of(_fan_in, (None, None, None, "embed"), 3, 1)
        kernel = parameter(self, "kernel", init, shape, jnp.float32)
        if isinstance(kernel, Stored):
            x, kernel = kernel.entering(x), kernel.whole(x.dtype)
        x, kernel = nn.dtypes.promote_dtype(x, kernel)
        if self.groups > 1:
            y = grouped_conv(x, kernel, self.stride, side, self.groups)
        else:
            y = together(x, kernel, stride=self.stride, padding=side, groups=1)
        if self.use_bias:
            bias = self.param("bias", named(zeros, ("embed",)), (self.features,), jnp.float32)
            y = y + bias.astype(y.dtype)[None, None, None]
        return y


class ConvNorm(nn.Module):
    """activation(norm(conv(x))).

    Attributes:
      features: output channels; None leaves them to the caller, or else keeps them.
      kernel: side of the kernel.
      stride: of the output places on the input.
      padding: zeros on each side; None is half of the kernel, "same" as in `Conv`.
      depthwise: whether each channel is convolved alone.
      use_bias: whether the convolution has a bias.
      norm: a kind in `effjax.layers.norms`; None leaves it out.
      epsilon: of the norm.
      activation: a name in `effjax.layers.activations`; None leaves it out.
      initial: what the norm's scale starts at; from zero a residual branch begins as identity.
      merged: whether a batch norm is part of the convolution, which then has a bias.
    """

    features: int | None = None
    kernel: int = 3
    stride: int = 1
    padding: Padding = None
    depthwise: bool = False
    use_bias: bool = False
    norm: NormKind | None = "batch"
    epsilon: float = 1e-5
    activation: str | None = None
    initial: float = 1.0
    merged: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merged and self.norm != "batch":
            raise UsageError(
                f"norm={self.norm!r} cannot be part of a convolution: only 'batch' can be merged."
            )

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool = False, features: int | None = None
    ) -> Float[Array, "b h2 w2 o"]:
        """Convolves, normalises and bends the maps; `features` serves where the field says none."""
        conv = self.convolution(self.features or features or x.shape[-1], x.shape[-1])
        x = conv(x)  # [B, H', W', O]
        if self.norm is not None and not self.merged:
            x = norm(self.norm, self.epsilon, "norm", train=train, initial=self.initial)(x)
        return x if self.activation is None else activation(self.activation)(x)

    @nn.nowrap
    def convolution(self, features: int, channels: int, name: str | None = "conv") -> nn.Module:
        """The convolution alone.

        Args:
          features: output channels.
          channels: input channels.
          name: of the module among the parameters.

        Raises:
          UsageError: for a depthwise one that would change the number of channels.
        """
        use_bias = self.use_bias or self.merged
        if self.depthwise:
            if features != channels:
                raise UsageError(f"a depthwise convolution keeps {channels} channels, not {features}.")
            return DepthwiseConv(self.kernel, self.stride, padding=self.padding, use_bias=use_bias, name=name)
        if self.kernel == self.stride == 1:
            return Dense(features, (None, "embed"), use_bias=use_bias, name=name)
        return Conv(features, self.kernel, self.stride, self.padding, use_bias=use_bias, name=name)

    @nn.nowrap
    def merge(self) -> tuple["ConvNorm", Fold]:
        """A batch norm becomes part of the convolution."""
        if self.norm != "batch" or self.merged:
            return self, unchanged

        def folded(variables: Variables) -> Variables:
            params = variables["params"]
            affine = fold.batch_norm(params["norm"], variables["batch_stats"]["norm"], self.epsilon)
            return {"params": {"conv": fold.affine_behind(params["conv"], affine)}}

        return self.clone(merged=True), folded
