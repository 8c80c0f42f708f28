"""Texts from a run that trained a language model, and what it took to write them."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.config import build_kind
from effjax.data.text import Tokenizer, check_vocabulary
from effjax.decoding.beam import Beams, search
from effjax.decoding.gemfilter import GemFilter, compress
from effjax.decoding.generate import Writing, begin, decode
from effjax.decoding.prefill import Sequences, left_pad, prefill, slots_for
from effjax.decoding.sampling import Sampling
from effjax.errors import UsageError
from experiments.run import kind_spec
from experiments.run.formatting import count, duration, measurement
from experiments.run.restore import load_run

# What reads less of a prompt than all of it.
METHODS = {"gemfilter": GemFilter}


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
      cache_bytes: of the caches of all layers and prompts, of one beam.
      read: the part of each prompt that was read, where that is not all of it.
    """

    texts: tuple[str, ...]
    compile_seconds: float
    first_token_seconds: float | None
    seconds: float
    tokens: int
    cache_bytes: int
    read: tuple[str, ...] | None = None

    @property
    def tokens_per_second(self) -> float:
        """Behind the first token of each text, or, with beams, of the whole."""
        if self.first_token_seconds is None:
            return self.tokens / self.seconds
        behind = self.tokens - len(self.texts)
        return behind / max(self.seconds - self.first_token_seconds, 1e-9)


def write(
    workdir: str,
    prompts: Sequence[str],
    max_new: int,
    how: Sampling | Beams,
    seed: int,
    step: int | None = None,
    gems: GemFilter | None = None,
) -> Written:
    """Loads a run and returns what its model writes after each prompt.

    Raises:
      UsageError: for a run whose model reads no text, and as `continue_texts` does.
    """
    program, variables = load_run(workdir, step)
    tokenizer = program.data.tokenizer
    if tokenizer is None:
        raise UsageError(f"--workdir='{workdir}' holds no language model: its data has no tokenizer.")
    return continue_texts(
        program.task.model, variables, tokenizer, prompts, max_new, how, jax.random.key(seed), gems
    )


def parse_method(spec: str | None) -> GemFilter | None:
    """Reads `--method=gemfilter:layer=2,keep=64`; None where there is none.

    Raises:
      UsageError: for what cannot be read, an unknown kind or field, or a value that the method refuses.
    """
    if spec is None:
        return None
    kind, fields = kind_spec.read("method", spec, "gemfilter:layer=2,keep=64")
    return build_kind(METHODS, {"kind": kind, **fields}, f"--method={spec}")


def continue_texts(
    model: Any,
    variables: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new: int,
    how: Sampling | Beams,
    key: jax.Array,
    gems: GemFilter | None = None,
) -> Written:
    """What a model writes after prompts that begin documents, up to the documents' ends.

    With `gems` it reads of each prompt what they leave.

    Raises:
      UsageError: before anything is compiled: for an empty prompt, no new tokens, more of both than the model
        is made for, or a tokenizer with tokens that the model does not have.
    """
    # A token reads every weight once: nothing is copied on the way.
    variables = model.layers_apart(variables) if hasattr(model, "layers_apart") else variables
    padded, lengths = _tokens(model, tokenizer, prompts, max_new, gems)
    kept = padded if gems is None else padded[:, -gems.keep :]
    slots, stop = slots_for(model, kept, max_new), tokenizer.separator

    def choose() -> tuple[jax.Array, jax.Array]:
        return (padded, lengths) if gems is None else compress(model, variables, padded, lengths, gems)

    def read() -> Sequences:
        return jax.block_until_ready(prefill(model, variables, *choose(), slots))

    def start(sequences: Sequences) -> Writing:
        return begin(sequences, max_new, key, stop)

    begun = time.perf_counter()
    sequences = read()
    if isinstance(how, Beams):
        go_on = search.lower(model, variables, sequences, max_new, how, stop).compile()
    else:
        go_on = decode.lower(model, variables, start(sequences), jnp.int32(1), how, stop).compile()
    compiled = time.perf_counter() - begun

    begun, first = time.perf_counter(), None
    sequences = read()
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(sequences.caches))
    if isinstance(how, Beams):
        text = np.asarray(go_on(variables, sequences)[0][:, 0])
    else:
        writing = go_on(variables, start(sequences), jnp.int32(1))
        jax.block_until_ready(writing.text)
        first = time.perf_counter() - begun
        text = np.asarray(go_on(variables, writing, jnp.int32(max_new)).text)
    seconds = time.perf_counter() - begun
    # The separator that ends a text is written too.
    tokens = int(np.minimum(np.sum(text != stop, axis=1) + 1, max_new).sum())
    texts = tuple(tokenizer.decode(row) for row in text)
    chosen = None if gems is None else tuple(tokenizer.decode(row) for row in np.asarray(choose()[0]))
    return Written(texts, compiled, first, seconds, tokens, cache_bytes, chosen)


def _tokens(
    model: Any, tokenizer: Tokenizer, prompts: Sequence[str], max_new: int, gems: GemFilter | None
) -> tuple[jax.Array, jax.Array]:
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
    shown["caches"] = f"{count(written.cache_bytes)}B"
    return shown
