"""Depthwise convolution of maps, forward and backward, with bias and activation, on TPU.

    y[b, i, j, c] = activation(sum_uv x[b, i + u - p, j + v - q, c] K[u, v, c] + bias[c])

with p = (U - 1) // 2, q = (V - 1) // 2, and zeros beyond the edges: maps keep their size. A channel meets no
other, so a matrix unit has nothing to multiply: the sum is taps times shifted maps, of which the whole map
must be at hand. ConvNeXt, RepLKNet and UniRepLKNet have such sums over 7 x 7 to 31 x 31 places, "Scaling Up
Your Kernels to 31x31", Ding et al. 2022, arXiv:2203.06717.
"""

import jax

from pallas_kernels.depthwise_conv import cost, reference, tpu
from pallas_kernels.depthwise_conv.reference import ACTIVATIONS
from pallas_kernels.op import Implementation, Interpret, Op, Unsupported

DTYPES = ("float32", "bfloat16", "float16")
LARGEST = 31

OP = Op(
    name="depthwise_conv",
    reference=reference.depthwise_conv,
    tpu=tpu.forward,
    tpu_backward=tpu.backward,
    cost=cost.forward,
)


def depthwise_conv(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    activation: str = "none",
    implementation: Implementation | None = None,
    interpret: Interpret = False,
    strict: bool = False,
) -> jax.Array:
    """activation(x * kernel + bias), each channel with its own kernel, at stride 1.

    Args:
      x: `[B, H, W, C]` maps.
      kernel: `[U, V, C]`; it may be larger than the map.
      bias: `[C]`, or None.
      activation: `none`, `relu`, `silu`, or `gelu` by the error function.
      implementation: `reference`, `tpu`; None chooses by the platform that is lowered for.
      interpret: runs the named kernel on any platform.
      strict: whether a kernel that does not lower is an error; else the reference is used, with a warning.

    Returns:
      `[B, H, W, C]`.

    Raises:
      Unsupported: for shapes that do not fit together, kernels of more than 31 places a side, types and
        activations that no implementation takes, and for what the named implementation does not take.
    """
    if x.ndim != 4 or kernel.ndim != 3 or x.shape[3] != kernel.shape[2]:
        raise Unsupported(
            f"depthwise_conv takes maps [B, H, W, C] and kernels [U, V, C], not {x.shape} and {kernel.shape}."
        )
    if bias is not None and bias.shape != x.shape[3:]:
        raise Unsupported(f"depthwise_conv: {x.shape[3]} channels have no bias of {bias.shape}.")
    if 0 in (*x.shape, *kernel.shape) or max(kernel.shape[:2]) > LARGEST:
        raise Unsupported(
            f"depthwise_conv takes maps with places and kernels of 1 to {LARGEST} places a side, not"
            f" {x.shape} and {kernel.shape}."
        )
    given = [array.dtype for array in (x, kernel, bias) if array is not None]
    if x.dtype.name not in DTYPES or any(dtype != x.dtype for dtype in given):
        raise Unsupported(
            f"depthwise_conv takes maps, kernels and biases of one type, {', '.join(DTYPES)}, not"
            f" {', '.join(map(str, given))}."
        )
    if activation not in ACTIVATIONS:
        raise Unsupported(f"depthwise_conv: activation={activation!r} is none of {', '.join(ACTIVATIONS)}.")
    return OP(
        *(x, kernel, bias),
        implementation=implementation,
        interpret=interpret,
        strict=strict,
        activation=activation,
    )
