"""The product with a matrix of codes that is never unpacked as a whole.

    y[r, n] = sum_g s[g, n] ( sum_{k in g} x[r, k] c[k, n]  -  z[g, n] sum_{k in g} x[r, k] )

With few rows the time is that of reading the codes. XLA on a CPU would write the unpacked matrix to memory
first, or walk it by columns. A dozen rows of codes, each unpacked, multiplied by its number and added, is one
loop over columns that it makes no temporaries for: at 2048 x 8192 and 4 bits 1.0 to 1.4 ms where the unpacked
product takes 60, and the bfloat16 matrix itself, read in the best way, 1.0 (jax 0.10.1, two cores).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from effjax.compress.storage.packing import Planes, widths

# Rows of bytes in one loop: more and the loop runs out of registers, fewer and it reads its sum too often.
STEP = 16


def few_rows(
    x: Float[Array, "r k"],
    planes: Planes,
    bits: int,
    scale: Float[Array, "g n"],
    zero: Float[Array, "g n"] | float,
) -> Float[Array, "r n"]:
    """The product for a few rows, in float32.

    Args:
      x: the rows.
      planes: codes, packed along k.
      bits: of a code.
      scale: of each group of k / g codes.
      zero: the code that stands for 0, of each group or of all.
    """
    x, scale = x.astype(jnp.float32), scale.astype(jnp.float32)
    groups = scale.shape[0]
    total = jnp.sum(x.reshape(x.shape[0], groups, -1), -1)  # [R, G]
    y = -(total @ (scale * zero))  # [R, N]
    low = 0
    for plane, width in zip(planes, widths(bits), strict=True):
        y = y + _of_plane(x, plane, width, scale * 2**low)
        low += width
    return y


def _of_plane(
    x: Float[Array, "r k"], plane: UInt8[Array, "bytes n"], width: int, scale: Float[Array, "g n"]
) -> Float[Array, "r n"]:
    """sum_g s[g, n] sum_{k in g} x[r, k] p[k, n], for the pieces p of one plane."""
    each, groups = 8 // width, scale.shape[0]
    rows, count = x.shape[0], plane.shape[0] * each
    x = jnp.pad(x, ((0, 0), (0, count - x.shape[1])))  # the last byte may hold fewer
    size = plane.shape[0] // groups if plane.shape[0] % groups == 0 else 0
    if not size:  # groups share bytes: give every group its own
        return _apart(x, plane, width, scale)
    step = next(step for step in range(min(STEP, size), 0, -1) if size % step == 0)

    def add(y: Float[Array, "r n"], at: Array) -> tuple[Float[Array, "r n"], None]:
        # Tied to the counter, the codes are not unpacked as a whole before the loop.
        kept, at = jax.lax.optimization_barrier((plane, at))
        codes = jax.lax.dynamic_slice_in_dim(kept, at * step, step)  # [step, N]
        numbers = jax.lax.dynamic_slice_in_dim(x, at * step * each, step * each, 1)  # [R, step each]
        part = jnp.zeros_like(y)
        for i in range(step):
            for j in range(each):
                piece = (codes[i] >> (width * j)) & (2**width - 1)  # [N]
                part = part + numbers[:, i * each + j, None] * piece.astype(jnp.float32)[None]
        factor = jax.lax.dynamic_slice_in_dim(scale, at * step // size, 1)  # [1, N]
        return y + part * factor, None

    start = jnp.zeros((rows, plane.shape[1]), jnp.float32)
    return jax.lax.scan(add, start, jnp.arange(plane.shape[0] // step))[0]


def _apart(
    x: Float[Array, "r k"], plane: UInt8[Array, "bytes n"], width: int, scale: Float[Array, "g n"]
) -> Float[Array, "r n"]:
    """The same where a byte holds codes of two groups: every code is given its own scale."""
    pieces = jnp.stack([(plane >> at) & (2**width - 1) for at in range(0, 8, width)], 1)
    pieces = pieces.reshape(-1, plane.shape[1]).astype(jnp.float32)  # [K, N]
    whole = scale.shape[0] * (x.shape[1] // scale.shape[0])
    factors = jnp.repeat(scale, whole // scale.shape[0], 0)  # [K, N]
    return x[:, :whole] @ (pieces[:whole] * factors)
