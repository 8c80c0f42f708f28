"""Transposed convolution: every place of a coarse map paints a kernel onto a finer one.

    y[b, s i + u - p, s j + v - p, o] += sum_c x[b, i, j, c] K[u, v, c, o]

with stride s and padding p; the kernel's side is a multiple of the stride. It is one product of matrices and
an addition of shifted maps: no zeros stand between the places of the input, and none are multiplied.
"""

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.layers.dense import named, truncated_normal, zeros


class ConvTransposed(nn.Module):
    """A transposed convolution with parameters; the kernel stands as the equation has it.

    Attributes:
      features: output channels; None convolves each channel alone.
      kernel: side of the kernel, a multiple of the stride.
      stride: of the input places on the output.
      padding: places that are cut off on each side.
    """

    features: int | None = None
    kernel: int = 4
    stride: int = 2
    padding: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 o"]:
        """Returns a map of `(H - 1) s + k - 2 p` rows.

        Raises:
          UsageError: where the stride does not divide the kernel.
        """
        if self.kernel % self.stride:
            raise UsageError(
                f"stride={self.stride} must divide kernel={self.kernel} of a transposed convolution."
            )
        shape: tuple[int, ...] = (self.kernel, self.kernel, x.shape[-1])
        if self.features is not None:
            shape = *shape, self.features
        # So many taps of the kernel meet in one place of the output.
        taps = (self.kernel // self.stride) ** 2 * (1 if self.features is None else x.shape[-1])
        axes = (*(None,) * (len(shape) - 1), "embed")
        kernel = self.param("kernel", named(truncated_normal(taps**-0.5), axes), shape, jnp.float32)
        bias = self.param("bias", named(zeros, ("embed",)), shape[-1:], jnp.float32)
        x, kernel = nn.dtypes.promote_dtype(x, kernel)
        if self.features is None:
            painted = jnp.einsum("bhwc,uvc->bhwuvc", x, kernel)
        else:
            contracted = ((3,), (0,))
            matrix = jnp.moveaxis(kernel, 2, 0)  # [C, u, v, O]
            painted = jax.lax.dot_general(x, matrix, (contracted, ((), ())))  # [B, H, W, u, v, O]
        y = overlap_add(painted, self.stride)  # [B, (H - 1) s + k, (W - 1) s + k, O]
        height, width = y.shape[1:3]
        y = y[:, self.padding : height - self.padding, self.padding : width - self.padding]
        return y + bias.astype(y.dtype)[None, None, None]


def overlap_add(painted: Float[Array, "b h w u v c"], stride: int) -> Float[Array, "b h2 w2 c"]:
    """Adds up what every place paints, `[u, v]` from the place `stride` times its own on."""
    count = painted.shape[3] // stride
    cells = einops.rearrange(painted, "b h w (m s) (n t) c -> m n b h s w t c", s=stride, t=stride)
    total = None
    for i in range(count):
        for j in range(count):
            edges = [(0, 0)] * 6
            edges[1], edges[3] = (i, count - 1 - i), (j, count - 1 - j)
            term = jnp.pad(cells[i, j], edges)  # [B, H + m - 1, s, W + n - 1, t, C]
            total = term if total is None else total + term
    assert total is not None
    return einops.rearrange(total, "b h s w t c -> b (h s) (w t) c")
