import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress.storage.binary_coding import (
    BinaryCoded,
    BinaryCoding,
    fitted,
    from_uniform,
    looked_up,
    tables_of,
    work,
)
from effjax.compress.storage.matrices import flat
from effjax.compress.storage.uniform import Uniform
from effjax.errors import UsageError
from effjax.layers.stored import Place

STORE = jax.jit(lambda layout, kernel, place: layout.store(kernel, place), static_argnums=(0, 2))
PLACE = Place((32, 3, 4), ("embed", "heads", "head_dim"), (32,), (3, 4), False)


def kernel_of(draw, place=PLACE):
    return jnp.asarray(draw.normal(size=place.shape), jnp.float32)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("tables", [True, False])
def test_uniform_codes_are_signs_to_the_bit(bits, symmetric, tables, draw):
    if symmetric and bits == 1:
        return
    held = Uniform(bits, 8, symmetric).store(kernel_of(draw), PLACE)
    coded = from_uniform(held, tables=tables)
    np.testing.assert_array_equal(coded.whole(jnp.float32), held.whole(jnp.float32))
    x = jnp.asarray(draw.normal(size=(2, 32)), jnp.float32)
    expected = np.einsum("rk,kab->rab", np.asarray(x, np.float64), np.asarray(held.whole(jnp.float32)))
    np.testing.assert_allclose(jax.jit(BinaryCoded.product)(coded, x), expected, atol=1e-4)


def test_every_code_of_every_grid_converts(draw):
    """All 2^q codes with all zeros, with no matrix that would miss one."""
    for bits in (2, 8):
        place = Place((2**bits, 5), ("embed", "mlp"), (2**bits,), (5,), False)
        layout = Uniform(bits, 0, False)
        codes = jnp.broadcast_to(jnp.arange(2**bits, dtype=jnp.uint8)[:, None], place.shape)
        zero = jnp.asarray(draw.integers(0, 2**bits, (1, 5)), jnp.float32)
        held = layout.held(codes, jnp.asarray(draw.uniform(0.01, 1.0, (1, 5)), jnp.float32), zero, place)
        np.testing.assert_array_equal(from_uniform(held, tables=False).matrix(), held.matrix())


def test_a_table_holds_every_sum(draw):
    x = draw.normal(size=(2, 13)).astype(np.float32)
    sums = tables_of(jnp.asarray(x))
    assert sums.shape == (2, 2, 256)
    padded = np.pad(x, ((0, 0), (0, 3))).reshape(2, 2, 8)
    signs = 2.0 * ((np.arange(256)[:, None] >> np.arange(8)) & 1) - 1
    np.testing.assert_allclose(sums, np.einsum("rsj,tj->rst", padded, signs), atol=1e-5)


def test_looking_up_is_multiplying(draw):
    place = Place((64, 24), ("embed", "mlp"), (64,), (24,), False)
    x = jnp.asarray(draw.normal(size=(3, 64)), jnp.float32)
    for bits, group in ((1, 0), (3, 16)):
        held = STORE(BinaryCoding(bits, group, 1, scale="float32"), kernel_of(draw, place), place)
        expected = np.asarray(x, np.float64) @ np.asarray(held.whole(jnp.float32), np.float64)
        np.testing.assert_allclose(jax.jit(looked_up)(x, held), expected, atol=1e-4)


def test_the_fit_is_that_of_its_steps(draw):
    """Greedy against float64 NumPy; more planes and more rounds never make the error larger."""
    weights = draw.normal(size=(6, 32)).astype(np.float32)
    fit = jax.jit(fitted, static_argnums=(1, 2))

    def error(bits, rounds):
        alpha, offset, signs = fit(jnp.asarray(weights), bits, rounds)
        assert set(np.unique(signs)) <= {-1.0, 1.0}
        told = np.einsum("mq,mqg->mg", np.asarray(alpha), np.asarray(signs)) + np.asarray(offset)[:, None]
        return np.sum((weights - told) ** 2, 1)

    rest = weights.astype(np.float64) - weights.mean(1, keepdims=True, dtype=np.float64)
    greedy = []
    for bits in (1, 2):
        rest = rest - np.abs(rest).mean(1, keepdims=True) * np.where(rest < 0, -1, 1)
        greedy.append(error(bits, 0))
        np.testing.assert_allclose(greedy[-1], np.sum(rest**2, 1), rtol=1e-4)
        refined = [greedy[-1], error(bits, 1), error(bits, 8)]
        assert np.all(np.diff(refined, axis=0) <= 1e-5)
    assert np.all(np.diff(greedy, axis=0) < 0)
    assert refined[-1].sum() < 0.95 * refined[0].sum()


def test_planes_that_were_planted_are_found(draw):
    signs = draw.choice([-1.0, 1.0], (2, 64))
    weights = jnp.asarray(np.array([1.0, 0.3]) @ signs + 0.2, jnp.float32)[None]
    alpha, offset, found = jax.jit(fitted, static_argnums=(1, 2))(weights, 2, 10)
    told = np.sum(alpha[..., None] * found, -2) + offset[:, None]
    np.testing.assert_allclose(told, weights, atol=1e-3)


def test_finer_groups_and_more_planes_err_less(draw):
    place = Place((64, 8), ("embed", "mlp"), (64,), (8,), False)
    kernel = kernel_of(draw, place).at[:, :2].multiply(jnp.asarray(draw.choice([1.0, 10.0], (64, 1))))

    def error(bits, group):
        held = STORE(BinaryCoding(bits, group, 2, scale="float32"), kernel, place)
        return float(jnp.mean((held.whole(jnp.float32) - kernel) ** 2))

    assert error(3, 32) < error(2, 32) < error(2, 0)


BITS = {
    BinaryCoding(3, 128): 3.5,
    BinaryCoding(4, 0): 4.3125,
    BinaryCoding(2, 32): 3.5,
}


@pytest.mark.parametrize(("layout", "bits"), BITS.items())
def test_bits_a_weight(layout, bits):
    """q + 16 q / g as the paper counts, and 16 / g for the offset."""
    place = Place((256, 64), ("embed", "mlp"), (256,), (64,), False)
    held = jax.eval_shape(lambda: layout.store(jnp.zeros(place.shape), place))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(held))
    assert layout.bits_a_weight(256, 64) == size * 8 / 256 / 64 == bits


def test_work_is_the_papers():
    """Reading is q / mu of the products; building is small where there are many outputs."""
    build, read = work(12288, 49152, 3)
    assert read == 12288 * 49152 * 3 // 8
    assert build / read < 0.002


def test_axes_in_front_and_names(draw):
    place = Place((2, *PLACE.shape), ("layers", *PLACE.names), PLACE.ins, PLACE.outs, False)
    kernel, layout = kernel_of(draw, place), BinaryCoding(2, 8, 2)
    held, names = STORE(layout, kernel, place), layout.names(place)
    assert held.shape == kernel.shape
    for leaf, name in zip(jax.tree.leaves(held), (names.signs, names.alpha, names.offset), strict=True):
        assert leaf.ndim == len(name)
    second = jax.tree.map(lambda leaf: leaf[1], held)
    alone = STORE(layout, kernel[1], PLACE)
    np.testing.assert_allclose(second.whole(jnp.float32), alone.whole(jnp.float32), atol=1e-5)
    np.testing.assert_allclose(flat(held.whole(jnp.float32), place)[1], alone.matrix(), atol=1e-5)


def test_what_cannot_be_is_refused():
    with pytest.raises(UsageError, match="no multiple of the 8 signs"):
        BinaryCoding(2, 12).groups(24)
    with pytest.raises(UsageError, match="group=-1"):
        BinaryCoding(2, -1)
    held = Uniform(4, -1).store(jnp.ones(PLACE.shape), PLACE)
    with pytest.raises(UsageError, match="one scale for the matrix"):
        from_uniform(held)
