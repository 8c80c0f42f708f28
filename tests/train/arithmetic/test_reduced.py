"""Fewer bits of a float, against every number of the formats."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from effjax.errors import UsageError
from effjax.train.arithmetic.products import Operand
from effjax.train.arithmetic.reduced import Format, Reduced

HARDWARE = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
BITS = np.arange(2**16, dtype=np.uint16)
BITS = BITS[(BITS & 0x7F80) != 0x7F80]  # neither infinity nor none
BFLOATS = BITS.view(ml_dtypes.bfloat16)


def numbers(dtype):
    """All finite numbers of a format of 8 bits, in order and each once."""
    every = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    return np.unique(every[np.isfinite(every)])


@pytest.mark.parametrize("name", HARDWARE)
def test_rounding_is_the_hardware_s_on_all_numbers_and_midpoints(name):
    kept = numbers(HARDWARE[name])
    form = Format.of(name)
    assert form.largest == kept[-1]
    np.testing.assert_array_equal(form.round(jnp.asarray(kept)), kept)
    middle = (kept[1:].astype(np.float64) + kept[:-1]) / 2
    near = [
        middle,
        np.nextafter(middle.astype(np.float32), np.inf),
        np.nextafter(middle.astype(np.float32), -np.inf),
    ]
    for x in (v.astype(np.float32) for v in near):
        np.testing.assert_array_equal(
            np.asarray(form.round(jnp.asarray(x))), x.astype(HARDWARE[name]).astype(np.float32)
        )


def test_a_number_too_large_becomes_the_largest_and_none_stays_none():
    x = jnp.asarray([1e6, -1e6, jnp.inf, -jnp.inf, jnp.nan])
    np.testing.assert_array_equal(Format(4, 3).round(x), [448.0, -448.0, jnp.inf, -jnp.inf, jnp.nan])
    np.testing.assert_array_equal(Format(8, 3).round(x[2:]), x[2:])


def test_seven_bits_of_mantissa_are_bfloat16():
    for masked in (True, False):
        same = Format(8, 7).round(jnp.asarray(BFLOATS), masked)
        assert same.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(same).view(np.uint16), BITS)
    x = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    np.testing.assert_array_equal(
        np.asarray(Format(8, 7).round(jnp.asarray(x))), x.astype(ml_dtypes.bfloat16).astype(np.float32)
    )


@pytest.mark.parametrize("mantissa", [1, 3, 6])
def test_masking_clears_the_last_bits_of_bfloat16(mantissa):
    ours = Format(8, mantissa).round(jnp.asarray(BFLOATS), masked=True)
    cleared = (BITS >> (7 - mantissa)) << (7 - mantissa)
    np.testing.assert_array_equal(np.asarray(ours).view(np.uint16), cleared)


def test_rounding_to_nearest_takes_the_even_one_and_carries():
    x = jnp.asarray([1 + 1 / 16, 1 + 3 / 16, 1.999, -(1 + 3 / 16), 0.0, -0.0], jnp.float32)
    y = Format(8, 3).round(x)
    np.testing.assert_array_equal(y, [1.0, 1.25, 2.0, -1.25, 0.0, -0.0])
    np.testing.assert_array_equal(jnp.signbit(y), jnp.signbit(x))


def test_a_narrow_exponent_underflows_gradually():
    form = Format(5, 7)  # smallest normal number 2^-14, last place 2^-21
    x = jnp.asarray([2.0**-14, 2.0**-21, 1.25 * 2.0**-21, 2.0**-23, 65280.0, 70000.0], jnp.float32)
    np.testing.assert_array_equal(form.round(x), [2.0**-14, 2.0**-21, 2.0**-21, 0, 65280.0, 65280.0])
    np.testing.assert_array_equal(form.round(jnp.asarray([1.999 * 2.0**-21]), masked=True), [2.0**-21])


def test_narrow_formats_are_scaled_to_the_largest_number_of_a_tensor(draw):
    x = jnp.asarray(draw.normal(size=(8, 16)) * 1e-6, jnp.float32)
    scale = np.abs(np.asarray(x)).max() / np.float32(448)
    expected = (np.asarray(x) / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    np.testing.assert_allclose(Reduced(operands="e4m3").rounded(x, ()), expected, rtol=1e-6)
    np.testing.assert_array_equal(Reduced(operands="e4m3").rounded(jnp.zeros((2, 3)), ()), np.zeros((2, 3)))


@pytest.mark.parametrize("gradients", [None, "e5m2"])
def test_all_three_products_have_rounded_operands(gradients, draw):
    arithmetic = Reduced(operands="e8m3", gradients=gradients)
    x, w, g = (jnp.asarray(draw.normal(size=n), jnp.float32) for n in ((6, 24), (24, 8), (6, 8)))
    y, pull = jax.vjp(lambda x, w: Operand(w, arithmetic, 1, 1).product(x), x, w)
    a, b = (Format(8, 3).round(v, masked=True) for v in (x, w))
    c = g if gradients is None else arithmetic.in_format(g, gradients)
    np.testing.assert_allclose(y, a @ b, rtol=1e-6, atol=1e-6)
    dx, dw = pull(g)
    np.testing.assert_allclose(dx, c @ b.T, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(dw, a.T @ c, rtol=1e-6, atol=1e-6)
    assert jnp.max(jnp.abs(a @ b - x @ w)) > 0.05


@pytest.mark.parametrize("name", ["e8m8", "e1m3", "float8", ""])
def test_a_format_that_is_none_is_refused(name):
    with pytest.raises(UsageError, match="is no format: say e8m5"):
        Reduced(operands=name)
