import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.decoding.cache import append, init_cache
from effjax.decoding.policies.heavy_hitters import HeavyHitters
from effjax.decoding.policies.policy import Policy
from effjax.decoding.policies.window import Window
from effjax.decoding.storage.kinds import STORAGES
from effjax.decoding.storage.plain import Plain
from effjax.decoding.storage.quantised import Quantised, pack, unpack
from effjax.errors import UsageError
from effjax.models.lm import LM
from tests.decoding.policies.common import BLOCK, build, stepwise, toy, variables

ANY = dict(keys="token", residual=0)
KIVI = Quantised(bits=2, group=4, residual=8)


def numbers(draw, slots, channels=8, dtype=jnp.float32):
    """With channels of very different sizes, as keys have."""
    return jnp.asarray(draw.normal(size=(2, slots, 3, channels)) * 10 ** np.arange(0, 1, 1 / channels), dtype)


@functools.partial(jax.jit, static_argnames=("storage", "what", "slots"))
def whole(storage, what, x, slots=None):
    held = storage.empty(what, x.shape[0], slots or x.shape[1], *x.shape[2:], x.dtype)
    return storage.append(held, x, jnp.zeros((), jnp.int32))


@functools.partial(jax.jit, static_argnames="storage")
def read(storage, held):
    return storage.read(held)


def by_hand(x, bits, axis):
    """In float64, a group a row."""
    x = np.asarray(x, np.float64)
    zero, top = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    scale = (top - zero) / (2**bits - 1)
    return zero + scale * np.round((x - zero) / scale), scale


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing_loses_nothing(draw, bits):
    codes = jnp.asarray(draw.integers(0, 2**bits, (3, 5, 16)), jnp.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, 5, 2 * bits)
    np.testing.assert_array_equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_groups_along_tokens_are_those_of_numpy(draw, bits):
    x = numbers(draw, 7)
    storage = Quantised(bits, "token", group=4, residual=0)
    found = read(storage, whole(storage, "keys", x))
    expected, scale = by_hand(x.reshape(2, 7, 3, 2, 4), bits, 4)
    np.testing.assert_allclose(found, expected.reshape(x.shape), atol=1e-5)
    error = np.abs(np.asarray(found - x).reshape(2, 7, 3, 2, 4))
    assert (error <= scale / 2 + 1e-5).all()
    assert error.max() > 0.4 * scale.max() / 2


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_groups_along_channels_are_those_of_numpy_once_they_leave_the_latest(draw, bits):
    x = numbers(draw, 21)
    storage = Quantised(bits, group=4, residual=8)
    found = read(storage, whole(storage, "keys", x))
    expected, scale = by_hand(x[:, :12].reshape(2, 3, 4, 3, 8), bits, 2)
    np.testing.assert_allclose(found[:, :12], expected.reshape(2, 12, 3, 8), atol=1e-5)
    np.testing.assert_array_equal(found[:, 13:], x[:, 13:])
    error = np.abs(np.asarray(found - x)[:, :12].reshape(2, 3, 4, 3, 8))
    assert (error <= scale / 2 + 1e-5).all()


def test_keys_with_large_channels_are_nearer_along_channels(draw):
    x = numbers(draw, 32)
    storage = Quantised(2, "channel", group=8, residual=8)
    along_channels = read(storage, whole(storage, "keys", x))
    along_tokens = read(storage, whole(storage, "values", x))
    error = lambda found: float(jnp.mean(((found - x)[:, :24] / jnp.std(x, 1, keepdims=True)) ** 2))
    assert error(along_channels) < 0.5 * error(along_tokens)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_numbers_on_a_grid_are_exact(draw, bits):
    codes = draw.integers(0, 2**bits, (2, 6, 3, 8))
    codes[..., 0], codes[..., 4], codes[..., 1], codes[..., 5] = 0, 0, 2**bits - 1, 2**bits - 1
    x = jnp.asarray(codes * 0.25 - 3, jnp.float32)
    storage = Quantised(bits, "token", group=4, residual=0)
    np.testing.assert_array_equal(read(storage, whole(storage, "keys", x)), x)


def test_numbers_that_are_alike_are_exact():
    x = jnp.full((1, 4, 1, 8), 0.7)
    np.testing.assert_array_equal(read(KIVI, whole(KIVI, "keys", x)), x)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_was_quantised_stays_where_it_is(draw, dtype):
    """A policy that merges reads and writes all slots again and again."""
    storage = Quantised(4, group=8, **ANY)
    once = read(storage, whole(storage, "keys", numbers(draw, 9, dtype=dtype)))
    again = once
    for _ in range(20):
        again = read(storage, whole(storage, "keys", again))
    tolerance = 1e-4 if dtype == jnp.float32 else 0.2  # of numbers up to 20, and steps up to 2
    np.testing.assert_allclose(np.float32(again), np.float32(once), atol=tolerance)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bytes_are_those_of_the_codes(bits, dtype):
    item = jnp.dtype(dtype).itemsize
    storage = Quantised(bits, group=32, residual=64)
    held = jax.eval_shape(lambda: storage.empty("keys", 2, 1000, 3, 64, dtype))
    tokens = jax.eval_shape(lambda: storage.empty("values", 2, 1000, 3, 64, dtype))
    count = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    codes, latest = 2 * 1000 * 3 * 64 * bits // 8, 2 * 64 * 3 * 64 * item + 2 * 4
    assert count(held) == codes + latest + 2 * (2 * 32 * 3 * 64 * item)  # 1000 / 32 blocks
    assert count(tokens) == codes + latest + 2 * (2 * 1000 * 3 * 2 * item)


@pytest.mark.parametrize("along", ["channel", "token"])
@pytest.mark.parametrize("pieces", [[9, *[1] * 14], [6, 17]], ids=["steps", "two"])
def test_pieces_are_read_as_the_whole(draw, along, pieces):
    x = numbers(draw, 23)
    storage = Quantised(4, along, group=4, residual=8)
    held = storage.empty("keys", 2, 25, 3, 8, jnp.float32)
    write, at = jax.jit(storage.append), 0
    for count in pieces:
        held = write(held, x[:, at : at + count], jnp.int32(at))
        at += count
    expected = read(storage, whole(storage, "keys", x, 25))
    np.testing.assert_array_equal(read(storage, held)[:, :at], expected[:, :at])


@pytest.mark.parametrize("along", ["channel", "token"])
def test_sequences_may_have_counts_of_their_own(draw, along):
    """With padding behind the tokens, which the next ones overwrite."""
    x = numbers(draw, 16)
    storage = Quantised(4, along, group=4, residual=4)
    cache = init_cache(2, 20, 3, 8, storage=storage)
    cache = dataclasses.replace(cache, written=jnp.zeros(2, jnp.int32))
    write = jax.jit(functools.partial(append, storage=storage))
    lengths = np.zeros(2, int)
    for counts in ([6, 2], [1, 1], [0, 1], [1, 0], [1, 7]):
        size = max(counts)
        at = [
            [n + i if i < count else -1 for i in range(size)]
            for n, count in zip(lengths, counts, strict=True)
        ]
        new = jnp.stack([x[row, jnp.asarray(places)] for row, places in enumerate(at)])
        cache = write(cache, new, new, jnp.asarray(at))
        lengths += counts
    assert cache.written.tolist() == lengths.tolist() == [9, 11]
    for row, length in enumerate(lengths):
        alone = read(storage, whole(storage, "keys", x[row : row + 1, :length], 20))
        np.testing.assert_array_equal(read(storage, cache.keys)[row, :length], alone[0, :length])
        assert sorted(cache.positions[row, :length].tolist()) == list(range(length))


@pytest.mark.parametrize("each_head", [False, True])
@pytest.mark.parametrize("what", ["keys", "values"])
def test_some_slots_are_read_as_they_are_among_all(draw, what, each_head):
    held = whole(KIVI, what, numbers(draw, 21))
    slots = jnp.asarray(draw.integers(0, 21, (2, 5, 3) if each_head else (2, 5)))
    expected = Plain().read_at(read(KIVI, held), slots)
    np.testing.assert_array_equal(KIVI.read_at(held, slots), expected)


def test_any_slot_may_be_written_by_token(draw):
    storage = Quantised(8, group=8, **ANY)
    x = numbers(draw, 6)
    held = storage.put(whole(storage, "keys", x), x[:, :1], jnp.asarray([[3], [5]]))
    expected = read(storage, whole(storage, "keys", x))
    np.testing.assert_array_equal(read(storage, held)[0, 3], expected[0, 0])
    np.testing.assert_array_equal(read(storage, held)[1, 5], expected[1, 0])
    np.testing.assert_array_equal(read(storage, held)[1, :5], expected[1, :5])


@pytest.fixture
def tokens(draw):
    return draw.integers(0, 17, (3, 14))


def test_eight_bits_say_nearly_the_same_and_two_bits_less_so(tokens):
    plain, _, _ = stepwise(toy(), tokens, 6)
    apart = {}
    for bits in (8, 2):
        storage = Quantised(bits, group=4, residual=4)
        logits, _, _ = stepwise(toy(cache=Policy(storage=storage)), tokens, 6)
        apart[bits] = float(jnp.max(jnp.abs(logits - plain)))
    assert apart[8] < 0.1 * float(jnp.std(plain))
    assert 5 * apart[8] < apart[2]


def test_steps_equal_the_prompt_where_nothing_is_kept_as_it_is(tokens):
    model = toy(cache=Policy(storage=Quantised(4, group=4, **ANY)))
    stepped, _, _ = stepwise(model, tokens, 1)
    caches = model.init_cache(3, 14)
    at_once, _ = jax.jit(functools.partial(model.apply, method="step"))(variables(), tokens, caches)
    np.testing.assert_allclose(stepped, at_once, atol=2e-4)


def test_all_that_is_latest_is_the_plain_cache_bit_for_bit(tokens):
    plain, _, _ = stepwise(toy(), tokens, 6, (14, 9, 12))
    model = toy(cache=Policy(storage=Quantised(2, group=4, residual=16)))
    logits, _, _ = stepwise(model, tokens, 6, (14, 9, 12))
    np.testing.assert_array_equal(logits, plain)


def test_what_is_evicted_may_be_quantised(tokens):
    plain, _, _ = stepwise(toy(cache=HeavyHitters(budget=6)), tokens, 10)
    storage = Quantised(8, group=4, **ANY)
    logits, caches, _ = stepwise(toy(cache=HeavyHitters(budget=6, storage=storage)), tokens, 10)
    np.testing.assert_allclose(logits, plain, atol=0.1)
    assert caches.keys.codes.shape == (2, 3, 6, 2, 4)


def test_a_config_names_a_storage():
    section = dict(kind="quantised", bits=4, group=4, residual=4)
    cache = dict(kind="all", storage=section)
    model = build(LM, dict(block=BLOCK, vocab=17, dim=16, depth=2, cache=cache), "model")
    assert model.cache == Policy(storage=Quantised(4, group=4, residual=4))
    assert STORAGES["quantised"]() == Quantised(2, "channel", "token", 32, 128)


def test_axes_have_the_form_of_the_caches():
    model = toy(cache=Policy(storage=KIVI))
    caches, axes = jax.eval_shape(lambda: model.init_cache(2, 9)), model.cache_axes()
    described = jax.tree.map(
        lambda leaf, names: len(leaf.shape) == 1 + len(names), caches.keys, axes.keys, is_leaf=_is_shape
    )
    assert all(jax.tree.leaves(described))


def _is_shape(leaf):
    return isinstance(leaf, jax.ShapeDtypeStruct)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Quantised(3), "bits=3 do not fill a byte: give 2, 4 or 8"),
        (
            lambda: build(Policy, dict(storage=dict(kind="quantised", keys="row")), "cache"),
            "cache.storage.keys",
        ),
        (lambda: Quantised(group=0), "group=0 must be at least 1"),
        (lambda: Quantised(residual=-1), "residual=-1"),
        (lambda: Quantised(residual=40), "residual=40 holds no whole groups of tokens.*multiple of group=32"),
        (lambda: Quantised(residual=0), "residual=0 holds no whole groups"),
        (
            lambda: Quantised().empty("values", 1, 9, 1, 48, jnp.float32),
            "group=32 does not divide the 48 channels of a head",
        ),
        (
            lambda: Quantised(2, group=2, residual=2).empty("keys", 1, 9, 1, 2, jnp.float32),
            "2 channels of 2 bits do not fill bytes",
        ),
        (
            lambda: Window(9, storage=Quantised(2, group=4, residual=4)).init(1, 20, 1, 4, jnp.float32),
            "evicts or merges needs quantised storage with keys='token', values='token', residual=0",
        ),
        (
            lambda: Window(9, storage=Quantised(2, "token", group=4, residual=4)).init(
                1, 20, 1, 4, jnp.float32
            ),
            "none is the latest",
        ),
    ],
)
def test_bad_input(make, said):
    with pytest.raises(UsageError, match=said):
        make()
