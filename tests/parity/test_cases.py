"""Outputs, gradients and round trips against the original libraries."""

import pytest

from tests.parity.case import compare_gradients, compare_outputs, compare_round_trip
from tests.parity.cases import CASES
from tests.parity.cases_language import FULL

# One after another, by one worker: each takes up to 13 GB.
LARGE = {f"transformers_{name}" for name in FULL}
ALL = [
    pytest.param(name, marks=pytest.mark.xdist_group("large")) if name in LARGE else name for name in CASES
]
GRADIENTS = [name for name, case in CASES.items() if case.gradient]


@pytest.mark.parametrize("name", ALL)
def test_outputs_agree(name):
    assert compare_outputs(CASES[name]) < 1e-4


@pytest.mark.parametrize("name", ALL)
def test_weights_come_back_bit_by_bit(name):
    assert compare_round_trip(CASES[name]) == []


@pytest.mark.parametrize("name", GRADIENTS)
def test_train_mode_gradients_agree(name):
    differences = compare_gradients(CASES[name])
    assert differences
    assert {name: d for name, d in differences.items() if d > 1e-4} == {}
