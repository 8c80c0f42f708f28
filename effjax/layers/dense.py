"""Linear projections whose every axis has a logical name.

    y[..., o] = sum_i x[..., i] W[i, o] + b[o]

The names (`embed`, `heads`, `mlp`, ...) say what an axis is; `effjax.parallel` maps them to mesh axes.
Parameters are float32 at rest; the training step casts them, and a projection computes in the dtype that
parameters and input promote to.
"""

from collections.abc import Sequence

import flax.linen as nn
from flax.linen.initializers import Initializer

xavier = nn.initializers.xavier_uniform()
zeros = nn.initializers.zeros_init()


def truncated_normal(stddev: float) -> Initializer:
    """The initialiser of ViT and DeiT: a normal cut at two of its own standard deviations."""
    return nn.initializers.truncated_normal(stddev=stddev, lower=-2.0, upper=2.0)


def named(init: Initializer, axes: Sequence[str | None]) -> Initializer:
    """Attaches logical axis names to what an initialiser makes."""
    return nn.with_logical_partitioning(init, tuple(axes))


def dense(
    features: int | Sequence[int],
    axes: Sequence[str | None],
    *,
    inputs: int = 1,
    use_bias: bool = True,
    kernel_init: Initializer = xavier,
    bias_init: Initializer = zeros,
    name: str | None = None,
) -> nn.DenseGeneral:
    """A projection of the last `inputs` axes onto `features`.

    Args:
      features: size of the output axis, or sizes of several.
      axes: logical names of the kernel's axes, input axes first.
      inputs: how many trailing axes of the input are contracted.
      use_bias: whether to add a bias over the output axes.
      kernel_init: initialiser; fan-in and fan-out are those of the flattened matrix.
      bias_init: initialiser of the bias.
      name: Linen name; by default the attribute or a counter.
    """
    return nn.DenseGeneral(
        features=features,
        axis=tuple(range(-inputs, 0)),
        use_bias=use_bias,
        kernel_init=named(kernel_init, axes),
        bias_init=named(bias_init, axes[inputs:]),
        name=name,
    )
