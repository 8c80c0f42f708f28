"""Attention over blocks: dense attention in its limits, and nothing is read that is not listed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import grids
from pallas_kernels.block_sparse_attention import block_sparse_attention, cost, shapes
from pallas_kernels.op import Unsupported
from tests.pallas_kernels.cases.block_sparse_attention import drawn, numbers

WAYS = {
    "reference": dict(implementation="reference"),
    "tpu": dict(implementation="tpu", interpret=pltpu.InterpretParams()),
}


def attended(way, *arrays, **options):
    return jax.jit(functools.partial(block_sparse_attention, **WAYS[way], **options))(*arrays)


def dense(q, k, v, mask=None, causal=False):
    """Softmax attention, `mask` `[B, H, N, S]`."""
    return jax.jit(functools.partial(jax.nn.dot_product_attention, is_causal=causal))(q, k, v, mask=mask)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("heads", "groups", "lists"), [(1, 1, 1), (4, 2, 4), (4, 2, 2), (4, 1, 2)])
def test_all_blocks_whole_are_dense_attention(way, heads, groups, lists):
    q, k, v = numbers(70, 90, heads, groups)
    levels = np.ones((1, lists, 5, 3), np.int32)
    y = attended(way, q, k, v, levels, depth=3, queries=16, keys=32)
    np.testing.assert_allclose(y, dense(q, k, v), atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_causal_attention_is_that_of_all_keys_before(way):
    q, k, v = numbers(70, 70)
    levels = np.full((1, 2, 5, 3), 3, np.int32)
    levels[..., :2] = 1
    y = attended(way, q, k, v, levels, depth=3, queries=16, keys=32, causal=True)
    # The first 64 queries see blocks 0 and 1 alone.
    np.testing.assert_allclose(y[:, :64], dense(q, k, v, causal=True)[:, :64], atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_without_means_it_is_attention_under_a_mask_of_blocks(way):
    q, k, v = numbers(70, 90)
    levels = drawn((q, k, v), 1, 16, 16)
    levels[..., 0] = 1
    mask = np.repeat(np.repeat(levels > 0, 16, axis=2), 16, axis=3)[:, :, :70, :90]
    y = attended(way, q, k, v, levels, depth=1, queries=16, keys=16)
    np.testing.assert_allclose(y, dense(q, k, v, mask), atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("length", [96, 91])
def test_means_of_equal_keys_lose_nothing(way, length):
    """Values differ; a mean counts as often as it has keys, at the end of the text too."""
    q, k, v = numbers(20, length)
    k = np.repeat(k[:, ::4], 4, axis=1)[:, :length]
    levels = drawn((q, k, v), 3, 16, 32, least=1)
    y = attended(way, q, k, v, levels, depth=3, queries=16, keys=32)
    np.testing.assert_allclose(y, dense(q, k, v), atol=1e-5)


def test_means_of_unlike_keys_lose_something():
    q, k, v = numbers(20, 96)
    y = attended("reference", q, k, v, np.full((1, 2, 2, 3), 3, np.int32), depth=3, queries=16, keys=32)
    assert np.abs(y - dense(q, k, v)).max() > 0.1


@pytest.mark.parametrize("way", WAYS)
def test_no_later_key_has_a_part_in_a_causal_result(way):
    q, k, v = numbers(70, 90)
    levels = drawn((q, k, v), 3, 16, 32, least=1)
    run = functools.partial(attended, way, depth=3, queries=16, keys=32, causal=True)
    clean = run(q, k, v, levels)
    # Query 36 stands with key 56, in the middle of a block.
    k[:, 57:], v[:, 57:] = 3.0, -50.0
    found = run(q, k, v, levels)
    np.testing.assert_array_equal(found[:, :37], clean[:, :37])
    assert np.abs(found[:, 37:] - clean[:, 37:]).max(axis=(0, 2, 3)).min() > 0


@pytest.mark.parametrize("way", WAYS)
def test_queries_that_read_no_block_take_nothing(way):
    q, k, v = numbers(40, 64)
    levels = drawn((q, k, v), 2, 16, 16, least=1)
    levels[:, 1, 2] = 0
    y = attended(way, q, k, v, levels, depth=2, queries=16, keys=16)
    np.testing.assert_array_equal(y[:, 32:, 1], 0)
    assert np.abs(y[:, 32:, 0]).min() > 0


def test_derivatives_are_those_of_the_specification():
    q, k, v = numbers(40, 50)
    levels = drawn((q, k, v), 2, 16, 16)
    levels[:, :, 0] = 0  # nothing is seen: slopes are zero, not nan

    def slopes(way):
        loss = lambda *a: jnp.sum(attended(way, *a, levels, depth=2, queries=16, keys=16) ** 2)
        return jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)

    for have, want in zip(slopes("tpu"), slopes("reference"), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-4)
        assert np.isfinite(want).all()
    assert np.abs(slopes("reference")[0][:, :16]).max() == 0


@pytest.mark.parametrize("shape", shapes.SHAPES, ids=lambda shape: shape.name)
def test_bytes_are_those_of_the_blocks_that_are_read(shape):
    q, k, _, levels = shape.arrays
    call = functools.partial(block_sparse_attention, **shape.options, implementation="tpu")
    ((equation, operands),) = grids.pallas_calls(jax.make_jaxpr(call)(*shape.arrays).jaxpr, shape.arrays)
    programs = levels.shape[1] * levels.shape[2]
    rows = cost.rows(k.shape[1], shape.options["shares"])
    lists = programs * 4 * (1 + 64 + 128)
    read = programs * rows * 2 * 128 * 2
    assert grids.traffic(equation, operands) == pytest.approx(read + 2 * 2 * q.size + lists, rel=0.03)


def test_rows_of_a_pyramid():
    assert cost.rows(128, None) == 128
    assert cost.rows(128, (0.5, 0.25, 0.0, 0.25)) == 64 + 16 + 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=(1, 32, 2)), r"takes q \[B, N, H, D\]"),
        (dict(k=(1, 64, 1, 8)), "do not fit"),
        (dict(k=(1, 0, 1, 16), v=(1, 0, 1, 16)), "at least one query and one key"),
        (dict(k=(1, 64, 3, 16), v=(1, 64, 3, 16)), "3 key heads do not divide 2"),
        (dict(dtype=jnp.int8), "one type, float32, bfloat16, float16, not int8"),
        (dict(keys=12, depth=4), r"a multiple of 2\^\(depth-1\)"),
        (dict(depth=0), "depth=0"),
        (dict(levels=(1, 2, 2, 5)), r"int32\[1, 2, 2, 5\] must be int32\[1, 2, 2, 4\]"),
        (dict(levels=(1, 3, 2, 4)), "levels of 3 heads"),
        (dict(shares=(0.5, 0.6)), "give a part of 1"),
        (dict(implementation="gpu"), "no kernel for the gpu"),
        (dict(implementation="tpu", dtype=jnp.float16), "takes bfloat16 or float32, not float16"),
        (dict(implementation="tpu", depth=3), "a multiple of 8 rows at the last level"),
        (dict(implementation="tpu", q=(1, 32, 2, 384), k=(1, 64, 1, 384)), "heads of up to 256"),
    ],
)
def test_bad_arguments(change, message):
    given = dict(q=(1, 32, 2, 16), k=(1, 64, 1, 16), v=(1, 64, 1, 16), levels=(1, 2, 2, 4))
    given |= {name: change.pop(name) for name in list(change) if name in given}
    dtype = np.dtype(change.pop("dtype", np.float32))
    options = dict(depth=2, queries=16, keys=16) | change
    arrays = [
        jax.ShapeDtypeStruct(shape, np.int32 if name == "levels" else dtype) for name, shape in given.items()
    ]
    with pytest.raises(Unsupported, match=message):
        jax.eval_shape(functools.partial(block_sparse_attention, **options), *arrays)
