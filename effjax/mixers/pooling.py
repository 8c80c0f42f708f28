"""Average pooling as a mixer, without parameters.

    y[i, j] = mean{x[u, v] : |u - i| <= r, |v - j| <= r, (u, v) on the map} - x[i, j],    r = floor(k / 2)

Places beyond the edges are not counted, so a constant map gives zero at the edges too; the map itself is
taken off because the residual connection puts it back.

Source: MetaFormer Is Actually What You Need for Vision, Yu et al. 2022, section 3.2.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.mixers.context import Context


class Pooling(nn.Module):
    """The mean over k x k places, less the place itself.

    Attributes:
      size: side k of the neighbourhood.
    """

    size: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size % 2 == 0:
            raise UsageError(f"size={self.size} has no middle: a mixer needs an odd side.")

    def __call__(
        self, x: Float[Array, "b h w c"], context: Context, train: bool = False
    ) -> Float[Array, "b h w c"]:
        """Mixes every place with its neighbours."""
        return average(x, self.size) - x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def average(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b h w c"]:
    """The mean over `size` x `size` places around each, of those on the map.

    Rows and columns one after another, as sums of shifted maps: on CPUs XLA fuses these with what stands
    around them, where its own windowed sum is a scalar loop. The sums are symmetric, so the gradient is the
    same sums over the gradient divided by the counts; taken apart by autodiff they cost five times as much.
    """
    return _sums(x, size) * _weight(x, size)


def _forward(x: Float[Array, "b h w c"], size: int) -> tuple[Float[Array, "b h w c"], None]:
    return average(x, size), None


def _backward(size: int, _: None, g: Float[Array, "b h w c"]) -> tuple[Float[Array, "b h w c"]]:
    return (_sums(g * _weight(g, size), size),)


average.defvjp(_forward, _backward)


def _sums(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b h w c"]:
    """Sums over `size` x `size` neighbours, with zeros beyond the edges."""
    (height, width), edge = x.shape[1:3], (size // 2, size // 2)
    rows = jnp.pad(x, ((0, 0), edge, (0, 0), (0, 0)))  # [B, H + k - 1, W, C]
    x = functools.reduce(jnp.add, (rows[:, i : i + height] for i in range(size)))  # [B, H, W, C]
    columns = jnp.pad(x, ((0, 0), (0, 0), edge, (0, 0)))  # [B, H, W + k - 1, C]
    return functools.reduce(jnp.add, (columns[:, :, i : i + width] for i in range(size)))  # [B, H, W, C]


def _weight(x: Float[Array, "b h w c"], size: int) -> Float[Array, "1 h w 1"]:
    """One over the number of neighbours on the map."""
    rows, columns = (1 / _counts(side, size) for side in x.shape[1:3])
    return jnp.asarray(rows[None, :, None, None] * columns[None, None, :, None], x.dtype)


def _counts(length: int, size: int) -> Float[np.ndarray, " length"]:
    """How many of `size` neighbours along an axis stand on the map."""
    place = np.arange(length)
    last, first = np.minimum(place + size // 2, length - 1), np.maximum(place - size // 2, 0)
    return (last - first + 1).astype(np.float64)
