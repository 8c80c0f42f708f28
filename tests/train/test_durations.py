"""Durations: what each unit is worth in steps."""

from fractions import Fraction

import pytest

from effjax.errors import UsageError
from effjax.train.durations import Budget, parse, to_steps


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("5000 steps", 5000, "steps"),
        ("1 step", 1, "steps"),
        ("0 steps", 0, "steps"),
        ("5k steps", 5000, "steps"),
        ("1.28M examples", 1_280_000, "examples"),
        ("2 B examples", 2 * 10**9, "examples"),
        ("0.5 epochs", Fraction(1, 2), "epochs"),
        ("5%", 5, "%"),
        ("2.5 %", Fraction(5, 2), "%"),
    ],
)
def test_parse(text, amount, unit):
    assert (parse(text).amount, parse(text).unit) == (amount, unit)


def test_each_unit_in_steps():
    assert to_steps("7 steps", batch_size=64) == 7
    assert to_steps("90 epochs", 1024, dataset_size=1_281_167) == 90 * 1_281_167 // 1024
    assert to_steps("1.28M examples", 1024) == 1250
    assert to_steps("5%", 64, total_steps=1000) == 50
    assert to_steps("100%", 64, total_steps=1000) == 1000


def test_short_positive_durations_last_one_step_and_zero_lasts_none():
    assert to_steps("10 examples", 64) == 1
    assert to_steps("1%", 64, total_steps=10) == 1
    assert to_steps("0 epochs", 64, dataset_size=100) == 0


def test_the_arithmetic_is_exact():
    # 0.07 * 100 is 7.000000000000001 in floating point, and 0.29 * 100 is 28.999999999999996.
    assert to_steps("29%", 1, total_steps=100) == 29
    assert to_steps("0.29 epochs", 1, dataset_size=100) == 29


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("300", "'300' is no duration"),
        ("-3 steps", "is no duration"),
        ("ten epochs", "is no duration"),
        ("10 epcohs", "Did you mean 'epochs'"),
        ("10 epochs", "does not say how many examples"),
        ("5%", "cannot be its length"),
    ],
)
def test_what_cannot_be_is_said(text, message):
    with pytest.raises(UsageError, match=message):
        to_steps(text, 64)


def test_more_than_the_whole_is_refused():
    with pytest.raises(UsageError, match="more than the whole run"):
        to_steps("101%", 64, total_steps=10)


def test_a_budget_knows_its_run():
    budget = Budget.of("10 epochs", batch_size=10, dataset_size=1000)
    assert budget.total_steps == 1000
    assert (budget.steps("5%"), budget.steps("1 epoch"), budget.steps("50 examples")) == (50, 100, 5)
    with pytest.raises(UsageError, match="at least one step"):
        Budget.of("0 steps", batch_size=10)
