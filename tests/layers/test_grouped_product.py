"""Runs of rows through matrices of their own, against one dense product a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.layers.grouped_product import grouped, kernel_gradient, run_by_run
from effjax.measure.cost import count

# Empty runs, runs of less than a block, of several, and rows behind the last run.
SIZES = {
    "mixed": ((0, 70, 600, 0, 33, 1, 129, 0), 840),
    "one_row": ((0, 0, 1), 1),
    "short": ((3, 0, 4), 9),
    "none": ((0, 0), 5),
    "end_in_a_block": ((260, 130, 31), 421),
}


def drawn(sizes, rows, inputs=6, outputs=5):
    draw = np.random.default_rng(0)
    shapes = (rows, inputs), (len(sizes), inputs, outputs), (rows, outputs)
    x, kernels, g = (jnp.float32(draw.normal(size=shape)) for shape in shapes)
    return x, kernels, g, jnp.int32(sizes)


def by_hand(x, kernels, sizes):
    out, start = np.zeros((len(x), kernels.shape[2])), 0
    for kernel, size in zip(np.asarray(kernels), np.asarray(sizes), strict=True):
        out[start : start + size] = np.asarray(x)[start : start + size] @ kernel
        start += size
    return out


@pytest.mark.parametrize("name", SIZES)
def test_every_row_meets_the_matrix_of_its_run(name):
    x, kernels, g, sizes = drawn(*SIZES[name])
    y, pull = jax.vjp(lambda x, kernels: jax.jit(grouped)(x, kernels, sizes), x, kernels)
    np.testing.assert_allclose(y, by_hand(x, kernels, sizes), rtol=1e-5, atol=1e-5)
    of_rows, of_kernels = pull(g)
    wanted = by_hand(g, np.swapaxes(kernels, 1, 2), sizes)
    np.testing.assert_allclose(of_rows, wanted, rtol=1e-5, atol=1e-5)
    ends = np.cumsum(sizes)
    for expert, (start, end) in enumerate(zip(ends - np.asarray(sizes), ends, strict=True)):
        part = np.asarray(x)[start:end].T @ np.asarray(g)[start:end]
        np.testing.assert_allclose(of_kernels[expert], part, rtol=1e-4, atol=1e-4)


def test_both_ways_to_write_it_agree():
    x, kernels, g, sizes = drawn(*SIZES["mixed"])
    wanted, pull = jax.vjp(lambda *both: jax.lax.ragged_dot(*both, sizes), x, kernels)
    np.testing.assert_allclose(jax.jit(run_by_run)(x, kernels, sizes), wanted, rtol=1e-5, atol=1e-5)
    of_kernels = jax.jit(kernel_gradient)(x, g, sizes)
    np.testing.assert_allclose(of_kernels, pull(g)[1], rtol=1e-4, atol=1e-4)


def test_it_counts_as_one_product_a_row_in_every_direction():
    x, kernels, g, sizes = drawn(*SIZES["mixed"])
    cost = count(
        lambda x, kernels: jax.vjp(lambda *both: grouped(*both, sizes), x, kernels)[1](g), x, kernels
    )
    assert cost.macs == 2 * 840 * 6 * 5
    assert not cost.unknown
    assert count(grouped, x, kernels, sizes).macs == 840 * 6 * 5


def test_half_precision_stays_half():
    x, kernels, g, sizes = drawn(*SIZES["mixed"])
    half = x.astype(jnp.bfloat16), kernels.astype(jnp.bfloat16)
    y, pull = jax.vjp(lambda *both: jax.jit(grouped)(*both, sizes), *half)
    np.testing.assert_allclose(y, by_hand(*(np.float32(a) for a in half), sizes), rtol=0.05, atol=0.1)
    assert {y.dtype, *(leaf.dtype for leaf in pull(g.astype(jnp.bfloat16)))} == {jnp.bfloat16.dtype}


@pytest.mark.parametrize("axes", [(0, 0, 0), (0, None, 0), (None, 0, None)])
def test_any_part_may_have_an_axis_more(axes):
    x, kernels, g, sizes = drawn((2, 0, 3), 5)
    more = (jnp.stack([x, 2 * x]), jnp.stack([kernels, -kernels]), jnp.stack([sizes, sizes[::-1]]))
    args = [
        many if axis == 0 else one for many, one, axis in zip(more, (x, kernels, sizes), axes, strict=True)
    ]

    def slope(x, kernels, sizes):
        return jax.grad(lambda x, kernels: jnp.vdot(g, grouped(x, kernels, sizes)), (0, 1))(x, kernels)

    both = jax.jit(lambda *args: (grouped(*args), slope(*args)))
    found = jax.jit(jax.vmap(both, in_axes=axes))(*args)
    for i in range(2):
        one = [arg[i] if axis == 0 else arg for arg, axis in zip(args, axes, strict=True)]
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(both(*one)), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-5)
