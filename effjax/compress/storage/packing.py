"""Codes of 1 to 8 bits in whole bytes.

A code of `bits` bits is cut into pieces of 8, 4, 2 or 1 bits, the low one first; pieces of a width fill bytes
by themselves, so that no code crosses a byte:

    8 = 8    7 = 4 + 2 + 1    6 = 4 + 2    5 = 4 + 1    4 = 4    3 = 2 + 1    2 = 2    1 = 1

A byte holds the pieces of 8 / width codes that follow each other along an axis, from its lowest bit on. So a
matrix that is cut between devices along that axis is cut between bytes.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt8

from effjax.errors import UsageError

Planes = tuple[UInt8[Array, "..."], ...]


def widths(bits: int) -> tuple[int, ...]:
    """Widths of the pieces of a code, the low piece first.

    Raises:
      UsageError: for bits that are not from 1 to 8.
    """
    if not 1 <= bits <= 8:
        raise UsageError(f"bits={bits} is not from 1 to 8.")
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def packed_size(count: int, width: int) -> int:
    """Bytes that hold `count` pieces."""
    return -(-count * width // 8)


def pack(codes: UInt8[Array, "..."], bits: int, axis: int = -2) -> Planes:
    """Bytes of the codes, a plane for each piece; the last byte is filled up with zeros.

    Args:
      codes: below 2^bits.
      bits: of a code.
      axis: along which codes share bytes.
    """
    axis, low, planes = axis % codes.ndim, 0, []
    for width in widths(bits):
        piece = (codes >> low) & (2**width - 1)  # [.., K, ..]
        each = 8 // width
        pad = [(0, 0)] * codes.ndim
        pad[axis] = (0, -codes.shape[axis] % each)
        piece = jnp.pad(piece, pad)
        parted = piece.reshape(*piece.shape[:axis], -1, each, *piece.shape[axis + 1 :])
        shifts = jnp.arange(0, 8, width, dtype=jnp.uint8)
        shifts = shifts.reshape(each, *[1] * (codes.ndim - axis - 1))
        shifted = jax.lax.shift_left(parted, jnp.broadcast_to(shifts, parted.shape))
        planes.append(jnp.sum(shifted, axis + 1, dtype=jnp.uint8))  # [.., K / each, ..]
        low += width
    return tuple(planes)


def unpack(planes: Planes, bits: int, count: int, axis: int = -2) -> UInt8[Array, "..."]:
    """The codes that `pack` was given.

    Args:
      planes: its bytes.
      bits: of a code.
      count: codes along the axis.
      axis: along which they share bytes.
    """
    axis, low = axis % planes[0].ndim, 0
    codes = None
    for plane, width in zip(planes, widths(bits), strict=True):
        pieces = [(plane >> at) & (2**width - 1) for at in range(0, 8, width)]
        piece = jnp.stack(pieces, axis + 1)  # [.., K / each, each, ..]
        piece = piece.reshape(*plane.shape[:axis], -1, *plane.shape[axis + 1 :])
        piece = jax.lax.slice_in_dim(piece, 0, count, axis=axis) << low  # [.., K, ..]
        codes = piece if codes is None else codes | piece
        low += width
    assert codes is not None
    return codes
