"""Numbers as people read them."""

import math


def count(value: float) -> str:
    """Two decimals of the largest unit, as the tables of papers have it: 5,717,416 is "5.72M"."""
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        # Rounding may carry a number into the next unit: 999,999 is 1.00M, not 1000.00k.
        if abs(value) >= size - 0.005 * size / 1e3:
            return f"{value / size:.2f}{unit}"
    return measurement(value)


def measurement(value: float) -> str:
    """Four significant digits, without needless exponents: 0.5312, 1e-05, NaN."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Inf" if value > 0 else "-Inf"
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """Milliseconds below a second, then seconds, then h:mm:ss: "12.5 ms", "3.2 s", "1:02:03"."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    return clock(seconds)


def clock(seconds: float) -> str:
    """m:ss, and h:mm:ss from one hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
