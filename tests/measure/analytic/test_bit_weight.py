"""Digits of int8 exhaustively, the exact products, and the counts of paper and reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import UsageError
from effjax.measure.analytic import bit_weight as room

CODES = np.arange(-128, 128)
ENCODINGS = tuple(room.RADIX)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_code_is_the_sum_of_its_digits(encoding):
    table = room.digit_table(encoding).astype(int)
    np.testing.assert_array_equal(table @ room.RADIX[encoding] ** np.arange(table.shape[1]), CODES)
    assert table.shape[1] == (4 if room.RADIX[encoding] == 4 else 8)
    assert abs(table).max() == room.RADIX[encoding] // 2


def test_the_papers_two_codes():
    """91 is 1 2 -1 -1 and 124 is 2 0 -1 0, highest digit first."""
    assert room.digits(91, "en_t")[::-1] == (1, 2, -1, -1)
    assert room.digits(124, "en_t")[::-1] == (2, 0, -1, 0)
    assert room.digits(-124, "en_t")[::-1] == (-2, 0, 1, 0)


def matrices(key, m=5, k=256, n=3):
    a, b = (jax.random.randint(jax.random.key(key + i), s, -128, 128) for i, s in enumerate(((m, k), (k, n))))
    return a.astype(jnp.int8).at[0].set(jnp.asarray(CODES, jnp.int8)), b.astype(jnp.int8)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("shift", ["after", "inside"])
def test_products_are_exact(encoding, shift):
    """Row 0 of `a` holds every code there is."""
    a, b = matrices(0)
    exact = np.asarray(a, np.int64) @ np.asarray(b, np.int64)
    np.testing.assert_array_equal(room.matmul(a, b, encoding, shift), exact)


def test_carry_save_sums_are_sums():
    terms = jax.random.randint(jax.random.key(0), (200, 7), -(2**31), 2**31 - 1)
    np.testing.assert_array_equal(room.carry_save_sum(terms), jnp.sum(terms, axis=0))  # both modulo 2^32
    a, b = matrices(1)
    products = a.astype(jnp.int32)[:, :, None] * b.astype(jnp.int32)[None]  # [M, K, N]
    np.testing.assert_array_equal(room.carry_save_sum(products.transpose(1, 0, 2)), room.matmul(a, b))


def test_uniform_codes():
    """Booth's digits are zero one time in four, and independent: 68.4% of codes have three or fewer."""
    expected = {name: room.expected_digits(name, room.uniform()) for name in ENCODINGS}
    assert expected == {
        "booth": 3.0,
        "en_t": 2.91796875,
        "twos_complement": 4.0,
        "sign_magnitude": 3.50390625,
    }
    few = ((room.digit_table("booth") != 0).sum(axis=1) <= 3).mean()
    assert round(100 * few, 1) == 68.4


@pytest.mark.parametrize(
    ("deviation", "theirs"), [(10, 1.75), (20, 2.10), (30, 2.32), (40, 2.48), (50, 2.60)]
)
def test_gaussian_codes_need_as_many_digits_as_the_references_hardware_counts(deviation, theirs):
    """Its README's averages of 1000 simulated vectors of 128; Booth's digits would be 0.17 more."""
    distribution = room.gaussian(deviation)
    assert room.expected_digits("en_t", distribution) == pytest.approx(theirs, abs=0.02)
    assert room.expected_digits("booth", distribution) > theirs + 0.15
    ordered = [room.expected_digits(name, distribution) for name in ENCODINGS]
    assert ordered[1] < min(ordered[0], ordered[3]) < ordered[2]


def test_a_normal_matrix_of_the_papers():
    """2.22 partial products with EN-T and 2.41 with Booth: one deviation, 24.3, gives both."""
    assert round(room.expected_digits("en_t", room.gaussian(24.3)), 2) == 2.22
    assert round(room.expected_digits("booth", room.gaussian(24.3)), 2) == 2.41


def test_codes_of_a_normal_matrix():
    """The scale hangs on the largest of a million numbers, so that every draw has a deviation of its own."""
    normal = jax.random.normal(jax.random.key(0), (1024, 1024))
    codes = room.quantise(normal)
    assert int(jnp.max(jnp.abs(codes))) == 127
    expected = room.expected_digits("en_t", room.gaussian(float(jnp.std(codes.astype(jnp.float32)))))
    assert room.average_digits(codes, "en_t") == pytest.approx(expected, abs=0.005)


def test_the_average_is_the_expectation():
    assert room.average_digits(jnp.asarray(CODES, jnp.int8), "booth") == 3.0


def weights(deviation, shape=(64, 512), seed=0):
    drawn = np.random.default_rng(seed).normal(0, deviation, shape)
    return np.clip(np.round(drawn), -128, 127).astype(np.int8)


@pytest.mark.parametrize("name", room.ENGINES)
def test_dense_engines_do_not_see_the_digits(name):
    engine, a = room.ENGINES[name], weights(20)
    tiles = -(-64 // engine.rows) * -(-96 // engine.columns)
    steps = 512 // engine.depth + (30 if engine.skewed else 0)
    for option in ("mac", "opt1", "opt2"):
        assert room.cycles(a, 96, engine, option) == tiles * steps
        assert room.cycles(a * 0, 96, engine, option) == tiles * steps


@pytest.mark.parametrize("name", room.ENGINES)
@pytest.mark.parametrize("option", ["opt3", "opt4"])
def test_zeros_never_cost_cycles(name, option):
    engine, a = room.ENGINES[name], weights(40)
    random = np.random.default_rng(1)
    spent = []
    for _ in range(6):
        spent.append(room.cycles(a, 96, engine, option))
        a = np.where(random.random(a.shape) < 0.3, 0, a).astype(np.int8)
    spent.append(room.cycles(a * 0, 96, engine, option))
    assert spent == sorted(spent, reverse=True)
    assert spent[0] > spent[2] > spent[-1]
    # Four operands at a bit weight take a cycle even where there is nothing to add: no faster than dense.
    assert spent[-1] == room.cycles(a, 96, engine, "mac")


def test_rows_wait_for_the_slowest():
    """One row of eight digits' worth among empty ones sets the pace of its tile, and of no other."""
    a = np.zeros((32, 16), np.int8)
    a[3] = 85  # 01010101: four digits that are not zero
    assert room.cycles(a, 16, room.ENGINES["matrix"], "opt3") == 4 * 16 + 16


def test_long_sums_even_the_rows_out():
    """The paper's proof in numbers: as k grows, a tile takes what an average row does."""
    engine, likely = room.ENGINES["matrix"], room.gaussian(30)
    used = likely @ (room.digit_table("en_t") != 0)  # [W] how often each digit is not zero
    average = float(np.sum(used + (1 - used) ** 4 / 4))  # four operands without one take a cycle
    spent = [room.cycles(weights(30, (16, k)), 16, engine, "opt3") / k for k in (32, 512, 8192)]
    assert spent == sorted(spent, reverse=True)
    assert average < spent[-1] == pytest.approx(average, rel=0.02)


def test_encodings_that_leave_fewer_digits_take_fewer_cycles():
    spent = [room.cycles(weights(30), 16, room.ENGINES["matrix"], "opt3", name) for name in ENCODINGS]
    assert spent[1] < spent[0] < spent[3] < spent[2]


def test_unknown_names():
    with pytest.raises(UsageError, match=r"No encoding 'boot'. Did you mean 'booth'"):
        room.digits(1, "boot")
    with pytest.raises(UsageError, match=r"No option 'opt5'. Did you mean"):
        room.cycles(weights(1), 1, room.ENGINES["cube"], "opt5")
