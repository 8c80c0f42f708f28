"""Where one chunk of a text ends and the next begins, told from the keys of a layer.

    l, r = the w keys before a gap, the w keys behind it           of all heads together
    Similarity:  score = 1 - cos(mean l, mean r)
    Learned:     score = MLP(l', r', |l' - r'|, l' r', cos(l', r')),   l', r' = means of Attention(l, r)

and the gaps of largest score are taken, no two within `apart` tokens. A layer's own attention says what is to
be learned: in how unequal measure later tokens look at both sides,

    ratio = max(a_l, a_r) / min(a_l, a_r),   a = attention from beyond the gap's window, mean over heads

and a gap is a boundary where it is 2 or more; the loss is focal cross-entropy. Xiong et al.,
arXiv:2510.24606, section 3.2, with sizes and targets as in the authors' first code: w = 4, one attention
layer of 8 heads over the 2w keys, its layer norm, 256 hidden units, apart 8, one predictor for all layers.
`Similarity` needs no training and is not the authors'.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from effjax.errors import UsageError
from effjax.layers.dense import Dense
from effjax.mixers.chunks import spaced
from effjax.mixers.dot_product import softmax_attention


@runtime_checkable
class Boundaries(Protocol):
    """Where chunks begin."""

    def begins(
        self, keys: Float[Array, "b n groups d"], valid: Bool[Array, "b n"], chunk: int
    ) -> Bool[Array, "b n"]:
        """Which tokens begin a chunk, besides the first; about every `chunk`-th, and never more than that.

        Args:
          keys: of a text's tokens.
          valid: which of them are no padding.
          chunk: mean length of a chunk.
        """


@dataclasses.dataclass(frozen=True)
class Even:
    """All chunks have the same length."""

    def begins(
        self, keys: Float[Array, "b n groups d"], valid: Bool[Array, "b n"], chunk: int
    ) -> Bool[Array, "b n"]:
        """Every `chunk`-th token that is no padding."""
        return valid & ((jnp.cumsum(valid.astype(jnp.int32), axis=1) - 1) % chunk == 0)


@dataclasses.dataclass(frozen=True)
class Similarity:
    """Chunks end where the keys turn into another direction.

    Attributes:
      window: keys on either side that are compared.
      apart: tokens between two boundaries, at least.
    """

    window: int = 4
    apart: int = 8

    def __post_init__(self) -> None:
        _check(self.window, self.apart)

    def begins(
        self, keys: Float[Array, "b n groups d"], valid: Bool[Array, "b n"], chunk: int
    ) -> Bool[Array, "b n"]:
        """The sharpest turns."""
        sides = windows(keys, self.window)  # [B, N, 2W, C]
        before, behind = jnp.mean(sides[:, :, : self.window], 2), jnp.mean(sides[:, :, self.window :], 2)
        scores = 1 - cosine(before, behind)  # [B, N]
        return _taken(scores, valid, chunk, self.window, self.apart)


class BoundaryPredictor(nn.Module):
    """Says of each token how likely a chunk begins there.

    Attributes:
      window: keys on either side.
      heads: of the attention among them.
      hidden: units of the perceptron.
    """

    window: int = 4
    heads: int = 8
    hidden: int = 256

    @nn.compact
    def __call__(self, keys: Float[Array, "b n groups d"]) -> Float[Array, "b n"]:
        """Returns logits; those of the first and last `window` tokens look at zeros."""
        sides = windows(keys, self.window)  # [B, N, 2W, C]
        b, n, places, width = sides.shape
        if width % self.heads:
            raise UsageError(f"heads={self.heads} does not divide the {width} channels of a layer's keys.")
        rows, size = sides.reshape(b * n, places, width), width // self.heads
        q, k, v = (
            Dense((self.heads, size), ("embed", "heads", "head_dim"), name=name)(rows)  # [B N, 2W, H, D]
            for name in ("query", "key", "value")
        )
        mixed = softmax_attention(q, k, v, mask=None, causal=False)  # [B N, 2W, H, D]
        mixed = Dense(width, ("heads", "head_dim", "embed"), inputs=2, name="output")(mixed)  # [B N, 2W, C]
        mixed = nn.LayerNorm(epsilon=1e-5, name="norm")(mixed).reshape(b, n, places, width)
        before, behind = jnp.mean(mixed[:, :, : self.window], 2), jnp.mean(mixed[:, :, self.window :], 2)
        alike = cosine(before, behind)[:, :, None]  # [B, N, 1]
        facts = [before, behind, jnp.abs(before - behind), before * behind, alike]
        h = nn.relu(Dense(self.hidden, ("embed", "mlp"), name="in")(jnp.concatenate(facts, axis=-1)))
        return Dense(1, ("mlp", None), name="out")(h)[:, :, 0]  # [B, N]


@dataclasses.dataclass(frozen=True, eq=False)
class Learned:
    """Chunks end where a trained predictor says so; two of these are equal if they are the same object.

    Attributes:
      predictor: the definition.
      params: its parameters, constants of whatever is compiled with them.
      least: logit of a boundary, at least.
      apart: tokens between two boundaries, at least.
    """

    predictor: BoundaryPredictor
    params: Any
    least: float = 1.1
    apart: int = 8

    def __post_init__(self) -> None:
        _check(self.predictor.window, self.apart)

    def begins(
        self, keys: Float[Array, "b n groups d"], valid: Bool[Array, "b n"], chunk: int
    ) -> Bool[Array, "b n"]:
        """The most likely ones."""
        logits: Array = self.predictor.apply({"params": self.params}, keys)  # type: ignore[assignment]
        scores = jnp.where(logits > self.least, logits.astype(jnp.float32), -jnp.inf)
        return _taken(scores, valid, chunk, self.predictor.window, self.apart)


BOUNDARIES: dict[str, Any] = {"even": Even, "similarity": Similarity}


def windows(keys: Float[Array, "b n groups d"], window: int) -> Float[Array, "b n places c"]:
    """The keys on both sides of the gap before each token, in float32, with zeros beyond the ends."""
    b, n = keys.shape[:2]
    flat = keys.reshape(b, n, -1).astype(jnp.float32)  # [B, N, C]
    flat = jnp.pad(flat, ((0, 0), (window, window), (0, 0)))
    return jnp.stack([flat[:, place : place + n] for place in range(2 * window)], axis=2)  # [B, N, 2W, C]


def cosine(a: Float[Array, "*batch c"], b: Float[Array, "*batch c"]) -> Float[Array, "*batch"]:
    """Of the angle between both; 0 where one has no length."""
    lengths = jnp.sum(a * a, axis=-1) * jnp.sum(b * b, axis=-1)
    return jnp.sum(a * b, axis=-1) * jax.lax.rsqrt(jnp.maximum(lengths, 1e-12))


def attention_ratio(weights: Float[Array, "b h n n"], window: int) -> Float[Array, "b n"]:
    """How unequally later tokens look at both sides of the gap before each token; 0 near the ends.

    Args:
      weights: of causal attention, rows of queries; -inf nowhere.
      window: tokens on either side; queries are those behind them, and within twice the window of the ends
        nothing is said.
    """
    n = weights.shape[2]
    mean = jnp.mean(weights.astype(jnp.float32), axis=1)  # [B, N, N]
    # What later queries than i take from key j: sums from the end, so that small ones are not lost.
    later = jnp.cumsum(mean[:, ::-1], axis=1)[:, ::-1]  # [B, N, N], queries i and later
    at = jnp.arange(n)
    first = jnp.minimum(at + window, n - 1)  # the first query beyond the window
    taken = jnp.take_along_axis(later, first[None, :, None], axis=1)  # [B, N, N]
    sides = []
    for shift in (-window, 0):
        places = jnp.clip(at[:, None] + shift + jnp.arange(window)[None], 0, n - 1)  # [N, W]
        sides.append(jnp.sum(jnp.take_along_axis(taken, places[None], axis=2), axis=2))  # [B, N]
    larger, smaller = jnp.maximum(*sides), jnp.minimum(*sides)
    told = (at >= 2 * window) & (at <= n - 2 * window)
    return jnp.where(told[None], (larger + 1e-6) / (smaller + 1e-6), 0.0)


def focal_loss(
    logits: Float[Array, "*batch"],
    targets: Bool[Array, "*batch"],
    focus: float = 2.0,
    positive: float = 1.3,
) -> Float[Array, "*batch"]:
    """(1 - p_t)^focus times the cross-entropy, in which boundaries weigh `positive` times as much.

    Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017.
    """
    right = jnp.where(targets, jax.nn.sigmoid(logits), jax.nn.sigmoid(-logits))
    entropy = jnp.where(targets, -positive * jax.nn.log_sigmoid(logits), -jax.nn.log_sigmoid(-logits))
    return (1 - right) ** focus * entropy


def _taken(
    scores: Float[Array, "b n"], valid: Bool[Array, "b n"], chunk: int, window: int, apart: int
) -> Bool[Array, "b n"]:
    """The best places among those whose windows hold tokens alone, one fewer than there may be chunks."""
    n = scores.shape[1]
    ends = jnp.pad(valid, ((0, 0), (window, window)))  # [B, N + 2W], padding and tokens are of one piece each
    whole = ends[:, :n] & ends[:, 2 * window - 1 : n + 2 * window - 1]
    most = jnp.sum(valid, axis=1) // chunk - 1  # [B]
    return spaced(jnp.where(whole, scores, -jnp.inf), most, apart)


def _check(window: int, apart: int) -> None:
    if window < 1 or apart < 0:
        raise UsageError(f"window={window} must be at least 1, and apart={apart} at least 0.")
