import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress.storage.bit_planes import BitPlanes, PlaneTensor, counts, planes_of, tokens_coded
from effjax.compress.storage.uniform import FEW, Uniform
from effjax.errors import UsageError
from effjax.layers.stored import Place

PLACE = Place((32, 12), ("embed", "mlp"), (32,), (12,), False)
PRODUCT = jax.jit(PlaneTensor.product)


def kernel_of(draw):
    return jnp.asarray(draw.normal(size=PLACE.shape), jnp.float32)


def test_counted_bits_are_the_integer_product_of_every_two_widths(draw):
    x, w = draw.integers(0, 256, (3, 40)), draw.integers(0, 256, (40, 5))
    made = [planes_of(jnp.asarray(codes, jnp.uint8), 8, axis) for codes, axis in ((x, -1), (w, -2))]
    packed = jnp.stack(made[0])[:, :, None], jnp.stack(made[1])[:, None]
    found = np.asarray(jax.jit(counts)(*packed))[:, :, :, 0]
    for p in range(1, 9):
        for q in range(1, 9):
            weights = 2 ** (np.arange(p)[:, None] + np.arange(q)[None])
            ours = np.einsum("pq,pqrn->rn", weights, found[:p, :q])
            np.testing.assert_array_equal(ours, (x & (2**p - 1)) @ (w & (2**q - 1)))


LAYOUTS = (
    BitPlanes(2, 0, activations=8),
    BitPlanes(3, 8, False, activations=4, balanced=False),
    BitPlanes(4, 16, True, activations=6, balanced=False),
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_few_rows_and_many_are_the_product_of_codes(layout, draw):
    """In float64: what enters on its token's grid, times the weights on theirs."""
    held = layout.store(kernel_of(draw), PLACE)
    x = jnp.asarray(draw.normal(size=(FEW + 1, 32)), jnp.float32)
    low, high = (np.asarray(f(x, -1, keepdims=True), np.float64) for f in (jnp.min, jnp.max))
    top = 2**layout.activations - 1
    scale = (np.maximum(high, 0) - np.minimum(low, 0)) / top
    zero = np.round(-np.minimum(low, 0) / scale)
    coded = (np.clip(np.round(np.asarray(x) / scale) + zero, 0, top) - zero) * scale
    expected = coded @ np.asarray(held.whole(jnp.float32), np.float64)
    np.testing.assert_allclose(PRODUCT(held, x), expected, atol=1e-4)
    np.testing.assert_allclose(PRODUCT(held, x[:2]), expected[:2], atol=1e-4)


def test_planes_hold_what_bytes_hold(draw):
    kernel = kernel_of(draw)
    for bits, symmetric in ((3, True), (4, False)):
        planes = BitPlanes(bits, 8, symmetric, activations=0, balanced=False).store(kernel, PLACE)
        plain = Uniform(bits, 8, symmetric).store(kernel, PLACE)
        np.testing.assert_array_equal(planes.whole(jnp.float32), plain.whole(jnp.float32))
        assert sum(leaf.nbytes for leaf in planes.codes) == sum(leaf.nbytes for leaf in plain.codes)


def test_five_codes_lie_evenly_and_err_less(draw):
    kernel = kernel_of(draw)
    held = BitPlanes(2, 0).store(kernel, PLACE)
    steps = np.asarray(held.whole(jnp.float32) / held.scale)
    assert set(np.unique(np.round(steps, 4))) == {-2.0, -1.0, 0.0, 1.0, 2.0}

    def least(levels):
        """Mean squared error of normal weights on the best scale."""
        weights = np.random.default_rng(0).normal(size=20_000)
        scales = np.linspace(0.2, 2.0, 60)
        near = [np.min((weights[:, None] - s * np.asarray(levels)[None]) ** 2, 1).mean() for s in scales]
        return min(near)

    assert least([-2, -1, 0, 1, 2]) < 0.8 * least([-2, -1, 0, 1])


def test_bits_are_counted_as_they_are_stored(draw):
    held = BitPlanes(2, 0).store(kernel_of(draw), PLACE)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(held)) * 8 / math.prod(PLACE.shape)
    assert BitPlanes(2, 0).bits_a_weight(*PLACE.matrix) == size == 3.5
    names = BitPlanes(3, 8, False, balanced=False).names(PLACE)
    assert [len(names.codes), len(names.zero)] == [3, 2]


def test_tokens_are_coded_to_half_a_step(draw):
    x = jnp.asarray(draw.normal(size=(4, 32)), jnp.float32)
    codes, scale, zero = tokens_coded(x, 8)
    assert float(jnp.max(jnp.abs((codes - zero) * scale - x) / scale)) < 1.01
    gradient = jax.grad(lambda x: jnp.sum(tokens_coded(x, 8)[0] * tokens_coded(x, 8)[1]))(x)
    assert bool(jnp.all(jnp.isfinite(gradient)))


def test_what_has_no_planes_is_refused():
    with pytest.raises(UsageError, match="group=12"):
        BitPlanes(4, 12, balanced=False)
    with pytest.raises(UsageError, match="balanced=False"):
        BitPlanes(4)
    with pytest.raises(UsageError, match="bits=9"):
        BitPlanes(activations=9)
