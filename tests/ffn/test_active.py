"""What CATS and Spark share: the masked form, the form by rows, and the step that reads active rows alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.ffn.active import BLOCK, active_sum

F, V, C = 3 * BLOCK, 5, 7
EXPAND, CONTRACT, X = (
    np.float32(np.random.default_rng(i).normal(size=size)) for i, size in enumerate([(F, V), (F, C), (V,)])
)
SUM = jax.jit(active_sum)


def gate_of(active):
    draw, gate = np.random.default_rng(active), np.zeros(F, np.float32)
    gate[draw.permutation(F)[:active]] = draw.normal(size=active)
    return gate


def by_hand(gate, expand=EXPAND, contract=CONTRACT):
    y = np.zeros(C)
    for f in np.flatnonzero(gate):
        y += float(gate[f]) * float(np.dot(expand[f].astype(float), X)) * contract[f].astype(float)
    return y


@pytest.mark.parametrize("active", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, F - 1, F])
def test_any_number_of_active_neurons_is_exact(active):
    gate = gate_of(active)
    np.testing.assert_allclose(SUM(gate, X, EXPAND, CONTRACT), by_hand(gate), rtol=1e-4, atol=1e-4)


def test_rows_that_do_not_count_are_not_read():
    # What is never read may be anything: a product with 0 would give NaN.
    gate = gate_of(20)
    gate[-1] = 1.0  # the last block is filled up with the last row
    expand, contract = EXPAND.copy(), CONTRACT.copy()
    expand[gate == 0], contract[gate == 0] = np.nan, np.inf
    np.testing.assert_allclose(SUM(gate, X, expand, contract), by_hand(gate), rtol=1e-4, atol=1e-4)


def test_half_precision_is_summed_in_float32():
    half = [jnp.asarray(a, jnp.bfloat16) for a in (gate_of(F), X, EXPAND, CONTRACT)]
    y = SUM(*half)
    assert y.dtype == jnp.bfloat16
    exact = [np.asarray(a, np.float64) for a in half]
    expected = (exact[0] * (exact[2] @ exact[1])) @ exact[3]
    np.testing.assert_allclose(y, expected, rtol=2**-7, atol=1e-3 * np.abs(expected).max())


def test_work_grows_with_the_active_neurons_alone():
    hlo = SUM.lower(gate_of(1), X, EXPAND, CONTRACT).as_text()
    assert "while" in hlo
    assert f"tensor<{F}x{V}xf32>" in hlo  # the matrix goes in whole,
    assert f"tensor<{BLOCK}x{V}xf32>" in hlo  # and a block of it is multiplied:
    assert f"(tensor<{F}x{V}xf32>, tensor<{V}xf32>) -> tensor<{F}xf32>" not in hlo  # never all of it
