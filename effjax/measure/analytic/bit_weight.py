"""Products of eight-bit integers taken apart into digits, and the cycles of engines that skip zero digits.

    a = sum_w r^w digit_w(a),      C[m, n] = sum_k a b = sum_w r^w sum_k digit_w(a[m, k]) b[k, n]

The sum over w is a loop like the other three. Moving it about gives the paper's transformations: keep the sum
over k in carry-save form and add once at the end (OPT1); shift by r^w after the sum over k, not inside it
(OPT2); walk over digits that are not zero (OPT3); find them once for a whole row of the engine (OPT4).

Source: Wu et al., "Exploring the Performance Improvement of Tensor Processing Engines through Transformation
in the Bit-weight Dimension of MACs", HPCA 2025, arXiv:2503.06342. EN-T is the encoding of its hardware, Wu et
al., ICCD 2024, arXiv:2404.11887, as in github.com/wqzustc/High-Performance-Tensor-Processing-Engines. What
the paper gains is clock, area and energy of silicon; none of them can be had here, only digits and cycles.

    >>> average_digits(quantise(kernel), "en_t")       # partial products for each weight of a layer
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8, Int32

from effjax.errors import UsageError, did_you_mean
from effjax.measure.analytic.shape import Number

RADIX = {"booth": 4, "en_t": 4, "twos_complement": 2, "sign_magnitude": 2}
"""The encodings: radix-4 digits -2 to 2 (four of them), or bits (eight)."""


def digits(code: int, encoding: str) -> tuple[int, ...]:
    """Returns the digits of one int8 code, least significant first.

    `booth` reads overlapping triples of bits: -2 b_{2w+1} + b_{2w} + b_{2w-1}. `en_t` turns the pairs of bits
    of the magnitude into -1, 0, 1, 2 with a carry, and gives each the sign. `twos_complement` is the bits,
    the highest negative; `sign_magnitude` those of the magnitude, each with the sign.

    Raises:
      UsageError: for an unknown encoding.
    """
    sign, magnitude = (-1 if code < 0 else 1), abs(code)
    if encoding == "booth":
        bits = [0, *(code >> i & 1 for i in range(8))]  # Python's shift of a negative number is arithmetic
        return tuple(bits[i] + bits[i + 1] - 2 * bits[i + 2] for i in range(0, 8, 2))
    if encoding == "en_t":
        found, carry = [], 0
        for w in range(4):
            pair = (magnitude >> 2 * w & 3) + carry
            carry = int(pair > 2)
            found.append(sign * (pair - 4 * carry))
        return tuple(found)
    if encoding == "twos_complement":
        return tuple((code >> i & 1) * (-1 if i == 7 else 1) for i in range(8))
    if encoding == "sign_magnitude":
        return tuple(sign * (magnitude >> i & 1) for i in range(8))
    raise UsageError(f"No encoding {encoding!r}. {did_you_mean(encoding, RADIX)}")


def digit_table(encoding: str) -> Int8[np.ndarray, "codes planes"]:
    """The digits of all 256 codes, row `code + 128`."""
    return np.array([digits(code, encoding) for code in range(-128, 128)], np.int8)


def split(codes: Int8[Array, "*shape"], encoding: str) -> Int8[Array, "*shape planes"]:
    """Looks every code's digits up."""
    return jnp.take(jnp.asarray(digit_table(encoding)), codes.astype(jnp.int32) + 128, axis=0)


def matmul(
    a: Int8[Array, "m k"],
    b: Int8[Array, "k n"],
    encoding: str = "en_t",
    shift: Literal["after", "inside"] = "after",
) -> Int32[Array, "m n"]:
    """`a @ b` exactly, by the digits of `a`; the shift by r^w after the sum over k (OPT2), or inside it."""
    planes = split(a, encoding).astype(jnp.int32)  # [M, K, W]
    weights = RADIX[encoding] ** jnp.arange(planes.shape[-1], dtype=jnp.int32)  # [W]
    b = b.astype(jnp.int32)
    if shift == "inside":
        return jnp.einsum("mkw,kn->mn", planes * weights[None, None], b)
    return jnp.einsum("mkw,kn->wmn", planes, b).transpose(1, 2, 0) @ weights


def carry_save_sum(terms: Int32[Array, "k *shape"]) -> Int32[Array, "*shape"]:
    """Adds along the first axis without carrying (OPT1): every term goes through 3:2 compressors.

    sum' = s ^ c ^ x and carry' = majority(s, c, x) << 1 keep s + c + x modulo 2^32 in a time that does not
    depend on the width; one addition at the end resolves them.
    """

    def compress(state: tuple[Array, Array], term: Array) -> tuple[tuple[Array, Array], None]:
        s, c = state
        return (s ^ c ^ term, (s & c | s & term | c & term) << 1), None

    zero = jnp.zeros_like(terms[0])
    (s, c), _ = jax.lax.scan(compress, (zero, zero), terms)
    return s + c


def quantise(weights: Float[Array, "*shape"]) -> Int8[Array, "*shape"]:
    """Symmetric int8 codes: the largest magnitude becomes 127."""
    return jnp.round(weights * (127 / jnp.max(jnp.abs(weights)))).astype(jnp.int8)


def average_digits(codes: Int8[Array, "*shape"], encoding: str) -> float:
    """Digits that are not zero, partial products, a code."""
    return float(jnp.mean(jnp.sum(split(codes, encoding) != 0, axis=-1)))


def uniform() -> Float[np.ndarray, " codes"]:
    """Every code as likely as any other."""
    return np.full(256, 1 / 256)


def gaussian(deviation: Number) -> Float[np.ndarray, " codes"]:
    """Probabilities of the rounded codes of a normal distribution with mean 0, kept where they fit int8."""
    edges = [math.erf((code - 0.5) / (deviation * math.sqrt(2))) for code in range(-128, 129)]
    mass = np.diff(np.array(edges))
    return mass / mass.sum()


def expected_digits(encoding: str, probabilities: Float[np.ndarray, " codes"]) -> float:
    """Expected number of digits that are not zero, exactly, over all 256 codes."""
    return float((digit_table(encoding) != 0).sum(axis=1) @ probabilities)


@dataclasses.dataclass(frozen=True)
class Engine:
    """`rows x columns` elements that hold a tile of C; each takes `depth` products of a sum at once."""

    rows: int
    columns: int
    depth: int = 1
    skewed: bool = False
    """Whether operands enter one step later in each row and column, so that a tile fills and drains."""


# The sizes that the reference synthesises; that of the two-dimensional matrix is the systolic array's.
ENGINES = {
    "systolic": Engine(16, 16, skewed=True),
    "cube": Engine(8, 8, 8),
    "adder_tree": Engine(1, 32, 16),
    "matrix": Engine(16, 16),
}
OPTIONS = ("mac", "opt1", "opt2", "opt3", "opt4")


def cycles(
    a: Int[np.ndarray, "m k"], n: int, engine: Engine, option: str = "mac", encoding: str = "en_t"
) -> int:
    """Cycles of `a @ b` with `n` columns of b.

    `mac`, `opt1`: one step of k a cycle, whatever the digits. `opt2`: the digits one after the other, for as
    many more steps of k at once: the same but for what does not divide. `opt3`, `opt4`: an element takes one
    digit a cycle that is not zero, those of four operands at one bit weight in a row and at least one cycle
    for them, as the reference's sparse encoder does; rows wait for each other at the end of k, and what works
    on one sum at each step. OPT1 and OPT4 change the clock, the area and the energy, not the cycles; the
    paper puts OPT3 and OPT4 into an array of their own, of smaller elements, not into the four engines.

    Args:
      a: int8 codes, the operand that is encoded.
      n: columns of the other.
      engine: one of `ENGINES`, or another.
      option: one of `OPTIONS`.
      encoding: a key of `RADIX`.

    Raises:
      UsageError: for an unknown option or encoding.
    """
    if option not in OPTIONS:
        raise UsageError(f"No option {option!r}. {did_you_mean(option, OPTIONS)}")
    table = digit_table(encoding)
    (m, k), planes = a.shape, table.shape[1]
    across = math.ceil(n / engine.columns)
    down = math.ceil(m / engine.rows)
    fill = (engine.rows + engine.columns - 2) * engine.skewed * across * down
    if option in ("mac", "opt1"):
        return across * down * math.ceil(k / engine.depth) + fill
    if option == "opt2":
        return across * down * planes * math.ceil(k / (engine.depth * planes)) + fill
    nonzero = table[a.astype(np.int32) + 128] != 0  # [M, K, W]
    span = 4 * engine.depth
    nonzero = np.pad(nonzero, ((0, -m % engine.rows), (0, -k % span), (0, 0)))
    groups = nonzero.reshape(len(nonzero), -1, engine.depth, 4, planes).sum(axis=3)  # [M, steps, depth, W]
    steps = np.maximum(groups, 1).max(axis=2).sum(axis=(1, 2))  # [M]
    return across * int(steps.reshape(down, engine.rows).max(axis=1).sum()) + fill
