"""The inverted residual: wide in the middle, narrow at its ends; and its fused form.

    mbconv   y = W_2 * se(a(D * a(W_1 * norm(x))))      W_1, W_2 of 1 x 1 places, D depthwise of k x k
    fused    y = W_2 * se(a(W_1 * norm(x)))             W_1 dense of k x k places
    x <- shortcut(x) + drop(y)

`a` stands for a norm and an activation. Where the map changes, the shortcut is average pooling and a
projection of 1 x 1.

Source: Sandler et al. 2018, MobileNetV2, section 3; the fused form, Tan and Le 2021, EfficientNetV2, figure
2; with a norm in front and the pooled shortcut, Dai et al. 2021, CoAtNet, appendix A.1.
"""

from typing import Any, Literal

import flax.linen as nn
from jaxtyping import Array, Float

from effjax.layers.axes import constrain
from effjax.layers.conv import ConvNorm
from effjax.layers.dense import Dense
from effjax.layers.drop import stochastic_depth
from effjax.layers.norms import NormKind, norm
from effjax.layers.padding import Padding
from effjax.layers.squeeze_excite import SqueezeExcite
from effjax.mixers.context import Context


class MBConv(nn.Module):
    """Expands the channels, convolves, projects back.

    Attributes:
      dim: channels of the output; None keeps those of the input.
      stride: of the convolution.
      kernel: its side.
      ratio: expansion of the channels.
      ratio_of: what it multiplies: the channels of the input or of the output.
      fused: whether the expansion is the dense convolution itself.
      activation: a name in `effjax.layers.activations`.
      pre_norm: of the input; None leaves it out.
      inner_norm: behind expansion and convolution.
      inner_bias: biases there.
      outer_norm: behind the projection, which has a bias where this is None.
      squeeze: squeeze and excitation before the projection.
      shortcut: whether the input is added; where stride or channels change, it is pooled and projected.
      pool: side of that pooling.
      padding: of the convolution, see `effjax.layers.padding`.
      epsilon: of the norms.
    """

    dim: int | None = None
    stride: int = 1
    kernel: int = 3
    ratio: float = 4.0
    ratio_of: Literal["input", "output"] = "input"
    fused: bool = False
    activation: str = "gelu"
    pre_norm: NormKind | None = None
    inner_norm: NormKind | None = "batch"
    inner_bias: bool = False
    outer_norm: NormKind | None = "batch"
    squeeze: SqueezeExcite | None = None
    shortcut: bool = True
    pool: int = 2
    padding: Padding = None
    epsilon: float = 1e-5

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        drop_rate: Float[Array, ""],
        context: Context,
        train: bool = False,
    ) -> tuple[Float[Array, "b h2 w2 o"], None]:
        """Returns `(x, None)`; `drop_rate` is this layer's stochastic depth."""
        dim = self.dim or x.shape[-1]
        hidden = round(self.ratio * (dim if self.ratio_of == "output" else x.shape[-1]))
        inner: dict[str, Any] = dict(
            norm=self.inner_norm,
            use_bias=self.inner_bias,
            epsilon=self.epsilon,
            activation=self.activation,
        )
        place: dict[str, Any] = dict(kernel=self.kernel, stride=self.stride, padding=self.padding)
        h = x
        if self.pre_norm is not None:
            h = norm(self.pre_norm, self.epsilon, "norm", train=train)(h)  # [B, H, W, C]
        if self.fused:
            h = ConvNorm(hidden, **place, **inner, name="expand")(h, train=train)  # [B, H/s, W/s, F]
        else:
            h = ConvNorm(hidden, 1, **inner, name="expand")(h, train=train)  # [B, H, W, F]
            h = ConvNorm(**place, depthwise=True, **inner, name="depthwise")(h, train=train)
        if self.squeeze is not None:
            h = self.squeeze(h)  # [B, H/s, W/s, F]
        last: dict[str, Any] = dict(
            use_bias=self.outer_norm is None, norm=self.outer_norm, epsilon=self.epsilon
        )
        h = ConvNorm(dim, 1, **last, name="project")(h, train=train)  # [B, H/s, W/s, O]
        if self.shortcut:
            h = self._shortcut(x, dim) + stochastic_depth(self, h, drop_rate, train)
        return constrain(h), None

    @nn.nowrap
    def _shortcut(self, x: Float[Array, "b h w c"], dim: int) -> Float[Array, "b h2 w2 o"]:
        if self.stride > 1:
            x = average_pool(x, self.pool, self.stride)  # [B, H/s, W/s, C]
        return x if x.shape[-1] == dim else Dense(dim, (None, "embed"), name="shortcut_project")(x)


def average_pool(x: Float[Array, "b h w c"], window: int, stride: int) -> Float[Array, "b h2 w2 c"]:
    """Means of windows; at the lower and right edge of an odd map, of the places that are there."""
    sides = (window, window), (stride, stride)
    # Linen divides by counts in float32.
    return nn.avg_pool(x, *sides, padding="SAME", count_include_pad=False).astype(x.dtype)
