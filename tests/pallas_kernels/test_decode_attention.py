"""Decoding by kernels: plain softmax attention in its limits, and nothing is read that is not in use."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention import Within, decode_attention
from pallas_kernels.op import Unsupported
from tests.pallas_kernels.cases.decode_attention import lengths, numbers

WAYS = {
    "reference": dict(implementation="reference"),
    "gpu": dict(implementation="gpu", interpret=True),
    "tpu": dict(implementation="tpu", interpret=pltpu.InterpretParams()),
}
DTYPES = dict(reference=np.float32, gpu=jnp.bfloat16, tpu=np.float32)
TOLERANCE = dict(reference=1e-5, gpu=2e-2, tpu=1e-5)


def decoded(way, arrays, *more, **options):
    arrays = [array.astype(DTYPES[way]) for array in arrays]
    call = functools.partial(decode_attention, **WAYS[way], **options)
    return np.asarray(jax.jit(call)(*arrays, *more), np.float32)


def brute(q, k, v, counts):
    """Row by row in float64, each token with what comes before it."""
    y = np.zeros((*q.shape[:3], v.shape[-1]))
    each = q.shape[2] // k.shape[2]
    for b, n, h in np.ndindex(*q.shape[:3]):
        count = counts[b] - (q.shape[1] - 1 - n)
        if count > 0:
            keys, values = (x[b, :count, h // each].astype(np.float64) for x in (k, v))
            scores = keys @ q[b, n, h] / np.sqrt(q.shape[3])
            powers = np.exp(scores - scores.max())
            y[b, n, h] = powers @ values / powers.sum()
    return y


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("within", [None, Within()], ids=["running", "unified"])
def test_is_plain_softmax_attention(way, within):
    """Of all slots, of one, of none, of lengths that nothing divides; the last rows hold three tokens."""
    arrays, counts = numbers(3, 136, 4, 2, 64, 64, batch=4), lengths(136, 1, 0, 77)
    found = decoded(way, arrays, counts, within=within)
    np.testing.assert_allclose(found, brute(*arrays, counts), atol=TOLERANCE[way])
    assert not found[2].any()
    assert not found[1, :2].any()


@pytest.mark.parametrize("way", WAYS)
def test_pages_in_any_order(way, draw):
    arrays, counts = numbers(1, 96, 4, 2, 64, 64), lengths(96, 33)
    place = draw.permutation(12).reshape(2, 6).astype(np.int32)
    q, *cached = arrays
    paged = [np.empty((12, 16, *x.shape[2:]), np.float32) for x in cached]
    for pages, x in zip(paged, cached, strict=True):
        pages[place.ravel()] = x.reshape(12, 16, *x.shape[2:])
    place[1, 3:] = -1  # nothing in use is there
    found = decoded(way, [q, *paged], counts, place, within=Within())
    np.testing.assert_allclose(found, brute(*arrays, counts), atol=TOLERANCE[way])


@pytest.mark.parametrize("way", ["gpu", "tpu"])
@pytest.mark.parametrize("scale", [40.0, -40.0])
def test_scores_that_leave_the_range_in_one_row_alone(way, scale):
    """e to them is infinite, or zero of all of them. The other row is what it is without."""
    q, k, v = numbers(1, 256, 2, 1, 64, 64)
    k = np.abs(k)
    q = np.abs(q)
    counts, within = lengths(250, 256), Within(0.0, -40.0, 40.0)
    alone = decoded(way, (q, k, v), counts, within=within)
    k[1] *= scale
    found = decoded(way, (q, k, v), counts, within=within)
    np.testing.assert_array_equal(found[0], alone[0])
    exact = [x.astype(DTYPES[way]).astype(np.float32) for x in (q, k, v)]
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, brute(*exact, counts), atol=10 * TOLERANCE[way])


def test_scores_in_the_range_are_not_computed_again(monkeypatch):
    """What computes again is replaced, and tells by its numbers that it ran."""
    from pallas_kernels.decode_attention import gpu

    arrays = numbers(1, 128, 2, 1, 64, 64)

    def marked(self, x, seen, v_tile, carry):
        return (carry[0] + 7, carry[1] + 1, jnp.zeros_like(carry[2]))

    monkeypatch.setattr(gpu._Parts, "running", marked)
    inside = decoded("gpu", arrays, within=Within(0.0, -30.0, 30.0))
    np.testing.assert_allclose(inside, brute(*arrays, [128, 128]), atol=TOLERANCE["gpu"])
    outside = decoded("gpu", arrays, within=Within(0.0, -0.01, 0.01))
    assert np.abs(outside - 7).max() < 1e-3


@pytest.mark.parametrize("way", ["gpu", "tpu"])
def test_a_fresh_maximum_is_not_the_one_that_was_expected(way):
    """Scores far below the expected maximum: a sum that starts from it would be 0 / 0."""
    q, k, v = numbers(1, 64, 2, 1, 64, 64)
    far = decoded(way, (q, k, v), lengths(64, 64), within=Within(1000.0, -5.0, 5.0))
    np.testing.assert_allclose(far, brute(q, k, v, [64, 64]), atol=TOLERANCE[way])


@pytest.mark.parametrize("way", ["gpu", "tpu"])
def test_what_is_not_in_use_is_not_seen(way):
    q, k, v = numbers(1, 200, 2, 1, 64, 64)
    counts = lengths(70, 9)
    clean = decoded(way, (q, k, v), counts)
    k[0, 70:], v[0, 70:], k[1, 9:], v[1, 9:] = 1e4, -1e4, 1e4, -1e4
    np.testing.assert_array_equal(decoded(way, (q, k, v), counts), clean)


def test_derivatives_are_those_of_the_specification():
    arrays = [x.astype(jnp.bfloat16) for x in numbers(1, 72, 2, 1, 64, 64)]
    total = lambda way: lambda *x: jnp.sum(decode_attention(*x, lengths(70, 3), **WAYS[way]) ** 2)
    found = jax.jit(jax.grad(total("gpu"), (0, 1, 2)))(*arrays)
    wanted = jax.jit(jax.grad(total("reference"), (0, 1, 2)))(*arrays)
    for have, want in zip(found, wanted, strict=True):
        off = jnp.abs((have - want).astype(jnp.float32)).max()
        assert float(off) < 2e-2 * float(jnp.abs(want).max())


def test_tiles_behind_the_length_are_not_fetched():
    q, k, v = (x.astype(jnp.bfloat16) for x in numbers(1, 1024, 2, 1, 64, 64))
    k[0, 64:], v[0, 64:] = np.nan, np.nan  # a product with it would show
    found = jax.jit(lambda *x: decode_attention(*x, lengths(64, 1024), **WAYS["gpu"]))(q, k, v)
    assert np.isfinite(np.asarray(found, np.float32)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=(2, 1, 3, 64)), "2 key heads do not divide 3 query heads"),
        (dict(q=(3, 1, 4, 64)), "do not fit"),
        (dict(k=(2, 8, 2, 32)), "do not fit"),
        (dict(lengths=np.ones(3, np.int32)), r"lengths int32\[3\] must be int32\[2\]"),
        (dict(lengths=np.ones(2, np.float32)), r"lengths float32\[2\]"),
        (dict(pages=np.ones((3, 4), np.int32)), r"pages int32\[3, 4\] must be int32\[2, P\]"),
        (dict(valid=np.ones((2, 9), bool)), r"valid bool\[2, 9\] must be bool\[2, 8\]"),
        (dict(within=Within(0.0, -90.0, 1.0)), "between -60 and 60"),
        (dict(dtype=jnp.int8), "takes q, k and v of one type"),
        (dict(implementation="gpu"), "bfloat16 or float16, not float32"),
        (dict(implementation="gpu", dtype=jnp.bfloat16, k=(2, 90, 2, 64), v=(2, 90, 2, 64)), "multiple of 8"),
        (
            dict(
                implementation="gpu",
                dtype=jnp.bfloat16,
                k=(2, 8, 2, 64),
                pages=np.zeros((2, 1), np.int32),
            ),
            "multiple of 16 slots, not 8",
        ),
        (dict(implementation="tpu", dtype=jnp.float16), "takes bfloat16 or float32, not float16"),
    ],
)
def test_bad_arguments(change, message):
    shapes = dict(q=(2, 1, 4, 64), k=(2, 8, 2, 64), v=(2, 8, 2, 64))
    shapes |= {name: change.pop(name) for name in list(change) if name in shapes}
    dtype = np.dtype(change.pop("dtype", np.float32))
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes.values()]
    static = {name: change.pop(name) for name in list(change) if name in ("within", "implementation")}
    with pytest.raises(Unsupported, match=message):
        jax.eval_shape(functools.partial(decode_attention, **static), *arrays, **change)


@pytest.mark.parametrize(
    ("implementation", "message"),
    [("gpu", "64 or 128 channels, not 80"), ("tpu", "128 or 256 channels, not 80")],
)
def test_heads_that_would_have_to_be_filled_up(implementation, message):
    arrays = [jax.ShapeDtypeStruct((1, 64, 2, 80), jnp.bfloat16)] * 3
    with pytest.raises(Unsupported, match=message):
        jax.eval_shape(functools.partial(decode_attention, implementation=implementation), *arrays)
