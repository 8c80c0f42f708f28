"""Attention to neighbours by its kernel: place by place as papers have it, limit cases, and bad input."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.neighborhood_attention import neighborhood_attention
from pallas_kernels.neighborhood_attention.axes import Axis, cut
from pallas_kernels.op import Unsupported
from tests.pallas_kernels.cases.neighborhood_attention import numbers, windows

TPU = dict(implementation="tpu", interpret=pltpu.InterpretParams())
HOWS = pytest.mark.parametrize("how", [dict(implementation="reference"), TPU], ids=["reference", "tpu"])


def seen(axis, query, key):
    """Where in a table of offsets, or which places of a window; None where a query does not see a key."""
    if axis.shift is None:
        if (query - key) % axis.dilation:
            return None
        count = len(range(query % axis.dilation, axis.length, axis.dilation))
        i, j = query // axis.dilation, key // axis.dilation
        first = max(0, min(i - axis.window // 2, count - axis.window))
        near = i - axis.window < j <= i if axis.causal else first <= j < first + axis.window
        return j - i + axis.window - 1 if near else None
    here, there = (place - axis.shift for place in (query, key))  # negative ones were rolled to the end
    if here // axis.window != there // axis.window:
        return None
    return here % axis.window, there % axis.window


def brute(q, k, v, bias, axes, scale):
    """Query by query, over the keys that the definition names, in float64."""
    q, k, v, bias = (np.asarray(array, np.float64) for array in (q, k, v, bias))
    y = np.zeros(q.shape)
    places = list(np.ndindex(*(axis.length for axis in axes)))
    for query in places:
        logits, values = [], []
        for key in places:
            at = [seen(*one) for one in zip(axes, query, key, strict=True)]
            if None in at:
                continue
            if axes[0].shift is not None:
                pair = [
                    np.ravel_multi_index(one, [axis.window for axis in axes]) for one in zip(*at, strict=True)
                ]
                added = bias[:, pair[0], pair[1]]
            else:
                added = bias[tuple(at)]
            logits.append(scale * np.sum(q[(slice(None), *query)] * k[(slice(None), *key)], -1) + added[None])
            values.append(v[(slice(None), *key)])
        weights = np.exp(np.array(logits) - np.max(logits, 0))
        y[(slice(None), *query)] = np.sum((weights / weights.sum(0))[..., None] * np.array(values), 0)
    return y


@HOWS
@pytest.mark.parametrize(
    "axes",
    [
        (Axis(17, 4),),
        (Axis(9, 3, 2, causal=True),),
        (Axis(5, 3), Axis(11, 3, 2)),
        (Axis(2, 2, causal=True), Axis(3, 2), Axis(5, 3)),
        (Axis(6, 3, shift=1), Axis(4, 2, shift=0)),
    ],
    ids=["even", "causal", "dilated", "volume", "windows"],
)
def test_is_what_the_definition_says(how, axes):
    nearest = axes[0].shift is None
    each = {name: tuple(getattr(axis, name) for axis in axes) for name in ("window", "dilation", "causal")}
    options = each if nearest else dict(window=each["window"], shift=tuple(axis.shift for axis in axes))
    arrays = numbers([axis.length for axis in axes], 2, 3, each["window"], batch=2, nearest=nearest)
    y = jax.jit(lambda *some: neighborhood_attention(*some, **options, scale=0.7, **how))(*arrays)
    np.testing.assert_allclose(y, brute(*arrays, axes, 0.7), rtol=1e-4, atol=1e-5)


def test_a_window_as_long_as_the_map_is_full_attention():
    q, k, v, _ = numbers((3, 5), 2, 4, (3, 5))
    y = neighborhood_attention(q, k, v, window=(3, 5), **TPU)
    flat = [jnp.asarray(array).reshape(1, 15, 2, 4) for array in (q, k, v)]
    full = jax.nn.dot_product_attention(*flat)
    np.testing.assert_allclose(y.reshape(full.shape), full, rtol=1e-4, atol=1e-5)


@HOWS
def test_a_window_of_one_is_the_values(how):
    q, k, v, bias = numbers((4, 6), 2, 3, (1, 1))
    np.testing.assert_allclose(neighborhood_attention(q, k, v, bias, window=1, **how), v, rtol=1e-6)


def test_a_key_out_of_sight_changes_nothing():
    """The last column is seen by the last two alone."""
    q, k, v, bias = numbers((4, 12), 1, 3, (3, 3))
    run = jax.jit(lambda k: neighborhood_attention(q, k, v, bias, window=3, **TPU))
    changed = np.abs(run(k) - run(k * np.where(np.arange(12) == 11, 50, 1).astype(np.float32)[:, None, None]))
    assert changed[:, :, :10].max() == 0
    assert changed[:, :, 10:].max((0, 1, 3, 4)).min() > 0


@pytest.mark.parametrize("axis", [Axis(30, 7), Axis(31, 4, 3), Axis(17, 7), Axis(20, 5, 2)])
@pytest.mark.parametrize(("tile", "unit"), [(3, 1), (8, 8)])
def test_every_query_has_its_window_of_keys(axis, tile, unit):
    one = cut(axis, tile, unit)
    counts = one.kinds[one.kind].sum(-1)  # [groups, tiles, tile]
    assert (counts > 0).sum() == axis.length
    assert set(np.unique(counts)) <= {0, axis.window}
    assert one.region % unit == one.keys % unit == 0
    placed = [np.arange(count) * stride + start for _, _, start, count, stride in one.pieces]
    assert sorted(itertools.chain(*placed)) == list(range(axis.length))


def shaped(maps, bias=None, keys=None, dtype=jnp.float32, **options):
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in (maps, keys or maps, maps)]
    bias = None if bias is None else jax.ShapeDtypeStruct(bias, dtype)
    jax.eval_shape(lambda *some: neighborhood_attention(*some, **options), *arrays, bias)


MAP = (1, 6, 6, 2, 8)


@pytest.mark.parametrize(
    ("arguments", "options", "told"),
    [
        ((MAP,), dict(window=7), "window=7 with dilation=1 does not fit on a side of 6 places"),
        ((MAP,), dict(window=3, dilation=3), "window=3 with dilation=3 does not fit"),
        ((MAP,), dict(window=0), "window=0"),
        ((MAP,), dict(window=(3, 3, 3)), "window=.3, 3, 3. is not of the 2 axes"),
        ((MAP,), dict(window=4, shift=0), "a side of 6 has no windows of 4"),
        ((MAP,), dict(window=3, shift=3), "shift=3 is 0 to 2"),
        ((MAP,), dict(window=3, shift=(0, None)), "either all axes have windows"),
        ((MAP, (5, 5, 3)), dict(window=3), r"\[5, 5, 3\] is not of floats\[5, 5, 2\]"),
        ((MAP, (2, 9, 8)), dict(window=3, shift=1), r"is not of floats\[2, 9, 9\]"),
        ((MAP, None, (1, 6, 5, 2, 8)), dict(window=3), "of one shape"),
        (((1, 6, 2),), dict(window=3), "on a map of one to three axes"),
        ((MAP,), dict(window=3, dtype=jnp.float64), "float32, bfloat16, float16"),
        ((MAP,), dict(window=3, dtype=jnp.float16, implementation="tpu"), "bfloat16 or float32, not float16"),
        (((1, 512, 512, 4, 32),), dict(window=7, implementation="tpu"), "in vector memory"),
        ((MAP,), dict(window=3, implementation="gpu"), "no kernel for the gpu"),
    ],
)
def test_says_what_it_does_not_take(arguments, options, told):
    with jax.enable_x64(options.get("dtype") == jnp.float64), pytest.raises(Unsupported, match=told):
        shaped(*arguments, **options)


def test_windows_of_several_maps_do_not_meet():
    (q, k, v, bias), options = windows((6, 9), (3, 3), (1, 2))
    twice = [np.concatenate([array, -array]) for array in (q, k, v)]
    y = neighborhood_attention(*twice, bias, **options, **TPU)
    alone = neighborhood_attention(-q, -k, -v, bias, **options, **TPU)
    np.testing.assert_allclose(y[1:], alone, rtol=1e-5, atol=1e-6)
