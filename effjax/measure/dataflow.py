"""Which of three products of a few rows with a matrix is the fastest here, measured once for each matrix.

    rows < M1                a product for each row (GEMV)
    M1 <= rows < M2          rows padded to a multiple of 8 (flat GEMM)
    M2 <= rows               the backend's own product of matrices (GEMM)

A decoding step multiplies as many rows as there are sequences, 1 to 64, with matrices of few shapes. M1 and
M2 are where the fastest way changes; they depend on the matrix and on the device, and stand in a table.

Hong et al., "FlashDecoding++", MLSys 2024, arXiv:2311.01282, section 5; there the flat product keeps two
blocks in shared memory (section 4), which here is the backend's affair.
"""

import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float

from effjax.errors import UsageError
from effjax.measure.latency import compare

FLAT = 8
ROWS = (1, 2, 4, 8, 16, 32, 64)

Shape = tuple[int, int]


def row_by_row(x: Float[Array, "m k"], w: Float[Array, "k n"]) -> Float[Array, "m n"]:
    """A matrix times a vector for each row."""
    return jax.lax.map(lambda row: row @ w, x)


def flat(x: Float[Array, "m k"], w: Float[Array, "k n"]) -> Float[Array, "m n"]:
    """A product of a multiple of 8 rows, of which the last may be zeros."""
    rows = x.shape[0]
    padded = jnp.pad(x, ((0, -rows % FLAT), (0, 0)))
    return (padded @ w)[:rows]


def general(x: Float[Array, "m k"], w: Float[Array, "k n"]) -> Float[Array, "m n"]:
    """The backend's own product."""
    return x @ w


WAYS: Mapping[str, Callable[[Array, Array], Array]] = types.MappingProxyType(
    {"row_by_row": row_by_row, "flat": flat, "general": general}
)


@dataclasses.dataclass(frozen=True)
class Points:
    """Where the fastest way changes.

    Attributes:
      first: M1, the fewest rows that are not multiplied one by one.
      second: M2, the fewest rows that are left to the backend.
    """

    first: int
    second: int

    def way(self, rows: int) -> str:
        """The name of the way for so many rows."""
        return "row_by_row" if rows < self.first else "flat" if rows < self.second else "general"


@dataclasses.dataclass(frozen=True)
class Dataflow:
    """What was measured on one device.

    Attributes:
      device: its kind, as JAX names it.
      points: of each matrix by its sizes (N, K), outputs and inputs.
    """

    device: str
    points: Mapping[Shape, Points]

    def product(self, x: Float[Array, "m k"], w: Float[Array, "k n"]) -> Float[Array, "m n"]:
        """The product, in the fastest way.

        Raises:
          UsageError: for a matrix that was not measured.
        """
        inputs, outputs = w.shape
        if (outputs, inputs) not in self.points:
            known = ", ".join(map(str, self.points))
            raise UsageError(
                f"no matrix of {(outputs, inputs)} outputs and inputs was measured on {self.device}: measure "
                f"it too. Known: {known}."
            )
        return WAYS[self.points[outputs, inputs].way(x.shape[0])](x, w)


def inflections(rows: Sequence[int], seconds: Mapping[str, Sequence[float]]) -> Points:
    """The two points that lose least time, summed over all measured numbers of rows.

    Each number of rows counts alike: what is summed are times over the fastest way's.

    Args:
      rows: ascending.
      seconds: of each way in `WAYS`, for each number of rows.

    Raises:
      UsageError: for rows that do not ascend, or times of other ways.
    """
    if not rows or list(rows) != sorted(set(rows)) or set(seconds) != set(WAYS):
        raise UsageError(f"rows={list(rows)} must ascend, and times be given for {', '.join(WAYS)}.")
    times = np.asarray([seconds[name] for name in WAYS])  # [3, rows]
    lost = times / times.min(axis=0)
    borders = [*rows, rows[-1] + 1]
    best = min(
        (
            (lost[0, :i].sum() + lost[1, i:j].sum() + lost[2, j:].sum(), i, j)
            for i in range(len(borders))
            for j in range(i, len(borders))
        ),
    )
    return Points(borders[best[1]], borders[best[2]])


def measure_dataflow(
    shapes: Sequence[Shape],
    rows: Sequence[int] = ROWS,
    dtype: DTypeLike = jnp.float32,
    repeats: int = 20,
) -> Dataflow:
    """Times the three ways on the device in front of you.

    Args:
      shapes: (N, K) of each matrix, outputs and inputs.
      rows: numbers of rows to try, ascending.
      dtype: of both operands.
      repeats: runs of each that count; their median is taken.

    Raises:
      UsageError: as `inflections` does.
    """
    points = {}
    for outputs, inputs in shapes:
        seconds: dict[str, list[float]] = {name: [] for name in WAYS}
        w = jax.random.normal(jax.random.key(0), (inputs, outputs)).astype(dtype)
        for count in rows:
            x = jax.random.normal(jax.random.key(count), (count, inputs)).astype(dtype)
            ways = {name: jax.jit(way) for name, way in WAYS.items()}
            timed = compare(ways, [(x, w)], repeats=repeats, costs={})
            for name in WAYS:
                seconds[name].append(timed.timings[name].median)
        points[outputs, inputs] = inflections(rows, seconds)
    return Dataflow(jax.devices()[0].device_kind, types.MappingProxyType(points))
