"""Who proposes tokens to a larger model: another model, or the text itself.

    x_1 ~ q(. | text),  x_2 ~ q(. | text, x_1),  ...,  x_tokens                   a model: `ModelDraft`
    x_1 .. x_tokens = what followed the last words of the text before             `PromptLookup`

Any draft leaves the texts that are written as the larger model would write them, see
`effjax.decoding.speculative`; a good one saves time. A model may be smaller, or the larger one itself with
fewer layers: `effjax.decoding.layer_plan`. Looking up costs nothing, and serves where texts repeat their
prompts: Saxena, "Prompt Lookup Decoding", 2023, github.com/apoorvumang/prompt-lookup-decoding.

A draft's own caches hold all tokens but the last, or, where all that it proposed was accepted, all but the
last two: it never read the last one that it drew itself. The step that begins the next proposal reads both.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from effjax.decoding.prefill import prefill, slots_for
from effjax.decoding.rewind import check_rewinds, rewind
from effjax.decoding.sampling import Sampling, probabilities
from effjax.errors import UsageError

Proposal = tuple[Int[Array, "b tokens"], Float[Array, "b tokens v"] | None, Any]


@runtime_checkable
class Draft(Protocol):
    """What proposes tokens; its state is a tree of arrays."""

    @property
    def tokens(self) -> int:
        """How many it proposes at a time."""

    def check(self, model: nn.Module, prompts: Int[Any, "b n"], max_new: int) -> None:
        """Refuses what it cannot serve, with a UsageError."""

    def start(self, variables: Any, prompts: Int[Array, "b n"], lengths: Int[Array, " b"], slots: int) -> Any:
        """Its state after the prompts, for texts of up to so many tokens with them."""

    def propose(
        self,
        variables: Any,
        state: Any,
        last: Int[Array, " b"],
        positions: Int[Array, "b tokens"],
        keys: Key[Array, " b"],
        sampling: Sampling,
    ) -> Proposal:
        """Goes on from the last token.

        Args:
          variables: its own.
          state: its own.
          last: the last token of each text.
          positions: where the last token and the first proposals stand; negative where a text needs no more.
          keys: of the draws of each text.
          sampling: how tokens are drawn.

        Returns:
          Tokens, the distributions that they were drawn from (None where nothing was drawn), and the state.
        """

    def accept(
        self,
        state: Any,
        tokens: Int[Array, "b more"],
        accepted: Int[Array, " b"],
        positions: Int[Array, " b"],
    ) -> Any:
        """The state behind the tokens that were written.

        Args:
          state: what `propose` returned.
          tokens: those it proposed as far as they were accepted, and one more.
          accepted: how many of its own there are.
          positions: of the first of them.
        """


@flax.struct.dataclass
class Following:
    """A draft model that follows texts.

    Attributes:
      caches: with a count of slots for every sequence.
      before: `[B]` int, the token before the last one.
      behind: `[B]` bool, whether the caches lack that token.
    """

    caches: Any
    before: Any
    behind: Any


@dataclasses.dataclass(frozen=True)
class ModelDraft:
    """A model proposes, token by token.

    Attributes:
      model: with what `prefill` needs, the vocabulary of the larger one, and keys and values alone to keep.
      tokens: how many it proposes at a time.
    """

    model: nn.Module
    tokens: int = 4

    def __post_init__(self) -> None:
        _check_tokens(self.tokens)

    def check(self, model: nn.Module, prompts: Int[Any, "b n"], max_new: int) -> None:
        """Refuses another vocabulary, too long a text, and a model that cannot take tokens back."""
        if self.model.vocab != model.vocab:
            raise UsageError(
                f"the draft has {self.model.vocab} tokens and the model {model.vocab}: take a draft of "
                f"the same tokenizer."
            )
        slots_for(self.model, prompts, max_new)
        check_rewinds(self.model)

    def start(
        self, variables: Any, prompts: Int[Array, "b n"], lengths: Int[Array, " b"], slots: int
    ) -> Following:
        """Reads the prompts."""
        caches = prefill(unlimited(self.model), variables, prompts, lengths, slots).caches
        none = jnp.zeros_like(lengths, jnp.int32)
        return Following(rewind(caches, lengths - 1), before=none, behind=none > 0)

    def propose(
        self,
        variables: Any,
        state: Following,
        last: Int[Array, " b"],
        positions: Int[Array, "b tokens"],
        keys: Key[Array, " b"],
        sampling: Sampling,
    ) -> Proposal:
        """As many steps as tokens; the first of them reads up to two."""

        def draw(logits: Array, number: Array | int) -> tuple[Array, Array]:
            q = probabilities(logits, sampling)  # [B, V]
            each = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
            return jax.vmap(jax.random.categorical)(each, jnp.log(q)).astype(jnp.int32), q

        def step(read: Array, caches: Any, at: Array) -> tuple[Array, Any]:
            return self.model.apply(variables, read, caches, at, method="step")

        def go_on(now: tuple[Any, Array], next_: tuple[Array, Array]) -> tuple[Any, Any]:
            caches, token = now
            number, at = next_
            logits, caches = step(token[:, None], caches, at[:, None])  # [B, 1, V]
            token, q = draw(logits[:, 0], number)
            return (caches, token), (token, q)

        # Caches in which every sequence has its own count want padding behind the tokens.
        first, nothing = positions[:, 0], jnp.full_like(last, -1)
        behind = state.behind & (first >= 0)
        two = jnp.where(behind, jnp.stack([state.before, last]), jnp.stack([last, last])).T  # [B, 2]
        at = jnp.where(behind, jnp.stack([first - 1, first]), jnp.stack([first, nothing])).T  # [B, 2]
        logits, caches = step(two, state.caches, at)  # [B, 2, V]
        token, q = draw(jnp.where(behind[:, None], logits[:, 1], logits[:, 0]), 0)
        (caches, _), (tokens, qs) = jax.lax.scan(
            go_on, (caches, token), (jnp.arange(1, self.tokens), positions[:, 1:].T)
        )
        tokens = jnp.concatenate([token[None], tokens]).T  # [B, tokens]
        qs = jnp.concatenate([q[None], qs]).swapaxes(0, 1)  # [B, tokens, V]
        return tokens, qs, Following(caches, state.before, state.behind)

    def accept(
        self,
        state: Following,
        tokens: Int[Array, "b more"],
        accepted: Int[Array, " b"],
        positions: Int[Array, " b"],
    ) -> Following:
        """Takes back what was not accepted."""
        caches = rewind(state.caches, positions + accepted)
        return Following(caches, before=tokens[:, self.tokens - 1], behind=accepted == self.tokens)


@dataclasses.dataclass(frozen=True)
class PromptLookup:
    """What followed the last time the same words stood in the text; where they never did, anything.

    Attributes:
      words: the most last tokens of the text that are looked for. The longest run of them that stood there
        before counts, and of several the latest.
      tokens: how many it proposes at a time.
    """

    words: int = 3
    tokens: int = 4

    def __post_init__(self) -> None:
        _check_tokens(self.tokens)
        if self.words < 1:
            raise UsageError(f"words is {self.words}: look for at least 1 token.")

    def check(self, model: nn.Module, prompts: Int[Any, "b n"], max_new: int) -> None:
        """Serves every model."""

    def start(
        self, variables: Any, prompts: Int[Array, "b n"], lengths: Int[Array, " b"], slots: int
    ) -> Int[Array, "b slots"]:
        """The text so far, token `p` at place `p`; -1 behind it."""
        size = prompts.shape[1]
        place = jnp.arange(slots)[None]  # [1, S]
        padding = (size - lengths)[:, None]  # [B, 1]
        tokens = jnp.take_along_axis(prompts, jnp.minimum(place + padding, size - 1), axis=1)  # [B, S]
        return jnp.where(place < lengths[:, None], tokens, -1).astype(jnp.int32)

    def propose(
        self,
        variables: Any,
        state: Int[Array, "b slots"],
        last: Int[Array, " b"],
        positions: Int[Array, "b tokens"],
        keys: Key[Array, " b"],
        sampling: Sampling,
    ) -> Proposal:
        """Looks the last words up; where what followed reaches the end of the text, it begins again."""

        def of_one(text: Int[Array, " slots"], end: Int[Array, ""]) -> Int[Array, " tokens"]:
            place, back = jnp.arange(text.shape[0])[:, None], jnp.arange(self.words)[None]  # [S, 1], [1, W]
            there = (place - back >= 0) & (end - back >= 0)
            same = there & (text[place - back] == text[end - back])  # [S, W]
            run = jnp.sum(jnp.cumprod(same, axis=1), axis=1)  # [S]
            latest = run * text.shape[0] + place[:, 0]
            found = jnp.argmax(jnp.where(place[:, 0] < end, latest, -1))
            period = jnp.maximum(end - found, 1)
            return text[found + 1 + jnp.arange(self.tokens) % period]

        tokens = jax.vmap(of_one)(state, jnp.maximum(positions[:, 0], 0))  # [B, tokens]
        return jnp.maximum(tokens, 0), None, state

    def accept(
        self,
        state: Int[Array, "b slots"],
        tokens: Int[Array, "b more"],
        accepted: Int[Array, " b"],
        positions: Int[Array, " b"],
    ) -> Int[Array, "b slots"]:
        """Writes them down."""
        number = jnp.arange(tokens.shape[1])[None]  # [1, tokens + 1]
        place = jnp.where(number <= accepted[:, None], positions[:, None] + number, state.shape[1])
        rows = jnp.arange(tokens.shape[0])[:, None]
        return state.at[rows, place].set(tokens, mode="drop")


def unlimited(model: nn.Module) -> nn.Module:
    """The model without `max_length`: proposals need slots for longer than they stand in the text."""
    return model.clone(max_length=None) if hasattr(model, "max_length") else model


def _check_tokens(tokens: int) -> None:
    if tokens < 1:
        raise UsageError(f"the draft proposes {tokens} tokens at a time: let it propose at least 1.")
