"""Time and energy of a matrix product cut into tiles: a closed form, and a forest fitted to measurements.

C[m, n] = sum_k A[m, k] B[k, n] in tiles of t_m x t_n, one a processor at a time:

    tiles = batch ceil(m / t_m) ceil(n / t_n),   waves = ceil(tiles / S),   occupancy = tiles / (waves S)
    padding = ceil(m / t_m) t_m ceil(n / t_n) t_n / (m n)         work on rows and columns that do not exist
    seconds = max(2 m n k padding / (F occupancy), bytes / B)     S processors, F FLOP/s, B bytes/s
    joules = watts seconds

Idle processors slow the arithmetic alone: were the memory's time divided by the occupancy as well, a product
bound by memory would become faster with every row that is added to it.

Source: Liu and Halim, "Understanding GEMM Performance and Energy on NVIDIA Ada Lovelace: A Machine
Learning-Based Analytical Approach", 2024, arXiv:2411.16954. Features, forest (100 trees of depth 6, a fifth
held out) and energy as power times time are those of its code, github.com/pavlyhalim/GPPerf; it has no closed
form. Its power was measured on an RTX 4070 and cannot be had without one: watts are an input here.

    >>> gemm = Gemm.of_dense(tokens=4096, inputs=1024, outputs=4096)
    >>> advise(gemm, [(64, 64), (128, 128), (256, 128)], Machine(312e12, 2e12, processors=108))
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.measure.analytic.shape import Number
from effjax.measure.latency import time_function

Tile = tuple[int, int]
"""Rows and columns of the result that one processor computes at a time."""


@dataclasses.dataclass(frozen=True)
class Gemm:
    """`[m, k]` times `[k, n]`, `batch` of them at once."""

    m: int
    n: int
    k: int
    element_bytes: Number = 4
    batch: int = 1

    @classmethod
    def of_dense(cls, tokens: int, inputs: int, outputs: int, element_bytes: Number = 2) -> "Gemm":
        """A dense layer on so many tokens."""
        return cls(tokens, outputs, inputs, element_bytes)

    @property
    def flops(self) -> int:
        """Two for each multiply-accumulate."""
        return 2 * self.batch * self.m * self.n * self.k

    @property
    def bytes(self) -> Number:
        """Both operands read and the result written once: no tile is read twice from memory."""
        return self.batch * (self.m * self.k + self.k * self.n + self.m * self.n) * self.element_bytes

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.bytes


@dataclasses.dataclass(frozen=True)
class Machine:
    """What runs the tiles."""

    peak: Number
    """FLOP/s of all processors together."""
    bandwidth: Number
    """Bytes/s of memory."""
    processors: int
    """Streaming multiprocessors, cores: what takes one tile at a time."""


@dataclasses.dataclass(frozen=True)
class Quantisation:
    """How a tiling meets a machine."""

    tiles: int
    waves: int
    occupancy: float
    """Share of the processors that is busy, averaged over the waves."""
    padding: float
    """Work done over work asked for; 1 where tiles are whole."""


def quantise(gemm: Gemm, tile: Tile, processors: int) -> Quantisation:
    """Counts tiles and waves.

    Raises:
      UsageError: for a tile or a number of processors below one.
    """
    if min(*tile, processors) < 1:
        raise UsageError(f"tile={tile} and processors={processors} must be at least 1.")
    rows, columns = math.ceil(gemm.m / tile[0]), math.ceil(gemm.n / tile[1])
    tiles = gemm.batch * rows * columns
    waves = math.ceil(tiles / processors)
    done = rows * tile[0] * columns * tile[1]
    return Quantisation(tiles, waves, tiles / (waves * processors), done / (gemm.m * gemm.n))


def seconds(gemm: Gemm, tile: Tile, machine: Machine) -> float:
    """The closed form above."""
    shape = quantise(gemm, tile, machine.processors)
    compute = gemm.flops * shape.padding / (machine.peak * shape.occupancy)
    return max(compute, gemm.bytes / machine.bandwidth)


def joules(power: Number, time: Number) -> Number:
    """Energy of `time` seconds at `power` watts."""
    return power * time


def advise(
    gemm: Gemm,
    tiles: Iterable[Tile],
    machine: Machine,
    predict: Callable[[Gemm, Tile, Machine], float] = seconds,
) -> Tile:
    """Returns the tile of the least predicted time, the first of equals.

    Raises:
      UsageError: without tiles.
    """
    tiles = tuple(tiles)
    if not tiles:
        raise UsageError("advise needs at least one tile to choose from.")
    return min(tiles, key=lambda tile: predict(gemm, tile, machine))


FEATURES = (
    "m",
    "n",
    "k",
    "flops",
    "bytes",
    "intensity",
    "tile_m",
    "tile_n",
    "tiles",
    "waves",
    "occupancy",
    "padding",
)


def features(gemm: Gemm, tile: Tile, processors: int) -> Float[np.ndarray, " features"]:
    """What a regressor sees of one product, in the order of `FEATURES`."""
    shape = quantise(gemm, tile, processors)
    sizes = (gemm.m, gemm.n, gemm.k, gemm.flops, gemm.bytes, gemm.intensity, *tile)
    return np.array([*sizes, *dataclasses.astuple(shape)], np.float64)


@dataclasses.dataclass(frozen=True)
class Forest:
    """Random forest from features to targets, which are positive: it is fitted to their logarithms."""

    trees: Any
    r2: tuple[float, ...]
    """Of the logarithm of each target on the held-out rows."""

    def predict(self, rows: Float[np.ndarray, "rows features"]) -> Float[np.ndarray, "rows targets"]:
        """Targets in their own units."""
        return np.exp(self.trees.predict(rows).reshape(len(rows), -1))


def fit(
    rows: Float[np.ndarray, "rows features"],
    targets: Float[np.ndarray, "rows targets"],
    *,
    held_out: float = 0.2,
    trees: int = 100,
    depth: int | None = None,
    seed: int = 0,
) -> Forest:
    """Fits one forest for all targets (time; power, where it was measured) and scores it on held-out rows.

    Args:
      rows: of `features`.
      targets: positive, a column each.
      held_out: share of rows that only score.
      trees: number of trees.
      depth: of a tree at most; None grows them whole. The paper's code stops at 6.
      seed: of the split and of the trees.

    Raises:
      UsageError: for a target that is not positive.
    """
    # scikit-learn takes a second to import, and only this function needs it.
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.metrics import r2_score
    from sklearn.model_selection import train_test_split

    if not (targets > 0).all():
        raise UsageError("targets must be positive: the forest is fitted to their logarithms.")
    train, test, known, asked = train_test_split(rows, np.log(targets), test_size=held_out, random_state=seed)
    forest = RandomForestRegressor(n_estimators=trees, max_depth=depth, random_state=seed)
    forest.fit(train, known[:, 0] if known.shape[1] == 1 else known)
    scores = r2_score(asked, forest.predict(test).reshape(asked.shape), multioutput="raw_values")
    return Forest(forest, tuple(float(score) for score in scores))


def blocked_matmul(a: Float[Array, "m k"], b: Float[Array, "k n"], tile: Tile) -> Float[Array, "m n"]:
    """The product tile by tile, one after the other; ragged tiles are padded with zeros."""
    (m, _), (_, n) = a.shape, b.shape
    strips = jnp.pad(a, ((0, -m % tile[0]), (0, 0))).reshape(-1, tile[0], a.shape[1])  # [I, t_m, K]
    columns = jnp.pad(b, ((0, 0), (0, -n % tile[1])))
    columns = columns.reshape(b.shape[0], -1, tile[1]).transpose(1, 0, 2)  # [J, K, t_n]
    y = jax.lax.map(lambda strip: jax.lax.map(lambda column: strip @ column, columns), strips)
    y = y.transpose(0, 2, 1, 3)  # [I, t_m, J, t_n]
    return y.reshape(len(strips) * tile[0], -1)[:m, :n]


def measure(gemms: Sequence[Gemm], tiles: Sequence[Tile], repeats: int = 5) -> Float[np.ndarray, "rows one"]:
    """Seconds of `blocked_matmul` in float32 on the default device: every product with every tile, the tile
    changing fastest. Each is the least of the repeats: other load on the machine only adds to them."""
    times = []
    for gemm in gemms:
        a, b = jnp.ones((gemm.m, gemm.k)), jnp.ones((gemm.k, gemm.n))
        for tile in tiles:
            run = jax.jit(lambda a, b, tile=tile: blocked_matmul(a, b, tile))
            times.append(min(time_function(run, (a, b), repeats=repeats).runs))
    return np.array(times)[:, None]
