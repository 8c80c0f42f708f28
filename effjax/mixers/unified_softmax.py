"""Decoding attention whose parts need not wait for each other's largest score.

    y = sum_s e^{x_s - phi} v_s / sum_s e^{x_s - phi}                    x = scores, phi the same for all

A softmax may subtract any number; where that is the maximum, parts of the keys have to be rescaled once all
maxima are known. With a constant phi every part is a plain sum of numerators and one of denominators. It
holds as long as a < x - phi < b for all scores; where one of them leaves that interval, it is all computed
again with the running maximum. Scores of a model lie close together, so that phi, a and b are read off a few
batches once: `calibrated`.

Hong et al., "FlashDecoding++: Faster Large Language Model Inference with Asynchronization, Flat GEMM
Optimization, and Heuristics", MLSys 2024, arXiv:2311.01282, section 3. The intervals that are printed there
could not be checked: by default it is as wide as float32 allows. Models of a wide range keep the running
maximum. These are the plain forms; `Attention.unified` lets a model decode by them, or by the kernels of
`pallas_kernels.decode_attention`, which compute again only the rows that leave the interval.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from effjax.errors import UsageError
from effjax.mixers.dot_product import dot_products

# Between these e^x is far from the ends of float32: sums of a million products with values stay finite.
LEAST, MOST = -60.0, 60.0


@dataclasses.dataclass(frozen=True)
class Range:
    """Where the scores of a model lie.

    Attributes:
      phi: what is subtracted from each, the same of all layers, heads and tokens.
      low: a above.
      high: b above.
    """

    phi: float = 0.0
    low: float = LEAST
    high: float = MOST

    def __post_init__(self) -> None:
        if not LEAST <= self.low < self.high <= MOST:
            raise UsageError(
                f"scores between low={self.low} and high={self.high} of phi={self.phi}: exponentials are "
                f"sure between {LEAST:g} and {MOST:g}. A wider range keeps the running maximum."
            )


@dataclasses.dataclass(frozen=True)
class UnifiedSoftmax(Range):
    """How attention sums over cached keys when it decodes a token, with the fields of `Range` and this.

    Attributes:
      splits: parts into which the keys are cut; kernels choose theirs themselves.
      implementation: `parts` is what stands here, on every platform. `kernel` is the kernel of the platform;
        where it has none, or with a warning none for these shapes, the softmax of all keys at once, which
        `reference` is everywhere.
    """

    splits: int = 8
    implementation: Literal["parts", "kernel", "reference"] = "parts"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.splits < 1:
            raise UsageError(f"splits={self.splits} parts of the keys must be at least 1.")

    def applied(self, model: nn.Module) -> Any:
        """The same model, which decodes so, for the same parameters.

        Raises:
          UsageError: for a model whose mixer has no softmax over cached keys.
        """
        block = getattr(model, "block", None)
        mixer: Any = getattr(block, "mixer", None)
        if block is None or not hasattr(mixer, "unified"):
            named = type(model if mixer is None else mixer).__name__
            raise UsageError(
                f"{named} sums no softmax over cached keys: unified_softmax needs an LM of attention."
            )
        return model.clone(block=block.clone(mixer=mixer.clone(unified=self)))


def scores(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b s g d"],
    scale: float | None = None,
    cap: float | None = None,
    bias: Float[Array, "#b #h #n s"] | None = None,
) -> Float[Array, "b h n s"]:
    """What goes into the softmax, in float32; `scale` is `1 / sqrt(d)` where it is None."""
    x = dot_products(q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    x = x if cap is None else cap * jnp.tanh(x / cap)
    return x if bias is None else x + bias


def outside(
    x: Float[Array, "b h n s"], allowed: Bool[Array, "#b #h #n s"] | None, within: Range
) -> Bool[Array, "b h n"]:
    """Which rows have a score that leaves the interval; those that nobody sees do not count."""
    far = ~((x - within.phi > within.low) & (x - within.phi < within.high))  # also where it is no number
    return jnp.any(far if allowed is None else far & allowed, axis=3)


def unified_attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g e"],
    within: Range,
    *,
    mask: Bool[Array, "#b #h #n s"] | None = None,
    bias: Float[Array, "#b #h #n s"] | None = None,
    scale: float | None = None,
    cap: float | None = None,
    splits: int = 8,
) -> Float[Array, "b n h e"]:
    """Softmax attention by parts that are added up as they come, or with the running maximum.

    Args:
      q: queries; `h / g` of them share a key/value head.
      k: keys.
      v: values.
      within: where scores are expected.
      mask: which keys a query may see; one that sees none takes nothing.
      bias: added to the scores.
      scale: factor of the scores; None means `1 / sqrt(d)`.
      cap: scores become `cap tanh(scores / cap)` before the bias; None leaves them free.
      splits: parts into which the keys are cut; where it does not divide them they are copied once.

    Raises:
      UsageError: for no parts.
    """
    parts = _cut(k, v, mask, bias, splits)

    def part(one: Part) -> tuple[Array, Array, Array]:
        keys, values, allowed, added = one
        x = scores(q, keys, scale, cap, added)  # [B, H, N, S/P]
        far = outside(x, allowed, within)  # [B, H, N]
        powers = jnp.where(allowed, jnp.exp(x - within.phi), 0.0)
        return _weighted(powers, values), jnp.sum(powers, axis=3), far

    numerators, denominators, far = jax.vmap(part)(parts)  # [P, B, H, N, ..]

    def plain() -> Array:
        return _divided(jnp.sum(numerators, axis=0), jnp.sum(denominators, axis=0))

    again = lambda: _with_maximum(q, parts, scale, cap)  # noqa: E731
    y = jax.lax.cond(jnp.any(far), again, plain)  # [B, H, N, E]
    return jnp.moveaxis(y, 1, 2).astype(v.dtype)  # [B, N, H, E]


def kernel_attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g e"],
    within: UnifiedSoftmax,
    *,
    mask: Bool[Array, "#b 1 1 s"],
    scale: float | None = None,
    cap: float | None = None,
) -> Float[Array, "b n h e"]:
    """Softmax attention of one token by `pallas_kernels.decode_attention`; what lies behind is not read."""
    # Pallas is slow to import, and most programs have no use for it.
    from pallas_kernels.decode_attention import Within, decode_attention

    valid = jnp.broadcast_to(mask[:, 0, 0], (k.shape[0], k.shape[1]))  # [B, S]
    lengths = jnp.max(jnp.where(valid, jnp.arange(1, k.shape[1] + 1)[None], 0), axis=1)  # [B]
    return decode_attention(
        *(q, k, v, lengths.astype(jnp.int32), None, valid),
        scale=scale,
        cap=cap,
        within=Within(within.phi, within.low, within.high),
        implementation="reference" if within.implementation == "reference" else None,
    )


def synchronised_attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g e"],
    *,
    mask: Bool[Array, "#b #h #n s"] | None = None,
    bias: Float[Array, "#b #h #n s"] | None = None,
    scale: float | None = None,
    cap: float | None = None,
    splits: int = 8,
) -> Float[Array, "b n h e"]:
    """The same by parts that are rescaled by the largest score so far: Dao et al., Flash-Decoding, 2023."""
    y = _with_maximum(q, _cut(k, v, mask, bias, splits), scale, cap)
    return jnp.moveaxis(y, 1, 2).astype(v.dtype)  # [B, N, H, E]


def calibrated(batches: Iterable[Float[Array, "..."]], share: float = 0.9999, margin: float = 1.0) -> Range:
    """The range of a model's scores.

    Args:
      batches: scores that its softmax saw, without those of pairs that are masked; -inf counts as masked.
      share: of all scores, at least, that shall lie within; as many may lie below as above.
      margin: by which the interval is wider than what was seen, on either side.

    Returns:
      A range around the middle of the scores.

    Raises:
      UsageError: without scores, or for scores that lie too far apart for a constant maximum.
    """
    seen = np.concatenate([[], *(np.asarray(batch, np.float64).ravel() for batch in batches)])
    seen = seen[seen > -np.inf]
    if not len(seen) or not 0 < share <= 1:
        raise UsageError(f"there are {len(seen)} scores to read a range of share={share} off: give some.")
    low, high = np.quantile(seen, [(1 - share) / 2, (1 + share) / 2])
    low, high = float(low) - margin, float(high) + margin
    if high - low > MOST - LEAST:
        raise UsageError(
            f"scores between {low:.4g} and {high:.4g} lie too far apart for a constant maximum: keep the "
            f"running one."
        )
    phi = (low + high) / 2
    return Range(phi=phi, low=low - phi, high=high - phi)


# Keys `[B, S/P, G, D]`, values, which of them are seen `[#B, #H, #N, S/P]`, and what is added to the scores;
# parts stand in front where they are together.
Part = tuple[Array, Array, Array, Array | None]


def _cut(k: Array, v: Array, mask: Array | None, bias: Array | None, splits: int) -> Part:
    """Keys, values, mask and bias with parts in front; nobody sees what fills up the last part."""
    if splits < 1:
        raise UsageError(f"splits={splits} parts of the keys must be at least 1.")
    count = k.shape[1]
    each = -(-count // splits)

    def cut(x: Array, axis: int) -> Array:
        filled = [(0, each * splits - count if i == axis else 0) for i in range(x.ndim)]
        x = jnp.pad(x, filled) if each * splits > count else x
        return jnp.moveaxis(x.reshape(*x.shape[:axis], splits, each, *x.shape[axis + 1 :]), axis, 0)

    allowed = jnp.ones((1, 1, 1, count), bool) if mask is None else mask
    return cut(k, 1), cut(v, 1), cut(allowed, 3), None if bias is None else cut(bias, 3)


def _divided(numerator: Float[Array, "b h n e"], denominator: Float[Array, "b h n"]) -> Array:
    """Sums of values over sums of weights. Of what sees any key the weights are far from the least number."""
    return numerator / jnp.maximum(denominator, jnp.finfo(jnp.float32).tiny)[..., None]


def _weighted(powers: Float[Array, "b h n s"], v: Float[Array, "b s g e"]) -> Float[Array, "b h n e"]:
    """Sums of values, in float32."""
    b, h, n, s = powers.shape
    shared = powers.reshape(b, v.shape[2], -1, s)  # [B, G, H/G N, S]
    y = jnp.einsum("bgms,bsge->bgme", shared, v.astype(jnp.float32))
    return y.reshape(b, h, n, -1)


def _with_maximum(q: Array, parts: Part, scale: float | None, cap: float | None) -> Float[Array, "b h n e"]:
    """Part after part, each rescaling what came before it."""

    def step(state: tuple[Array, Array, Array], part: Part) -> tuple[tuple, None]:
        top, numerator, denominator = state
        keys, values, allowed, added = part
        x = jnp.where(allowed, scores(q, keys, scale, cap, added), -jnp.inf)  # [B, H, N, S/P]
        new = jnp.maximum(top, jnp.max(x, axis=3))  # [B, H, N]
        # Before any key was seen both are -inf, and nothing has to be rescaled.
        safe = jnp.where(new > -jnp.inf, new, 0.0)
        old = jnp.exp(top - safe)
        powers = jnp.exp(x - safe[..., None])
        numerator = numerator * old[..., None] + _weighted(powers, values)
        return (new, numerator, denominator * old + jnp.sum(powers, axis=3)), None

    b, n, h = q.shape[:3]
    start = (
        jnp.full((b, h, n), -jnp.inf),
        jnp.zeros((b, h, n, parts[1].shape[-1])),
        jnp.zeros((b, h, n)),
    )
    (_, numerator, denominator), _ = jax.lax.scan(step, start, parts)
    return _divided(numerator, denominator)
