"""Depthwise convolution: every channel has a kernel of its own.

    y[b, i, j, c] = sum_uv x[b, s i + d u - p, s j + d v - p, c] K[u, v, c]

with stride s, dilation d and padding p. One sum, two ways to write it, chosen when it is lowered for a
platform: XLA's convolution, and on CPUs, where that one is a scalar loop, shifted multiply-adds, which fuse
into one pass over the map. `pallas_kernels.depthwise_conv` has a kernel for TPUs that can be asked for.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.errors import UsageError
from effjax.layers.dense import named, truncated_normal, zeros
from effjax.layers.padding import Padding, pad_same
from effjax.layers.stored import Stored, kernel_of, parameter
from effjax.parallel.each_device import on_each_device

Edges = tuple[tuple[int, int], tuple[int, int]]
Map = Float[Array, "b h w c"]
Coarse = Float[Array, "b h2 w2 c"]
Kernel = Float[Array, "u v c"]
Implementation = Literal["plain", "kernel", "reference", "tpu"]


def depthwise_conv(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "u v c"],
    stride: int = 1,
    dilation: int = 1,
    padding: int | None = None,
    *,
    bias: Float[Array, "c"] | None = None,
    implementation: Implementation = "plain",
) -> Float[Array, "b h2 w2 c"]:
    """Convolves each channel with its own kernel; zeros lie beyond the edges.

    Args:
      x: maps.
      kernel: one kernel a channel.
      stride: of the output places on the input.
      dilation: distance of the kernel's taps.
      padding: zeros on each side; None is half of the kernel's extent, which keeps the size at stride 1.
      bias: added to each channel.
      implementation: `plain` is what stands here, on every platform. `kernel` is the same on CPUs, and
        elsewhere the kernel of the platform, or XLA's convolution where it has none; `reference` and `tpu`
        name one of these.

    Raises:
      UsageError: where the kernel is larger than the padded map, and for what no kernel does.
    """
    extents = [dilation * (size - 1) + 1 for size in kernel.shape[:2]]
    sides = [extent // 2 if padding is None else padding for extent in extents]
    if any(n + 2 * side < extent for n, side, extent in zip(x.shape[1:3], sides, extents, strict=True)):
        raise UsageError(
            f"a depthwise kernel of {extents[0]} x {extents[1]} places does not fit on a map of "
            f"{x.shape[1]} x {x.shape[2]} with a padding of {sides[0]}."
        )
    x, kernel = nn.dtypes.promote_dtype(x, kernel)
    bias = None if bias is None else bias.astype(x.dtype)
    top, left = sides

    def plain(x: Map, kernel: Kernel, bias: Any) -> Coarse:
        y = _depthwise_of_size(x, kernel, stride, dilation, ((top, top), (left, left)))
        return y if bias is None else y + bias[None, None, None]

    if implementation == "plain":
        return plain(x, kernel, bias)
    if (stride, dilation) != (1, 1) or any(2 * side + 1 != n for side, n in zip(sides, extents, strict=True)):
        raise UsageError(
            f"implementation={implementation!r} keeps the size of a map: it takes odd kernels without stride,"
            f" dilation and a padding of their own, not {extents[0]} x {extents[1]} places with"
            f" stride={stride}, dilation={dilation}, padding={padding}. implementation='plain' takes all."
        )
    return _by_kernel(x, kernel, bias, plain, implementation)


def _by_kernel(
    x: Map,
    kernel: Kernel,
    bias: Any,
    plain: Callable[..., Map],
    implementation: Literal["kernel", "reference", "tpu"],
) -> Map:
    """Each device convolves its own maps."""
    # Pallas is slow to import, and most programs have no use for it.
    from pallas_kernels.depthwise_conv import depthwise_conv as op

    def convolve(x: Any, kernel: Any, bias: Any) -> Any:
        if implementation == "kernel":
            return _by_platform(plain, op)(x, kernel, bias)
        return op(x, kernel, bias, implementation=implementation)

    maps = ("batch", None, None, None)
    return on_each_device(convolve, (maps, (None, None, None), (None,)), maps)(x, kernel, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _depthwise(x: Map, kernel: Kernel, stride: int, dilation: int, edges: Edges) -> Coarse:
    options: dict[str, Any] = dict(stride=stride, dilation=dilation, edges=edges)
    return _by_platform(functools.partial(shifted, **options), functools.partial(convolved, **options))(
        x, kernel
    )


def _forward(x: Map, kernel: Kernel, *options: int | Edges) -> tuple[Coarse, tuple[Map, Kernel]]:
    return _depthwise_of_size(x, kernel, *options), (x, kernel)


def _backward(
    stride: int, dilation: int, edges: Edges, kept: tuple[Map, Kernel], g: Coarse
) -> tuple[Map, Kernel]:
    options: dict[str, Any] = dict(stride=stride, dilation=dilation, edges=edges)

    def transposed(x: Map, kernel: Kernel, g: Coarse) -> tuple[Map, Kernel]:
        return jax.vjp(functools.partial(convolved, **options), x, kernel)[1](g)

    def by_shifts(x: Map, kernel: Kernel, g: Coarse) -> tuple[Map, Kernel]:
        return _input_gradient(x, kernel, g, **options), _kernel_gradient(x, kernel, g, **options)

    return _by_platform(by_shifts, transposed)(*kept, g)


_depthwise.defvjp(_forward, _backward)
# Traced once for all layers of one size: it has as many operations as the kernel has taps.
_depthwise_of_size = jax.jit(_depthwise, static_argnums=(2, 3, 4))


def _by_platform(cpu: Callable[..., Any], default: Callable[..., Any]) -> Callable[..., Any]:
    return functools.partial(jax.lax.platform_dependent, cpu=cpu, default=default)


def convolved(x: Map, kernel: Kernel, *, stride: int, dilation: int, edges: Edges) -> Coarse:
    """The sum as XLA's grouped convolution."""
    return jax.lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (stride, stride),
        edges,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def shifted(x: Map, kernel: Kernel, *, stride: int, dilation: int, edges: Edges) -> Coarse:
    """The sum as one multiply-add a tap of the kernel."""
    padded = jnp.pad(x, ((0, 0), *edges, (0, 0)))
    total = None
    for u, v, window in _windows(padded, kernel.shape, stride, dilation):
        term = window * kernel[u, v][None, None, None]  # [B, H', W', C]
        total = term if total is None else total + term
    assert total is not None
    return total


def _windows(
    padded: Map, kernel: tuple[int, ...], stride: int, dilation: int
) -> Iterator[tuple[int, int, Coarse]]:
    """What each tap of the kernel sees."""
    rows, columns = (
        (n - dilation * (size - 1) - 1) // stride + 1
        for n, size in zip(padded.shape[1:3], kernel, strict=False)
    )
    for u in range(kernel[0]):
        for v in range(kernel[1]):
            i, j = u * dilation, v * dilation
            last = i + stride * (rows - 1) + 1, j + stride * (columns - 1) + 1
            yield u, v, padded[:, i : last[0] : stride, j : last[1] : stride]


def _input_gradient(x: Map, kernel: Kernel, g: Coarse, *, stride: int, dilation: int, edges: Edges) -> Map:
    """The same sum with the kernel turned round, over the gradient with zeros between its places."""
    extents = [dilation * (size - 1) + 1 for size in kernel.shape[:2]]
    lengths = zip(x.shape[1:3], g.shape[1:3], extents, edges, strict=True)
    spread = [(0, 0, 0)]
    for n, places, extent, (before, _) in lengths:
        reach = (places - 1) * stride + 1
        spread.append((extent - 1 - before, n + before - reach, stride - 1))
    spread.append((0, 0, 0))
    wide = jax.lax.pad(g, jnp.zeros((), g.dtype), spread)  # [B, H + extent - 1, W + extent - 1, C]
    return shifted(wide, kernel[::-1, ::-1], stride=1, dilation=dilation, edges=((0, 0), (0, 0)))


# Output places whose products are added up in one pass over the kernel's gradient. On one core (Zen 4, 7 x 7,
# 96 channels, 8 x 56 x 56 places) 7, 14, 28 and 56 of them take 112, 68, 11 and 13 ms; a sum over the map for
# each tap takes 128 ms.
_PLACES = 28


def _kernel_gradient(
    x: Map, kernel: Kernel, g: Coarse, *, stride: int, dilation: int, edges: Edges
) -> Kernel:
    """Block after block of output places; each tap adds its products in place, so [B, u, v, C] stays cached.

    Along channels this is one fused chain of vector multiply-adds, where a sum over places for each tap would
    go over the map as often as the kernel has taps.
    """
    columns = -(-g.shape[2] // -(-g.shape[2] // _PLACES))
    rows = min(max(1, _PLACES // columns), g.shape[1])
    down, right = -g.shape[1] % rows, -g.shape[2] % columns
    g = jnp.pad(g, ((0, 0), (0, down), (0, right), (0, 0)))  # places that add nothing fill the last blocks
    (top, bottom), (left, beyond) = edges
    room = ((0, 0), (top, bottom + stride * down), (left, beyond + stride * right), (0, 0))
    padded, wide = jnp.pad(x, room), jnp.promote_types(x.dtype, jnp.float32)
    across, (batch, channels) = g.shape[2] // columns, (x.shape[0], x.shape[3])
    spans = [dilation * (size - 1) + 1 for size in kernel.shape[:2]]
    seen = stride * (rows - 1) + spans[0], stride * (columns - 1) + spans[1]

    def add(total: Float[Array, "b u v c"], block: Int[Array, ""]) -> tuple[Float[Array, "b u v c"], None]:
        i, j = block // across * rows, block % across * columns
        places = jax.lax.dynamic_slice(g, (0, i, j, 0), (batch, rows, columns, channels))
        window = jax.lax.dynamic_slice(padded, (0, i * stride, j * stride, 0), (batch, *seen, channels))
        for u, v, one in _windows(window, (rows, columns), dilation, stride):  # [B, u, v, C]
            total = total + one * places[:, u, v][:, None, None].astype(wide)
        return total, None

    zero = jnp.zeros((batch, *kernel.shape), wide)
    total, _ = jax.lax.scan(add, zero, jnp.arange(g.shape[1] // rows * across))
    return jnp.sum(total, 0).astype(kernel.dtype)


class DepthwiseConv(nn.Module):
    """A depthwise convolution with parameters.

    Attributes:
      kernel: side of the kernel, or its height and width.
      stride: of the output places on the input.
      dilation: distance of the kernel's taps.
      padding: zeros on each side; None keeps the size at stride 1; "same" is TensorFlow's, see
        `effjax.layers.padding`, and takes a square kernel without dilation.
      use_bias: whether to add a bias a channel.
      implementation: as `depthwise_conv` has it.
    """

    kernel: int | tuple[int, int]
    stride: int = 1
    dilation: int = 1
    padding: Padding = None
    use_bias: bool = True
    implementation: Implementation = "plain"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        """Convolves the maps."""
        size = (self.kernel, self.kernel) if isinstance(self.kernel, int) else self.kernel
        channels = x.shape[-1]
        init = kernel_of(truncated_normal((size[0] * size[1]) ** -0.5), (None, None, "embed"), 2, 1)
        kernel = parameter(self, "kernel", init, (*size, channels), jnp.float32)
        if isinstance(kernel, Stored):
            x, kernel = kernel.entering(x), kernel.whole(x.dtype)
        padding = self.padding
        if padding == "same":
            x, padding = pad_same(x, size[0], self.stride), 0
        bias = None
        if self.use_bias:
            bias = jnp.asarray(self.param("bias", named(zeros, ("embed",)), (channels,), jnp.float32))
        options: dict[str, Any] = dict(bias=bias, implementation=self.implementation)
        return depthwise_conv(x, jnp.asarray(kernel), self.stride, self.dilation, padding, **options)
