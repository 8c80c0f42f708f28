"""From logits to one token: temperature, top-k, top-p, min-p.

    p = softmax(logits / temperature)                       temperature 0 takes the largest logit
    top-k keeps the k most likely tokens                    Fan et al. 2018
    top-p keeps the smallest set of most likely tokens      Holtzman et al. 2020, section 3.1
          whose probabilities add up to at least p
    min-p keeps the tokens of at least the share m of the   Nguyen et al. 2024, section 3
          largest probability: p_i >= m max p

Filters set what they drop to -inf. They are applied in this order, each on what the one before it left.
Ties go to the smaller token number in the first two, so that they keep exactly the number they promise.

`sample` knows at compile time how is drawn; `sample_rows` is told with the logits, of every row by itself.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from effjax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
      temperature: divides the logits; 0 is greedy decoding.
      top_k: most likely tokens that are kept; None keeps all.
      top_p: mass of most likely tokens that is kept; 1 keeps all.
      min_p: share of the largest probability that a token needs to be kept; 0 keeps all.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature is {self.temperature}: give 0 (greedy) or a positive number.")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k is {self.top_k}: keep at least 1 token, or leave it out to keep all.")
        if not 0.0 < self.top_p <= 1.0:
            raise UsageError(f"top_p is {self.top_p}: give a number above 0 and at most 1 (keeps all).")
        if not 0.0 <= self.min_p <= 1.0:
            raise UsageError(f"min_p is {self.min_p}: give a number from 0 (keeps all) to 1.")


@flax.struct.dataclass
class Samplings:
    """How the next token of each row is drawn, as data: what `Sampling` says, row by row.

    The fields are annotated `Any` because the same class also carries their shapes and shardings.

    Attributes:
      temperature: `[B]` float32; 0 is greedy.
      top_k: `[B]` int32; more than there are tokens keeps all.
      top_p: `[B]` float32; 1 keeps all.
      log_min_p: `[B]` float32, the logarithm of the share; -inf keeps all.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    log_min_p: Any


def in_rows(samplings: Sequence[Sampling]) -> Samplings:
    """How each row is drawn, as arrays of NumPy."""
    return Samplings(
        temperature=np.asarray([how.temperature for how in samplings], np.float32),
        top_k=np.asarray([how.top_k or 2**30 for how in samplings], np.int32),
        top_p=np.asarray([how.top_p for how in samplings], np.float32),
        # Of the share in double precision, as where it is known at compile time.
        log_min_p=np.asarray(
            [math.log(how.min_p) if how.min_p else -math.inf for how in samplings], np.float32
        ),
    )


def top_k(logits: Float[Array, "*batch v"], k: Int[Array, ""] | int) -> Float[Array, "*batch v"]:
    """Keeps the `k` largest logits; all of them where there are fewer."""
    return jnp.where(_rank(logits) < k, logits, -jnp.inf)


def top_p(logits: Float[Array, "*batch v"], p: Float[Array, ""] | float) -> Float[Array, "*batch v"]:
    """Keeps the most likely tokens until their mass reaches `p`; the first is always kept."""
    falling = jax.nn.softmax(jnp.sort(logits, axis=-1, descending=True), axis=-1)
    # A token stays if the mass of those before it has not reached p.
    before = jnp.roll(jnp.cumsum(falling, axis=-1), 1, axis=-1).at[..., 0].set(0.0)
    return jnp.where(jnp.take_along_axis(before < p, _rank(logits), axis=-1), logits, -jnp.inf)


def min_p(logits: Float[Array, "*batch v"], share: float) -> Float[Array, "*batch v"]:
    """Keeps the tokens of at least `share`, above 0, of the largest probability; the largest always is."""
    return _near(logits, math.log(share))


def _near(logits: Float[Array, "*batch v"], log_share: Float[Array, ""] | float) -> Float[Array, "*batch v"]:
    # The normaliser cancels: p_i / max p = exp(logit_i - max logit).
    least = jnp.max(logits, axis=-1, keepdims=True) + log_share
    return jnp.where(logits >= least, logits, -jnp.inf)


def _rank(logits: Float[Array, "*batch v"]) -> Int[Array, "*batch v"]:
    """The place of each token in falling order of its logit, from 0."""
    order = jnp.argsort(logits, axis=-1, stable=True, descending=True)
    return jnp.argsort(order, axis=-1)


def keys_of_rows(key: PRNGKeyArray, rows: int) -> Key[Array, " rows"]:
    """A key for the draws of each row, which does not depend on how many there are."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows))


def filtered(logits: Float[Array, "*batch v"], sampling: Sampling) -> Float[Array, "*batch v"]:
    """Logits over a temperature above 0, with -inf for the tokens that the filters drop."""
    logits = logits.astype(jnp.float32) / sampling.temperature
    if sampling.top_k is not None:
        logits = top_k(logits, sampling.top_k)
    if sampling.top_p < 1.0:
        logits = top_p(logits, sampling.top_p)
    if sampling.min_p > 0.0:
        logits = min_p(logits, sampling.min_p)
    return logits


def probabilities(logits: Float[Array, "*batch v"], sampling: Sampling) -> Float[Array, "*batch v"]:
    """What `sample` draws from, in float32; greedy decoding gives everything to one token."""
    if sampling.temperature == 0.0:
        return jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=jnp.float32)
    return jax.nn.softmax(filtered(logits, sampling), axis=-1)


def sample(
    logits: Float[Array, " v"], key: PRNGKeyArray | Key[Array, ""], sampling: Sampling
) -> Int[Array, ""]:
    """Draws one token from one sequence's logits."""
    if sampling.temperature == 0.0:
        return jnp.argmax(logits)
    return jax.random.categorical(key, filtered(logits, sampling))


def sample_rows(
    logits: Float[Array, "b v"], keys: PRNGKeyArray | Key[Array, " b"], how: Samplings
) -> Int[Array, " b"]:
    """Draws one token of each row, as `sample` does with that row's logits, key and way.

    Nothing is sorted in a step in which no row asks for a filter that needs it.
    """
    greedy = how.temperature == 0.0
    scaled = logits.astype(jnp.float32) / jnp.where(greedy, 1.0, how.temperature)[:, None]  # [B, V]
    sorts = ~greedy & ((how.top_k < logits.shape[1]) | (how.top_p < 1.0))

    def narrowed(logits: Array, k: Array, p: Array) -> Array:
        logits = top_k(logits, k)
        return jnp.where(p < 1.0, top_p(logits, p), logits)

    scaled = jax.lax.cond(
        jnp.any(sorts), jax.vmap(narrowed), lambda rows, *_: rows, scaled, how.top_k, how.top_p
    )
    scaled = jax.vmap(_near)(scaled, how.log_min_p)
    drawn = jax.vmap(jax.random.categorical)(keys, scaled)
    return jnp.where(greedy, jnp.argmax(logits, axis=1), drawn)
