"""Zeros around a map, where a convolution does not take the same number on all sides."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

# Zeros on each side; None is half of the kernel; "same" is what TensorFlow calls so, see `pad_same`.
Padding = int | Literal["same"] | None


def pad_same(x: Float[Array, "b h w c"], kernel: int, stride: int) -> Float[Array, "b h2 w2 c"]:
    """Zeros that make a convolution give `ceil(n / stride)` places: an odd one stands below and to the right.

    A strided kernel of 3 on an even map so gets none above and one below, where torch gives one on each side
    and reads other places.
    """
    total = [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[1:3]]
    return jnp.pad(x, ((0, 0), *((n // 2, n - n // 2) for n in total), (0, 0)))
