"""Matrix products in tiles: the ceilings by hand, the compiler's counts, and a forest on a measured sweep."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import UsageError
from effjax.measure.analytic import gemm as room
from effjax.measure.analytic.gemm import Gemm, Machine

A100 = Machine(312e12, 2e12, processors=108)


@pytest.mark.parametrize("sizes", [(64, 96, 32), (33, 17, 129)])
def test_flops_and_bytes_are_the_compilers(sizes):
    m, n, k = sizes
    operands = jax.ShapeDtypeStruct((m, k), jnp.float32), jax.ShapeDtypeStruct((k, n), jnp.float32)
    counted = jax.jit(jnp.matmul).lower(*operands).compile().cost_analysis()
    assert Gemm(m, n, k).flops == counted["flops"]
    assert Gemm(m, n, k).bytes == counted["bytes accessed"]


@pytest.mark.parametrize("tile", [(128, 128), (64, 256), (100, 30), (5000, 5000)])
@pytest.mark.parametrize("m", [1, 127, 128, 129, 4096])
def test_waste_is_the_ceilings(tile, m):
    gemm = Gemm(m, 1000, 64)
    shape = room.quantise(gemm, tile, 108)
    rows, columns = -(-m // tile[0]), -(-1000 // tile[1])
    assert (shape.tiles, shape.waves) == (rows * columns, -(-rows * columns // 108))
    assert shape.padding == rows * tile[0] * columns * tile[1] / (m * 1000)
    waste = math.ceil(shape.tiles / 108) / (shape.tiles / 108)
    compute = gemm.flops * shape.padding / 312e12 * waste
    assert room.seconds(gemm, tile, A100) == pytest.approx(max(compute, gemm.bytes / 2e12))
    # The same by counting: every wave takes as long as one processor needs for a whole tile.
    assert compute == pytest.approx(shape.waves * 2 * tile[0] * tile[1] * 64 / (312e12 / 108))


def test_one_tile_too_many_doubles_the_time():
    whole, over = Gemm(108 * 128, 256, 4096, 2), Gemm(109 * 128, 256, 4096, 2)
    assert room.quantise(whole, (128, 256), 108).occupancy == 1
    ratio = room.seconds(over, (128, 256), A100) / room.seconds(whole, (128, 256), A100)
    assert ratio == pytest.approx(2)


def test_time_grows_with_work():
    times = [room.seconds(Gemm(m, 1000, 512), (64, 64), A100) for m in range(1, 4000, 37)]
    assert times == pytest.approx(sorted(times), rel=1e-12)
    deep = [room.seconds(Gemm(512, 512, k), (64, 64), A100) for k in (1, 64, 512, 4096)]
    assert deep == sorted(set(deep))


def test_the_advice_is_the_least_time():
    gemm = Gemm(109 * 128, 256, 4096, 2)
    tiles = [(128, 256), (64, 256), (256, 256)]
    best = room.advise(gemm, tiles, A100)
    assert best == (64, 256)  # 218 tiles in 3 waves of half the work beat 109 in 2
    assert room.seconds(gemm, best, A100) == min(room.seconds(gemm, tile, A100) for tile in tiles)
    assert room.advise(gemm, tiles, A100, predict=lambda gemm, tile, machine: -tile[0]) == (256, 256)


def test_energy_is_power_times_time():
    assert room.joules(200, 0.5) == 100


def test_a_dense_layer():
    assert Gemm.of_dense(tokens=7, inputs=11, outputs=13) == Gemm(7, 13, 11, 2)
    gemm = Gemm.of_dense(tokens=4096, inputs=1024, outputs=4096)  # the module's example
    assert room.advise(gemm, [(64, 64), (128, 128), (256, 128)], A100) == (64, 64)


@pytest.mark.parametrize("tile", [(8, 8), (5, 7), (64, 64)])
def test_blocks_multiply_like_the_whole(tile):
    a, b = (jax.random.normal(jax.random.key(s), shape) for s, shape in ((0, (24, 9)), (1, (9, 33))))
    np.testing.assert_allclose(room.blocked_matmul(a, b, tile), a @ b, rtol=1e-5, atol=1e-5)


def sweep(sizes, tiles):
    gemms = [Gemm(*shape) for shape in itertools.product(sizes, repeat=3)]
    return gemms, np.stack([room.features(g, t, 1) for g in gemms for t in tiles])


def test_the_forest_learns_the_closed_form():
    """Two targets at once, and it is scikit-learn's forest, tree for tree."""
    from sklearn.ensemble import RandomForestRegressor

    tiles = [(32, 32), (128, 64)]
    gemms, rows = sweep([64, 200, 512, 1000, 3000], tiles)
    time = np.array([room.seconds(g, t, A100) for g in gemms for t in tiles])
    forest = room.fit(rows, np.stack([time, time**0.1], axis=1), trees=20)
    assert len(forest.r2) == 2
    assert min(forest.r2) > 0.9
    assert forest.predict(rows).shape == (250, 2)
    single = room.fit(rows, time[:, None], trees=5, held_out=0.2, seed=3)
    from sklearn.model_selection import train_test_split

    train, _, known, _ = train_test_split(rows, np.log(time), test_size=0.2, random_state=3)
    theirs = RandomForestRegressor(n_estimators=5, random_state=3).fit(train, known)
    np.testing.assert_array_equal(single.predict(rows)[:, 0], np.exp(theirs.predict(rows)))
    noise = np.random.default_rng(0).uniform(1, 2, size=(250, 1))
    assert room.fit(rows, noise, trees=20).r2[0] < 0.3


@pytest.mark.slow
def test_a_measured_sweep_is_predicted():
    """Of log time, over 81 blocked products on this CPU; the paper has 0.98, of time, on its GPU."""
    tiles = [(16, 16), (32, 64), (64, 64)]
    gemms, rows = sweep([32, 96, 288], tiles)
    times = room.measure(gemms, tiles, repeats=5)
    assert room.fit(rows, times, held_out=0.3).r2[0] > 0.9


def test_wrong_requests():
    with pytest.raises(UsageError, match=r"tile=\(0, 8\) and processors=1 must be at least 1"):
        room.quantise(Gemm(8, 8, 8), (0, 8), 1)
    with pytest.raises(UsageError, match="at least one tile"):
        room.advise(Gemm(8, 8, 8), [], A100)
    with pytest.raises(UsageError, match="must be positive"):
        room.fit(np.ones((4, 12)), np.zeros((4, 1)))
