"""Rotary positions, and how their frequencies are rescaled for long contexts.

    (a, b) <- (a cos p f_i - b sin p f_i,  b cos p f_i + a sin p f_i),    f_i = base^(-2i/d)

for each pair `i` of the `d` channels of a query or key at position `p`: Su et al. 2021, eq. 15. A rescaling
replaces `f` by other frequencies, and sometimes multiplies the result by an amplitude (`Scaling`).
"""

import dataclasses
import math
from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from effjax.errors import UsageError

Table = tuple[Float[Array, " half"], float]
Pairs = Literal["halves", "neighbours"]


def plain_frequencies(base: float, dims: int) -> Float[np.ndarray, " half"]:
    """`base^(-2i/d)` for `i = 0 .. d/2 - 1`, in double precision."""
    return float(base) ** (-np.arange(dims // 2, dtype=np.float64) * 2 / dims)


def rotate(
    x: Float[Array, "b n heads d"],
    positions: Int[Array, "b n"],
    frequencies: Float[Array, " half"],
    amplitude: Float[Array, ""] | float = 1.0,
    pairs: Pairs = "halves",
) -> Float[Array, "b n heads d"]:
    """Turns channel pairs by their positions, in float32.

    Args:
      x: queries or keys.
      positions: place of each token.
      frequencies: radians a position of each pair; pairs that they do not reach stay as they are.
      amplitude: multiplies what is turned.
      pairs: of the first `d = 2 len(frequencies)` channels, `(i, i + d/2)` or `(2i, 2i + 1)`.
    """
    dims = 2 * frequencies.shape[0]
    angle = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    cos, sin = jnp.cos(angle) * amplitude, jnp.sin(angle) * amplitude  # [B, N, 1, d/2]
    turned, rest = x[..., :dims].astype(jnp.float32), x[..., dims:]
    if pairs == "halves":
        a, b = jnp.split(turned, 2, axis=-1)
    else:
        a, b = turned[..., 0::2], turned[..., 1::2]
    a, b = a * cos - b * sin, b * cos + a * sin
    if pairs == "halves":
        turned = jnp.concatenate([a, b], axis=-1)
    else:
        turned = jnp.stack([a, b], axis=-1).reshape(*x.shape[:-1], dims)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)


@runtime_checkable
class Scaling(Protocol):
    """A rescaling of the frequencies."""

    @property
    def dynamic(self) -> bool:
        """Whether the frequencies depend on the length of the sequence."""
        ...

    def table(self, base: float, dims: int, length: Int[Array, ""] | None) -> Table:
        """Returns `d/2` frequencies and the amplitude, for a sequence of so many tokens."""
        ...


@dataclasses.dataclass(frozen=True)
class Linear:
    """Position interpolation: `f_i / factor`, Chen et al. 2023."""

    factor: float
    dynamic = False

    def table(self, base: float, dims: int, length: Int[Array, ""] | None) -> Table:
        """Every frequency is divided by the factor."""
        return _constant(plain_frequencies(base, dims) / self.factor), 1.0


@dataclasses.dataclass(frozen=True)
class Dynamic:
    """The base grows with the length `n` of the sequence beyond the trained length `L`.

        base' = base (factor n / L - (factor - 1))^(d / (d - 2))

    "NTK-aware" interpolation with a dynamic factor; Peng et al. 2023, section 3.3, and transformers' form.
    """

    factor: float
    original_length: int
    dynamic = True

    def table(self, base: float, dims: int, length: Int[Array, ""] | None) -> Table:
        """Frequencies of the grown base."""
        n = jnp.maximum(_known(length), self.original_length).astype(jnp.float32)
        stretch = self.factor * n / self.original_length - (self.factor - 1)
        exponents = np.float32(np.arange(dims // 2) * 2 / dims)
        return _constant(plain_frequencies(base, dims)) * stretch ** (-exponents * (dims / (dims - 2))), 1.0


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Low frequencies are divided by `factor`, high ones stay, those between are mixed.

        turns_i = L f_i / (2 pi),    s = clip((turns_i - low) / (high - low), 0, 1)
        f_i <- (1 - s) f_i / factor + s f_i

    with the trained length `L`: Grattafiori et al. 2024 and the models' published code.
    """

    factor: float
    low: float
    high: float
    original_length: int
    dynamic = False

    def table(self, base: float, dims: int, length: Int[Array, ""] | None) -> Table:
        """Mixed frequencies."""
        f = plain_frequencies(base, dims)
        turns = self.original_length * f / (2 * math.pi)
        s = np.clip((turns - self.low) / (self.high - self.low), 0.0, 1.0)
        return _constant((1 - s) * f / self.factor + s * f), 1.0


@dataclasses.dataclass(frozen=True)
class Yarn:
    """Frequencies that turn rarely within the trained length are divided, the attention is sharpened.

        i(turns) = d log(L / (2 pi turns)) / (2 log base)
        r_i = clip((i - i(fast)) / (i(slow) - i(fast)), 0, 1),    f_i <- r_i f_i / factor + (1 - r_i) f_i

    and queries and keys are multiplied by `0.1 log(factor) + 1`: Peng et al. 2023, eqs. 17 to 22.

    Attributes:
      factor: by how much the context grows.
      original_length: trained length `L`.
      fast: turns above which a frequency stays.
      slow: turns below which it is divided whole.
      amplitude: of queries and keys; None means the formula.
      whole_pairs: whether the two borders are rounded outwards to whole pairs.
    """

    factor: float
    original_length: int
    fast: float = 32.0
    slow: float = 1.0
    amplitude: float | None = None
    whole_pairs: bool = True
    dynamic = False

    def table(self, base: float, dims: int, length: Int[Array, ""] | None) -> Table:
        """Ramped frequencies and the amplitude."""
        f = plain_frequencies(base, dims)

        def pair(turns: float) -> float:
            return dims * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

        first, last = pair(self.fast), pair(self.slow)
        if self.whole_pairs:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dims - 1)
        if first == last:
            last += 0.001  # a step, not a division by zero
        ramp = np.clip((np.arange(dims // 2) - first) / (last - first), 0.0, 1.0)
        amplitude = yarn_amplitude(self.factor) if self.amplitude is None else self.amplitude
        return _constant(ramp * f / self.factor + (1 - ramp) * f), amplitude


def yarn_amplitude(factor: float, weight: float = 1.0) -> float:
    """`0.1 weight log(factor) + 1`, and 1 where the context does not grow."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1.0 else 1.0


@dataclasses.dataclass(frozen=True)
class LongRope:
    """A divisor for each frequency, found by search: Ding et al. 2024.

    Attributes:
      short: divisors for sequences of up to `original_length` tokens, one a pair.
      long: divisors for longer ones.
      original_length: trained length.
      amplitude: of queries and keys.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_length: int
    amplitude: float = 1.0
    dynamic = True

    def table(self, base: float, dims: int, length: Int[Array, ""] | None) -> Table:
        """Frequencies of the short or of the long context."""
        for divisors in (self.short, self.long):
            if len(divisors) != dims // 2:
                raise UsageError(f"{len(divisors)} divisors were given for {dims // 2} rotary frequencies.")
        f = plain_frequencies(base, dims)
        short, long = (_constant(f / np.asarray(divisors)) for divisors in (self.short, self.long))
        return jnp.where(_known(length) > self.original_length, long, short), self.amplitude


SCALINGS = {"linear": Linear, "dynamic": Dynamic, "llama3": Llama3, "yarn": Yarn, "longrope": LongRope}
"""The rescalings by the name a config gives them."""


def table(base: float, dims: int, scaling: Scaling | None, positions: Int[Array, "b n"] | None) -> Table:
    """Frequencies and amplitude of one layer.

    Args:
      base: of the plain frequencies.
      dims: channels of a head that turn.
      scaling: how the frequencies change; None leaves them.
      positions: of the tokens, read where the frequencies depend on the length.
    """
    if scaling is None:
        return _constant(plain_frequencies(base, dims)), 1.0
    length = None if positions is None or not scaling.dynamic else jnp.max(positions) + 1
    return scaling.table(base, dims, length)


def _constant(frequencies: np.ndarray) -> jax.Array:
    return jnp.asarray(frequencies, jnp.float32)


def _known(length: Int[Array, ""] | None) -> Int[Array, ""]:
    if length is None:
        raise UsageError("frequencies that depend on the length cannot differ by layer: use another scaling.")
    return length
