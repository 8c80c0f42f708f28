import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress.recipe import Recipe
from effjax.compress.steps.round import Round
from effjax.compress.steps.sparsify import Densify, Sparsify
from effjax.compress.storage.input_kinds import KINDS as INPUTS
from effjax.compress.storage.inputs import Token
from effjax.compress.storage.masked import Masked
from effjax.compress.storage.sparse_blocks import SparseBlocks, SparseBlocksTensor, break_even, columns_of
from effjax.compress.storage.trees import stored_in
from effjax.compress.subject import Calibration
from effjax.errors import UsageError
from effjax.layers.stored import Place
from effjax.measure import count
from tests.compress import tiny

PLACE = Place((24, 3, 8), ("embed", "heads", "head_dim"), (24,), (3, 8), False)
BLOCKS = [(1, 4), (4, 1), (8, 8), (24, 24), (1, 1)]


def drawn(draw, place=PLACE):
    return jnp.asarray(draw.normal(size=place.shape), jnp.float32)


def by_hand(kernel, sparsity, block):
    """The matrix with zeros in the blocks of the least mean magnitude, block by block; one stays at least."""
    matrix = np.asarray(kernel, np.float64).reshape(24, 24).copy()
    k, n = block
    corners = [(i, j) for i in range(0, 24, k) for j in range(0, 24, n)]
    means = [np.abs(matrix[i : i + k, j : j + n]).mean() for i, j in corners]
    for at in np.argsort(means)[: min(round(sparsity * len(corners)), len(corners) - 1)]:
        i, j = corners[at]
        matrix[i : i + k, j : j + n] = 0
    return matrix


@pytest.mark.parametrize("block", BLOCKS[:3])
@pytest.mark.parametrize("sparsity", [0.0, 0.75, 0.99])
def test_the_largest_blocks_stay_and_nothing_else_is_held(block, sparsity, draw):
    kernel, layout = drawn(draw), SparseBlocks(sparsity, block)
    held = jax.jit(layout.store, static_argnums=1)(kernel, PLACE)
    expected = by_hand(kernel, sparsity, block)
    np.testing.assert_array_equal(held.matrix(), expected.astype(np.float32))
    assert held.values.shape[0] == layout.kept(24, 24)
    held_bits = sum(leaf.nbytes for leaf in jax.tree.leaves(held)) * 8
    assert held_bits == round(layout.bits_a_weight(24, 24) * 24 * 24)
    assert held.shape == PLACE.shape
    np.testing.assert_array_equal(held.whole(jnp.float32).reshape(24, 24), held.matrix())


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dense_above", [0.0, 1.0])
def test_the_product_is_that_of_the_matrix(block, dense_above, draw):
    kernel, x = drawn(draw), jnp.asarray(draw.normal(size=(2, 5, 24)), jnp.float32)
    held = SparseBlocks(0.6, block, dense_above=dense_above).store(kernel, PLACE)
    y = jax.jit(SparseBlocksTensor.product)(held, x)
    assert y.shape == (2, 5, 3, 8)
    expected = np.asarray(x, np.float64) @ by_hand(kernel, 0.6, block)
    np.testing.assert_allclose(y.reshape(2, 5, 24), expected, rtol=1e-5, atol=1e-5)


def test_work_and_bytes_fall_with_the_blocks(draw):
    held = SparseBlocks(7 / 9, (8, 8), dense_above=1.0).store(drawn(draw), PLACE)
    assert count(SparseBlocksTensor.product, held, jnp.ones((7, 24))).macs == 7 * 2 * 64
    published = SparseBlocks(0.8, values="int8")
    # Four numbers of 8 bits and an index of 16 in the place of four of 32.
    assert published.bits_a_weight(768, 3072) == pytest.approx(0.2 * (8 + 16 / 4), abs=0.06)


def test_a_matrix_is_multiplied_whole_above_its_break_even_density(draw):
    def macs(rows, block, **options):
        held = SparseBlocks(1 / 2, block, **options).store(drawn(draw), PLACE)
        return count(SparseBlocksTensor.product, held, jnp.ones((rows, 24))).macs

    blocks, whole = 24 * 24 // 2, 24 * 24
    assert macs(1, (1, 4)) == blocks
    assert macs(7, (1, 4)) == 7 * whole
    assert macs(7, (1, 4), dense_above=0.5) == 7 * blocks
    assert macs(1, (1, 4), dense_above=0.4) == whole
    assert [break_even((side, side), 32) for side in (16, 64, 128)] == [0.08, 0.4, 0.4]
    # A kernel reads no block that is zero, on a platform that has one.
    assert not SparseBlocks(0.1, (128, 128), implementation="kernel").multiplied_whole(32)


def test_columns_without_blocks_are_zero():
    kernel = jnp.zeros(PLACE.shape).at[3, 1, 4:].set(2.0)
    held = SparseBlocks(1 - 1 / 144).store(kernel, PLACE)
    assert held.values.shape == (1, 1, 4)
    assert int(held.inputs[0]) == 3
    assert columns_of(held.starts, 1).tolist() == [3]
    y = held.product(jnp.ones((1, 24))).reshape(24)
    np.testing.assert_array_equal(y, np.where(np.arange(24) // 4 == 3, 2.0, 0.0))


@pytest.mark.parametrize("dense_above", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["token", "tensor", "static"])
def test_integers_are_exact(kind, dense_above, draw):
    inputs = INPUTS[kind]()
    layout = SparseBlocks(0.7, values="int8", inputs=inputs, dense_above=dense_above)
    kernel, x = drawn(draw), jnp.asarray(draw.normal(size=(6, 24)), jnp.float32)
    held = layout.store(kernel, PLACE)
    if kind == "static":
        held = held.replace(known=dataclasses.replace(held.known, low=jnp.array(-1.0), high=jnp.array(2.5)))
    y = jax.jit(SparseBlocksTensor.product)(held, x).reshape(6, 24)
    codes, scale, zero = (np.asarray(part, np.float64) for part in inputs.codes(x, held.known))
    step = np.asarray(held.scale, np.float64)
    grid = np.round(np.asarray(held.matrix(), np.float64) / step)
    assert np.abs(grid).max() <= 127
    exact = (codes - zero) @ grid
    np.testing.assert_array_equal(np.round(np.asarray(y, np.float64) / scale / step), exact)
    np.testing.assert_allclose(y, exact * scale * step, rtol=3e-7)
    # Half a step of the grid is the most that a weight is off.
    off = np.abs(np.asarray(held.matrix()) - by_hand(kernel, 0.7, (1, 4)))
    assert (off <= step / 2 * (1 + 1e-6)).all()


def test_layers_in_front_have_as_many_blocks_each(draw):
    place = Place((2, 8, 12), ("layers", "embed", "mlp"), (8,), (12,), False)
    held = jax.jit(SparseBlocks(0.5).store, static_argnums=1)(drawn(draw, place), place)
    assert held.front == (2,)
    assert held.values.shape == (2, 12, 1, 4)
    for layer in range(2):
        alone = jax.tree.map(lambda leaf, layer=layer: leaf[layer], held)
        np.testing.assert_array_equal(alone.matrix(), held.matrix()[layer])
    names = SparseBlocks(0.5).names(place)
    assert all(jax.tree.leaves(jax.tree.map(lambda array, axes: array.ndim == len(axes), held, names)))


def test_a_network_pruned_in_blocks_is_stored_without_them():
    calibration = Calibration(lambda: iter([tiny.BATCH]), jax.random.key(0), report=lambda told: None)
    network, ffn = tiny.language(), (r"blocks/ffn/.*",)
    pruned = Sparsify(0.5, block=(1, 4), kernels=ffn).apply(network, calibration)
    steps = (Densify(), Round(SparseBlocks(0.5), kernels=ffn))
    stored = Recipe(steps).apply(pruned, calibration)
    assert {type(leaf) for leaf in stored_in(stored.params).values()} == {SparseBlocksTensor}
    run = jax.jit(network.task.metrics)
    ours, theirs = (run(subject.variables, tiny.BATCH)["loss"].value() for subject in (stored, pruned))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_blocks_of_a_mask_are_whole(draw):
    place = Place((2, 8, 12), ("layers", "embed", "mlp"), (8,), (12,), False)
    matrix = drawn(draw, place)
    kept = np.asarray(Masked(0.75, block=(2, 4)).cut(matrix, jnp.abs(matrix), place).kernel)
    blocks = kept.reshape(2, 4, 2, 3, 4).transpose(0, 1, 3, 2, 4).reshape(2, 12, 8)
    assert ((blocks != 0).all(-1) | (blocks == 0).all(-1)).all()
    assert (blocks != 0).all(-1).sum(-1).tolist() == [3, 3]


def test_wrong_requests_say_so(draw):
    with pytest.raises(UsageError, match="24 inputs and 24 outputs, which blocks of 1 by 5"):
        SparseBlocks(block=(1, 5)).store(drawn(draw), PLACE)
    with pytest.raises(UsageError, match="integers are multiplied by integers"):
        SparseBlocks(inputs=Token())
    with pytest.raises(UsageError, match="integers are multiplied by integers"):
        SparseBlocks(values="int8", inputs=INPUTS["grouped"]())
    for wrong in (dict(sparsity=1.0), dict(block=(0, 4))):
        with pytest.raises(UsageError):
            SparseBlocks(**wrong)
    with pytest.raises(UsageError, match="no pattern"):
        Masked(pattern=(2, 4), block=(1, 4))
    with pytest.raises(UsageError, match="asks for worth"):
        Sparsify(worth="lamp", block=(1, 4))
