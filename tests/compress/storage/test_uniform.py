import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress.storage.matrices import flat, unflat
from effjax.compress.storage.uniform import FEW, QTensor, Uniform
from effjax.errors import UsageError
from effjax.layers.stored import Place

PLACE = Place((32, 3, 4), ("embed", "heads", "head_dim"), (32,), (3, 4), False)
TABLE = Place((20, 32), ("vocab", "embed"), (32,), (20,), True)


def kernel_of(draw, place=PLACE):
    return jnp.asarray(draw.normal(size=place.shape), jnp.float32)


def reference(matrix, bits, group, symmetric, scale_dtype):
    """The grid of the module's docstring in float64, column by column."""
    rows, columns = matrix.shape
    out = np.zeros_like(matrix, dtype=np.float64)
    size = {0: rows, -1: rows}.get(group, group)
    for start in range(0, rows, size):
        for n in range(columns):
            w = matrix[start : start + size, n].astype(np.float64)
            seen = matrix if group == -1 else w
            low, high = min(seen.min(), 0), max(seen.max(), 0)
            s = max(-low, high) / (2 ** (bits - 1) - 1) if symmetric else (high - low) / (2**bits - 1)
            s = float(np.asarray(s, np.float32).astype(scale_dtype)) or 1.0
            z = 2 ** (bits - 1) if symmetric else np.clip(np.round(-low / s), 0, 2**bits - 1)
            c = np.clip(np.round(w / s) + z, 1 if symmetric else 0, 2**bits - 1)
            out[start : start + size, n] = s * (c - z)
    return out


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [0, -1, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_are_those_of_the_grid(bits, group, symmetric, draw):
    kernel = kernel_of(draw)
    layout = Uniform(bits, group, symmetric)
    held = jax.jit(layout.store, static_argnums=1)(kernel, PLACE)
    assert held.shape == kernel.shape
    expected = reference(np.asarray(flat(kernel, PLACE)), bits, group, symmetric, np.float16)
    np.testing.assert_allclose(flat(held.whole(jnp.float32), PLACE), expected, atol=2e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_error_is_half_a_step_and_zero_is_zero(symmetric, draw):
    kernel = kernel_of(draw).at[0].set(0.0)
    held = Uniform(4, 8, symmetric, scale="float32").store(kernel, PLACE)
    error = jnp.abs(flat(held.whole(jnp.float32) - kernel, PLACE)).reshape(4, 8, 12)
    # A zero that is rounded moves the ends of an affine grid by up to half a step more.
    assert jnp.all(error <= held.scale[:, None] * (0.5 if symmetric else 1.0) + 1e-6)
    assert jnp.all(held.whole(jnp.float32)[0] == 0)


LAYOUTS = (
    Uniform(4, 8),
    Uniform(3, 16, False),
    Uniform(8, 0),
    Uniform(2, -1, False),
    Uniform(4, 1),
    Uniform(3, 4),
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, FEW, FEW + 1])
def test_the_product_never_needs_the_matrix(layout, rows, draw):
    held = layout.store(kernel_of(draw), PLACE)
    x = jnp.asarray(draw.normal(size=(rows, 32)), jnp.float32)
    expected = np.einsum(
        "rk,kab->rab", np.asarray(x, np.float64), np.asarray(held.whole(jnp.float32), np.float64)
    )
    np.testing.assert_allclose(jax.jit(QTensor.product)(held, x), expected, atol=1e-5)


def test_a_table_is_read_by_rows_and_multiplies(draw):
    table = kernel_of(draw, TABLE)
    for layout in (Uniform(4, 8, False), Uniform(8, -1)):
        held = layout.store(table, TABLE)
        whole = held.whole(jnp.float32)
        assert whole.shape == table.shape
        ids = jnp.asarray([[3, 19], [0, 3]])
        np.testing.assert_array_equal(jax.jit(QTensor.take)(held, ids), whole[ids])
        x = jnp.asarray(draw.normal(size=(2, 7, 32)), jnp.float32)
        np.testing.assert_allclose(held.product(x), jnp.einsum("bnc,vc->bnv", x, whole), atol=1e-5)


def test_axes_in_front_are_matrices_of_their_own(draw):
    place = Place((2, *PLACE.shape), ("layers", *PLACE.names), PLACE.ins, PLACE.outs, False)
    kernel = kernel_of(draw, place)
    held = Uniform(4, 8, False).store(kernel, place)
    for layer in range(2):
        alone = Uniform(4, 8, False).store(kernel[layer], PLACE)
        sliced = jax.tree.map(lambda leaf: leaf[layer], held)  # noqa: B023
        for ours, theirs in zip(jax.tree.leaves(sliced), jax.tree.leaves(alone), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("turned", [True, False])
def test_a_kernel_comes_back_from_its_matrix(turned, draw):
    place = Place((2, 4, 3, 5), (None,) * 4, (5,) if turned else (4, 3), (4, 3) if turned else (5,), turned)
    kernel = kernel_of(draw, place)
    np.testing.assert_array_equal(unflat(flat(kernel, place), place.ins, place.outs, turned), kernel)


BITS = {
    Uniform(4, 128): 4.125,
    Uniform(4, 64, False): 4.3125,
    Uniform(2, 64, False): 2.28125,
    Uniform(8, 0): 8.0625,
}


@pytest.mark.parametrize(("layout", "bits"), BITS.items())
def test_bits_a_weight(layout, bits, draw):
    place = Place((256, 512), ("embed", "mlp"), (256,), (512,), False)
    held = layout.store(jnp.zeros(place.shape), place)
    assert layout.bits_a_weight(256, 512) == bits
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(held)) * 8 / 256 / 512 == bits


def test_names_stand_where_arrays_do():
    layout = Uniform(3, 8, False)
    held, names = layout.store(jnp.zeros(PLACE.shape), PLACE), layout.names(PLACE)
    told = jax.tree.map(lambda leaf, name: (leaf.ndim, len(name)), held, names)
    assert all(ndim == count for ndim, count in zip(*[iter(jax.tree.leaves(told))] * 2, strict=True))
    assert names.codes[0] == ("embed", "heads")


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(UsageError, match="group=5 does not divide the 32 inputs"):
        Uniform(4, 5).store(jnp.zeros(PLACE.shape), PLACE)
    with pytest.raises(UsageError, match="symmetric=False"):
        Uniform(1, 8)
