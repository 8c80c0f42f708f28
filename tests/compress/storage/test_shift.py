import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress.storage.shift import Shift, ShiftTensor, block_product, blocked, shifts_for
from effjax.compress.storage.uniform import Uniform
from effjax.errors import UsageError
from effjax.layers.stored import Place

PLACE = Place((32, 3, 4), ("embed", "heads", "head_dim"), (32,), (3, 4), False)
TABLE = Place((20, 32), ("vocab", "embed"), (32,), (20,), True)


def test_the_published_compression_is_that_of_tiles_of_1024_weights():
    assert round(32 / Shift(4, 32, 32).bits_a_weight(768, 3072), 3) == 7.988
    place = Place((256, 128), ("embed", "mlp"), (256,), (128,), False)
    held = Shift(4, 32, 32).store(jnp.zeros(place.shape), place)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(held)) * 8 / 256 / 128 == 4 + 6 / 1024


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_error_is_half_a_step(bits, draw):
    kernel = jnp.asarray(draw.standard_t(2, PLACE.shape) * draw.lognormal(0, 2, (32, 1, 1)), jnp.float32)
    layout = Shift(bits, 8, 5)
    held = jax.jit(layout.store, static_argnums=1)(kernel, PLACE)
    w, back = (np.asarray(a, np.float64).reshape(32, 12) for a in (kernel, held.whole(jnp.float32)))
    for i in range(4):
        for j in range(3):
            tile = slice(8 * i, 8 * i + 8), slice(5 * j, 5 * j + 5)
            most = np.abs(w[tile]).max() / (2 ** (bits - 1) - 1)
            step = 2.0 ** np.ceil(np.log2(most))
            np.testing.assert_array_equal(back[tile], np.round(w[tile] / step) * step)
            assert np.abs(back[tile] - w[tile]).max() <= step / 2 <= most


def test_a_power_of_two_leaves_the_codes(draw):
    x = jnp.asarray(draw.normal(size=(3, 16)), jnp.float32)
    a, b = blocked(x, 8, 8), blocked(x * 2.0**-7, 8, 8)
    np.testing.assert_array_equal(a.codes, b.codes)
    np.testing.assert_array_equal(a.shift, b.shift + 7)
    exact = jnp.asarray([7.0, 7.000001, 14.0, 0.0])
    np.testing.assert_array_equal(shifts_for(exact, 4), [0, 1, 1, -48])


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_block_by_block_are_the_product_of_what_they_stand_for(bits, draw):
    x = jnp.asarray(draw.normal(size=(2, 5, 32)), jnp.float32)
    kernel = jnp.asarray(draw.normal(size=PLACE.shape), jnp.float32)
    held = jax.jit(Shift(bits, 8, 5, inputs=8).store, static_argnums=1)(kernel, PLACE)
    a = blocked(x, 8, 8)
    expected = np.einsum("bnk,kij->bnij", np.asarray(a.numbers(), np.float64),
                         np.asarray(held.whole(jnp.float32), np.float64))  # fmt: skip
    np.testing.assert_allclose(jax.jit(ShiftTensor.product)(held, x), expected, rtol=1e-6, atol=2e-6)
    # One block alone has no rounding at all.
    one = blocked(x[0, :, :8], 8, 8)
    codes, shift = held.signed().reshape(4, 8, 12)[:1], held.shifts()[:1]
    floats = np.asarray(one.numbers(), np.float64) @ np.asarray(held.matrix()[:8], np.float64)
    np.testing.assert_array_equal(block_product(one, codes, shift), floats)


def test_blocks_beat_a_layer_on_heavy_tails(draw):
    place = Place((64, 64), ("embed", "mlp"), (64,), (64,), False)
    kernel = jnp.asarray(draw.standard_t(2, place.shape), jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def error(layout):
        return jnp.mean((layout.store(kernel, place).whole(jnp.float32) - kernel) ** 2)

    sizes = [error(Shift(4, size, size)) for size in (8, 32, 64)]
    assert sizes == sorted(sizes)
    assert sizes[0] < 0.5 * error(Uniform(4, -1))


def test_a_table_is_read_by_rows(draw):
    table = jnp.asarray(draw.normal(size=TABLE.shape), jnp.float32)
    held = jax.jit(Shift(8, 32, 4).store, static_argnums=1)(table, TABLE)
    assert held.shape == TABLE.shape
    ids = jnp.asarray([[3, 19], [0, 3]])
    np.testing.assert_array_equal(held.take(ids), held.whole(jnp.float32)[ids])
    np.testing.assert_allclose(held.take(ids), table[ids], atol=0.03)


def test_axes_in_front_and_names(draw):
    place = Place((2, *PLACE.shape), ("layers", *PLACE.names), PLACE.ins, PLACE.outs, False)
    kernel = jnp.asarray(draw.normal(size=place.shape), jnp.float32)
    layout = Shift(3, 8, 5)
    store = jax.jit(layout.store, static_argnums=1)
    held, alone = store(kernel, place), store(kernel[1], PLACE)
    assert held.shape == place.shape
    sliced = jax.tree.map(lambda leaf: leaf[1], held)
    np.testing.assert_array_equal(sliced.whole(jnp.float32), alone.whole(jnp.float32))
    told = jax.tree.map(lambda leaf, name: leaf.ndim == len(name), held, layout.names(place))
    assert all(jax.tree.leaves(told))


def test_tiles_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="rows=5 does not divide the 32"):
        Shift(4, 5).store(jnp.zeros(PLACE.shape), PLACE)
    with pytest.raises(UsageError, match="bits=9"):
        Shift(9)
    with pytest.raises(UsageError, match="blocks of 5"):
        blocked(jnp.zeros((2, 12)), 5, 8)
