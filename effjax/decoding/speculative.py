"""Speculative decoding: a draft proposes several tokens, and the model reads them all in one step.

    x_1 .. x_g ~ q                              the draft, one after the other
    p_1 .. p_g+1                                the model, at once
    x_i is accepted if u_i < p_i(x_i) / q_i(x_i),   u_i uniform,   up to the first that is not, n + 1
    x_n+1 ~ norm(max(p_n+1 - q_n+1, 0))         in its place;  x_g+1 ~ p_g+1 where all were accepted

A token x comes out with the probability min(q(x), p(x)) of being proposed and accepted, plus that of being
drawn in the place of one refused, max(p(x) - q(x), 0): together p(x). So texts follow the model's
distribution whatever the draft is, and greedy decoding writes the same text as without. Both p and q are
taken after temperature and filters. A step that reads few tokens takes about as long as one that reads one
where reading the weights is what takes the time.

    acceptance rate   alpha = E[min(1, p(x) / q(x))]
    tokens a call     (1 - alpha^(g + 1)) / (1 - alpha),  were it the same and independent at all places

Sources: Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding", ICML 2023,
arXiv:2211.17192, algorithm 1; Chen et al., "Accelerating Large Language Model Decoding with Speculative
Sampling", 2023, arXiv:2302.01318, algorithm 2.

One step of several tokens must say what several steps of one say: experts with a capacity, which drop tokens
for those that are read with them, do not.

The functions are those of `effjax.decoding.generate`, with a draft. Texts advance by different numbers of
tokens; each has its own count of slots in the caches, and takes back what was refused.
"""

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from effjax.decoding.drafts import Draft, unlimited
from effjax.decoding.prefill import Sequences, prefill, slots_for
from effjax.decoding.rewind import check_rewinds, rewind
from effjax.decoding.sampling import Sampling, keys_of_rows, probabilities


@flax.struct.dataclass
class Tally:
    """How well a draft did, for each text.

    Attributes:
      calls: `[B]` int, steps of the model.
      tested: `[B]` int, proposals up to the first that was refused, with it.
      accepted: `[B]` int, those of them that were accepted.
      written: `[B]` int, tokens of the text.
    """

    calls: Any
    tested: Any
    accepted: Any
    written: Any

    @property
    def acceptance(self) -> Float[Array, ""]:
        """The acceptance rate over all texts, alpha above."""
        return jnp.sum(self.accepted) / jnp.maximum(jnp.sum(self.tested), 1)

    @property
    def tokens_per_call(self) -> Float[Array, ""]:
        """Tokens that a step of the model writes to a text; 1 without a draft."""
        return jnp.sum(self.written) / jnp.maximum(jnp.sum(self.calls), 1)


@flax.struct.dataclass
class Writing:
    """Texts that are being written.

    The fields are annotated `Any` because the same class also carries their shapes and shardings.

    Attributes:
      sequences: prompts and what was written, in the caches.
      draft: the draft's state.
      keys: `[B]`, the key of each row's draws.
      text: `[B, max_new]` int, what was written; the stop token, or 0, where nothing is yet.
      ended: `[B]` bool, whether the stop token was written.
      tally: how well the draft did, and how much is written.
    """

    sequences: Sequences
    draft: Any
    keys: Any
    text: Any
    ended: Any
    tally: Tally


def verify(
    p: Float[Array, "more v"],
    q: Float[Array, "tokens v"],
    proposed: Int[Array, " tokens"],
    key: PRNGKeyArray | Key[Array, ""],
) -> tuple[Int[Array, " more"], Int[Array, ""]]:
    """Accepts the first of one text's proposals, and draws one token more.

    Args:
      p: what the model says at the place of each proposal, and behind the last: `tokens + 1` distributions.
      q: what each proposal was drawn from.
      proposed: the proposals.
      key: of these draws.

    Returns:
      The accepted tokens and the one that follows them, which also fills the rest; and how many are accepted.
    """
    tested, drawn = jax.random.split(key)
    place = jnp.arange(proposed.shape[0])  # [G]
    u = jax.random.uniform(tested, proposed.shape)
    good = u * q[place, proposed] < p[place, proposed]
    accepted = jnp.sum(jnp.cumprod(good))
    # Behind the last proposal nothing was proposed, and the rest is p itself.
    rest = jnp.maximum(p - jnp.pad(q, ((0, 1), (0, 0))), 0.0)[accepted]  # [V]
    # Rounding alone can leave nothing of two distributions that are the same.
    rest = jnp.where(jnp.sum(rest) > 0.0, rest, p[accepted])
    token = jax.random.categorical(drawn, jnp.log(rest))
    tokens = jnp.where(jnp.arange(p.shape[0]) < accepted, jnp.pad(proposed, (0, 1)), token)
    return tokens.astype(jnp.int32), accepted


def begin(
    model: nn.Module,
    variables: Any,
    draft: Draft,
    draft_variables: Any,
    prompts: Int[Any, "b n"],
    lengths: Int[Any, " b"],
    max_new: int,
    key: PRNGKeyArray,
    stop_token: int | None = None,
    slots: int | None = None,
) -> Writing:
    """Reads the prompts; the arguments are those of `generate`."""
    slots = slots_for(model, prompts, max_new, slots)
    check_rewinds(model)
    draft.check(model, prompts, max_new)
    prompts, lengths = jnp.asarray(prompts), jnp.asarray(lengths)
    slots += draft.tokens + 1  # proposals stand in them before it is known whether they stay
    sequences = prefill(unlimited(model), variables, prompts, lengths, slots)
    own = rewind(sequences.caches, sequences.positions)
    batch = prompts.shape[0]
    return Writing(
        sequences=Sequences(own, sequences.tokens, sequences.positions),
        draft=draft.start(draft_variables, prompts, lengths, slots),
        keys=keys_of_rows(key, batch),
        text=jnp.full((batch, max_new), 0 if stop_token is None else stop_token, jnp.int32),
        ended=jnp.zeros(batch, bool),
        # Four arrays and not one four times: `decode` gives each of them up.
        tally=Tally(*(jnp.zeros(batch, jnp.int32) for _ in range(4))),
    )


@functools.partial(
    jax.jit, static_argnames=("model", "draft", "sampling", "stop_token"), donate_argnames="writing"
)
def decode(
    model: nn.Module,
    variables: Any,
    draft: Draft,
    draft_variables: Any,
    writing: Writing,
    until: Int[Array, ""] | int,
    sampling: Sampling,
    stop_token: int | None = None,
) -> Writing:
    """Writes until every text has at least `until` tokens or has ended.

    Args:
      model: as in `begin`.
      variables: of the model.
      draft: as in `begin`.
      draft_variables: of the draft.
      writing: what `begin` or an earlier call returned; its arrays are given up.
      until: tokens of a text, at most the `max_new` of `begin`.
      sampling: how a token is drawn.
      stop_token: ends a text, as in `begin`.
    """
    batch, max_new = writing.text.shape
    number = jnp.arange(draft.tokens + 1)[None]  # [1, G + 1]

    def unfinished(now: Writing) -> Array:
        return jnp.any((now.tally.written < until) & ~now.ended)

    def write(now: Writing) -> Writing:
        at, tally = now.sequences, now.tally
        room = jnp.where(now.ended, 0, max_new - tally.written)  # [B]
        # What no text has room for is padding, and needs no position that the model does not know.
        positions = jnp.where(number < room[:, None], at.positions[:, None] + number, -1)  # [B, G + 1]
        keys = jax.vmap(lambda key, written: jax.random.split(jax.random.fold_in(key, written)))(
            now.keys, tally.written
        )  # [B, 2]
        proposed, q, state = draft.propose(
            draft_variables, now.draft, at.tokens, positions[:, :-1], keys[:, 0], sampling
        )  # [B, G], [B, G, V]
        read = jnp.concatenate([at.tokens[:, None], proposed], axis=1)  # [B, G + 1]
        logits, caches = model.apply(variables, read, at.caches, positions, method="step")  # [B, G + 1, V]
        p = probabilities(logits, sampling)
        q = jax.nn.one_hot(proposed, p.shape[-1], dtype=p.dtype) if q is None else q
        tokens, accepted = jax.vmap(verify)(p, q, proposed, keys[:, 1])  # [B, G + 1], [B]

        new = (number <= accepted[:, None]) & (number < room[:, None])  # [B, G + 1]
        ended = now.ended
        if stop_token is not None:
            stops = new & (tokens == stop_token)
            new = new & (jnp.cumsum(stops, axis=1) - stops == 0)
            ended = ended | jnp.any(stops, axis=1)
        count = jnp.sum(new, axis=1)  # [B]
        place = jnp.where(new, tally.written[:, None] + number, max_new)
        # A finished text stays where it is.
        ahead = jnp.where(room > 0, accepted + 1, 0)
        last = jnp.take_along_axis(tokens, accepted[:, None], axis=1)[:, 0]
        following = at.positions + ahead
        return Writing(
            sequences=Sequences(rewind(caches, following), last, following),
            draft=draft.accept(state, tokens, accepted, at.positions + 1),
            keys=now.keys,
            text=now.text.at[jnp.arange(batch)[:, None], place].set(tokens, mode="drop"),
            ended=ended,
            tally=Tally(
                calls=tally.calls + (room > 0),
                tested=tally.tested + jnp.minimum(jnp.minimum(accepted + 1, draft.tokens), count),
                accepted=tally.accepted + jnp.minimum(accepted, count),
                written=tally.written + count,
            ),
        )

    return jax.lax.while_loop(unfinished, write, writing)


def generate(
    model: nn.Module,
    variables: Any,
    draft: Draft,
    draft_variables: Any,
    prompts: Int[Any, "b n"],
    lengths: Int[Any, " b"],
    max_new: int,
    key: PRNGKeyArray,
    sampling: Sampling,
    stop_token: int | None = None,
    slots: int | None = None,
) -> tuple[Int[Array, "b max_new"], Tally]:
    """Goes on from each prompt, as the function of the same name in `effjax.decoding.generate` does.

    What a prompt gets depends on its row, not on the prompts beside it. At temperatures above 0 it is another
    text from the same distribution: the same key draws other tokens with a draft than without.

    Args:
      model: with a `vocab`, what `prefill` needs, and keys and values alone to keep.
      variables: of the model.
      draft: who proposes.
      draft_variables: of the draft, where it has any.
      prompts: tokens, padded in front; see `left_pad`.
      lengths: how many tokens of each row are the prompt, at least 1.
      max_new: tokens to write.
      key: of all draws.
      sampling: how a token is drawn, and proposed.
      stop_token: ends a text; the loop ends when all texts have ended.
      slots: tokens that the caches hold of a text, for calls of many sizes to share one shape; None takes as
        many as are needed. Those of proposals come on top.

    Returns:
      The new tokens; from its first `stop_token` on, a row holds nothing else. And how well the draft did.

    Raises:
      UsageError: as `slots_for` does, and for a draft or a model that does not suit, before anything is
        compiled.
    """
    writing = begin(
        model, variables, draft, draft_variables, prompts, lengths, max_new, key, stop_token, slots
    )
    done = decode(model, variables, draft, draft_variables, writing, max_new, sampling, stop_token)
    return done.text, done.tally
