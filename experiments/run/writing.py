"""Texts from a run that trained a language model, and what it took to write them."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.data.text import Tokenizer, check_vocabulary
from effjax.decoding import speculative
from effjax.decoding.beam import Beams, search
from effjax.decoding.drafts import Draft
from effjax.decoding.gemfilter import GemFilter, compress
from effjax.decoding.generate import begin, decode
from effjax.decoding.prefill import Sequences, left_pad, prefill, slots_for
from effjax.decoding.sampling import Sampling
from effjax.errors import UsageError
from experiments.run.formatting import count, duration, measurement
from experiments.run.restore import load_run
from experiments.run.shortcuts import Shortcuts

# Tokens, padded in front, and how many of each row are the prompt.
Prompts = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Written:
    """Texts, and what they took; times are of compiled functions, and compiling stands by itself.

    Attributes:
      texts: what follows each prompt.
      compile_seconds: of both functions, with a first reading of the prompts.
      first_token_seconds: from the prompts to the first token of each; None where beams are searched, which
        know no token before the last.
      seconds: from the prompts to the last token.
      tokens: that were written, up to the end of each text; with beams, those of the best.
      cache_bytes: of the caches of all layers and prompts, of one beam; with those of a draft.
      first_tokens: that were there after `first_token_seconds`.
      acceptance: of a draft's proposals, the share that was accepted; None without a draft.
      tokens_per_call: that a step of the model wrote to a text; None without a draft.
      read: the part of each prompt that was read, where that is not all of it.
    """

    texts: tuple[str, ...]
    compile_seconds: float
    first_token_seconds: float | None
    seconds: float
    tokens: int
    cache_bytes: int
    first_tokens: int = 0
    acceptance: float | None = None
    tokens_per_call: float | None = None
    read: tuple[str, ...] | None = None

    @property
    def tokens_per_second(self) -> float:
        """Behind the first tokens of each text, or, with beams, of the whole."""
        if self.first_token_seconds is None:
            return self.tokens / self.seconds
        behind = self.tokens - self.first_tokens
        return behind / max(self.seconds - self.first_token_seconds, 1e-9)


def write(
    workdir: str,
    prompts: Sequence[str],
    max_new: int,
    how: Sampling | Beams,
    seed: int,
    step: int | None = None,
    shortcuts: Shortcuts = Shortcuts(),  # noqa: B008 (it is frozen)
) -> Written:
    """Loads a run and returns what its model writes after each prompt.

    Raises:
      UsageError: for a run whose model reads no text, and as `continue_texts` does.
    """
    _check(how, shortcuts)
    program, variables = load_run(workdir, step)
    tokenizer = program.data.tokenizer
    if tokenizer is None:
        raise UsageError(f"--workdir='{workdir}' holds no language model: its data has no tokenizer.")
    return continue_texts(
        program.task.model, variables, tokenizer, prompts, max_new, how, jax.random.key(seed), shortcuts
    )


def continue_texts(
    model: Any,
    variables: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new: int,
    how: Sampling | Beams,
    key: jax.Array,
    shortcuts: Shortcuts = Shortcuts(),  # noqa: B008 (it is frozen)
) -> Written:
    """What a model writes after prompts that begin documents, up to the documents' ends.

    The shortcuts say who proposes tokens, what of the prompts is read, and what the caches keep.

    Raises:
      UsageError: before anything is compiled: for an empty prompt, no new tokens, more of both than the model
        is made for, a tokenizer with tokens that the model does not have, beams with a draft, or a draft that
        does not suit.
    """
    _check(how, shortcuts)
    # A token reads every weight once: nothing is copied on the way.
    variables = model.layers_apart(variables) if hasattr(model, "layers_apart") else variables
    gems, stop = shortcuts.gems, tokenizer.separator
    rows = _tokens(model, tokenizer, prompts, max_new, gems)
    slots_for(model, rows[0] if gems is None else rows[0][:, -gems.keep :], max_new)
    model = shortcuts.model(model)

    def choose() -> Prompts:
        return rows if gems is None else compress(model, variables, *rows, gems)

    if isinstance(how, Beams):
        text, took = _search(model, variables, choose, max_new, how, stop)
    else:
        drafting = shortcuts.drafting
        draft = None if drafting is None else drafting.made(model, variables, tokenizer)
        text, took = _draw(model, variables, draft, choose, max_new, how, key, stop)
    # The separator that ends a text is written too.
    tokens = int(np.minimum(np.sum(text != stop, axis=1) + 1, max_new).sum())
    read = None if gems is None else tuple(tokenizer.decode(row) for row in np.asarray(choose()[0]))
    texts = tuple(tokenizer.decode(row) for row in text)
    return Written(texts=texts, tokens=tokens, read=read, **took)


def _check(how: Sampling | Beams, shortcuts: Shortcuts) -> None:
    if shortcuts.drafting is not None and isinstance(how, Beams):
        raise UsageError("--beams draws nothing, and a draft only helps to draw: leave one of them out.")


def _search(
    model: Any, variables: Any, choose: Callable[[], Prompts], max_new: int, beams: Beams, stop: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """The likeliest texts, and what they took: fields of `Written`."""

    def read() -> Sequences:
        chosen = choose()
        slots = slots_for(model, chosen[0], max_new)
        return jax.block_until_ready(prefill(model, variables, *chosen, slots))

    begun = time.perf_counter()
    found = search.lower(model, variables, read(), max_new, beams, stop).compile()
    compiled = time.perf_counter() - begun

    begun = time.perf_counter()
    sequences = read()
    text = np.asarray(found(variables, sequences)[0][:, 0])
    seconds = time.perf_counter() - begun
    return text, dict(
        compile_seconds=compiled,
        first_token_seconds=None,
        seconds=seconds,
        cache_bytes=_bytes(sequences.caches),
    )


def _draw(
    model: Any,
    variables: Any,
    draft: tuple[Draft, Any] | None,
    choose: Callable[[], Prompts],
    max_new: int,
    sampling: Sampling,
    key: jax.Array,
    stop: int,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Texts that are drawn, and what they took: fields of `Written`."""
    one = jnp.int32(1)

    def start() -> Any:
        chosen = choose()
        if draft is None:
            slots = slots_for(model, chosen[0], max_new)
            return begin(prefill(model, variables, *chosen, slots), max_new, key, stop)
        return speculative.begin(model, variables, *draft, *chosen, max_new, key, stop)

    begun = time.perf_counter()
    if draft is None:
        given: tuple[Any, ...] = (variables,)
        go_on = decode.lower(model, variables, start(), one, sampling, stop).compile()
    else:
        given = (variables, draft[1])
        go_on = speculative.decode.lower(model, variables, *draft, start(), one, sampling, stop).compile()
    compiled = time.perf_counter() - begun

    begun = time.perf_counter()
    writing = start()
    cache_bytes = _bytes(writing.sequences.caches) + (0 if draft is None else _bytes(writing.draft))
    writing = jax.block_until_ready(go_on(*given, writing, one))
    first = time.perf_counter() - begun
    # With a draft the first step may write several.
    first_tokens = len(writing.text) if draft is None else int(jnp.sum(writing.tally.written))
    writing = go_on(*given, writing, jnp.int32(max_new))
    text = np.asarray(writing.text)
    seconds = time.perf_counter() - begun
    took: dict[str, Any] = dict(
        compile_seconds=compiled,
        first_token_seconds=first,
        first_tokens=first_tokens,
        seconds=seconds,
        cache_bytes=cache_bytes,
    )
    if draft is not None:
        tally = writing.tally
        took |= dict(acceptance=float(tally.acceptance), tokens_per_call=float(tally.tokens_per_call))
    return text, took


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _tokens(
    model: Any, tokenizer: Tokenizer, prompts: Sequence[str], max_new: int, gems: GemFilter | None
) -> Prompts:
    """The prompts as rows of tokens that end together, and their lengths."""
    if not prompts or not all(prompts):
        raise UsageError('--prompt is empty. Say how the text begins: --prompt="Return the ".')
    check_vocabulary(tokenizer, model.vocab)
    rows = [[tokenizer.separator, *tokenizer.encode(prompt.encode()).tolist()] for prompt in prompts]
    longest = max(map(len, rows))
    read = longest if gems is None or longest > (model.max_length or longest) else min(longest, gems.keep)
    room = max_new if model.max_length is None else model.max_length - read
    if max_new > room:
        advice = f"--max_new={room} or less" if room > 0 else "a shorter --prompt"
        raise UsageError(
            f"--max_new={max_new} after a prompt of {longest} tokens exceeds the {model.max_length} that "
            f"the model is made for: give {advice}."
        )
    padded, lengths = left_pad(rows)
    return jnp.asarray(padded), jnp.asarray(lengths)


def figures(written: Written) -> dict[str, str]:
    """What it took, for people."""
    shown = {"compiled in": duration(written.compile_seconds)}
    if written.first_token_seconds is not None:
        shown["time to first token"] = f"{duration(written.first_token_seconds)} (compiled)"
    shown["tokens written"] = str(written.tokens)
    shown["tokens a second"] = measurement(written.tokens_per_second)
    if written.acceptance is not None and written.tokens_per_call is not None:
        shown["proposals accepted"] = f"{100 * written.acceptance:.1f}%"
        shown["tokens a step"] = f"{written.tokens_per_call:.2f}"
    shown["caches"] = f"{count(written.cache_bytes)}B"
    return shown
