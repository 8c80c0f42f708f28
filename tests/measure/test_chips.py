"""The table of chips: complete, internally consistent, and clear when asked for what it lacks."""

import pytest

from effjax.errors import UsageError
from effjax.measure import CHIPS, chip


@pytest.mark.parametrize("name", CHIPS)
def test_every_chip_has_every_figure_and_its_source(name):
    held = chip(name)
    assert held.name == name
    # From the slowest road into the chip to the fastest; the arithmetic is faster than any.
    assert 0 < held.network <= held.host_link < held.link < held.bandwidth < min(held.peak.values())
    assert 10e9 < held.memory < 200e9
    assert held.rate("bfloat16") >= held.rate("float32")
    for field in ("rates", "memory", "bandwidth", "link", "network", "host_link"):
        assert field in held.sources, field


@pytest.mark.parametrize(
    ("name", "matrix_units", "macs_per_clock", "gigahertz"),
    [
        ("v4", 8, 128 * 128, 1.05),
        ("v5e", 4, 128 * 128, 1.5),
        ("v5p", 8, 128 * 128, 1.75),
        ("v6e", 2, 2 * 256 * 256, 1.75),
        ("a100", 108 * 4, 256, 1.41),
        ("h100", 132 * 4, 512, 1.8295),
        ("h200", 132 * 4, 512, 1.8295),
        ("b200", 148 * 4, 1024, 1.8353),
    ],
)
def test_the_bfloat16_rate_is_units_times_clock(name, matrix_units, macs_per_clock, gigahertz):
    expected = 2 * matrix_units * macs_per_clock * gigahertz * 1e9
    assert chip(name).rate("bfloat16") == pytest.approx(expected, rel=0.012)


def test_a_tpu_multiplies_float32_by_bfloat16_passes_and_a_gpu_by_tf32():
    assert chip("v5e").rate("float32") == chip("v5e").fastest("float32") == chip("v5e").rate("bfloat16")
    h100 = chip("h100")
    assert h100.fastest("float32") == h100.rate("tf32") > 5 * h100.rate("float32")
    assert h100.fastest("bfloat16") == h100.rate("bfloat16")


def test_dtypes_go_by_the_names_jax_gives_them():
    assert chip("h100").rate("float8_e4m3fn") == chip("h100").rate("float8_e5m2") == 1978.9e12
    assert chip("v6e").rate("uint8") == chip("v6e").rate("int8")


def test_an_unknown_chip_and_a_missing_rate_say_what_there_is():
    with pytest.raises(UsageError, match=r"'v5' is no chip.*'v5e'"):
        chip("v5")
    with pytest.raises(UsageError, match=r"a100 has no rate for float8_e4m3fn.*bfloat16, float16"):
        chip("a100").rate("float8_e4m3fn")
