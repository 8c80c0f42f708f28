"""Text from a run that trained a language model."""

from typing import Any

import jax
import numpy as np

from effjax.data.text import Tokenizer
from effjax.decoding.generate import generate, left_pad
from effjax.decoding.sampling import Sampling
from effjax.errors import UsageError
from experiments.run.restore import load_run


def write(
    workdir: str, prompt: str, max_new: int, sampling: Sampling, seed: int, step: int | None = None
) -> str:
    """Loads a run and returns the prompt with what its model writes after it.

    Raises:
      UsageError: for a run whose model reads no text, and as `continuation` does.
    """
    program, variables = load_run(workdir, step)
    tokenizer = program.data.tokenizer
    if tokenizer is None:
        raise UsageError(f"--workdir='{workdir}' holds no language model: its data has no tokenizer.")
    return prompt + continuation(
        program.task.model, variables, tokenizer, prompt, max_new, sampling, jax.random.key(seed)
    )


def continuation(
    model: Any,
    variables: Any,
    tokenizer: Tokenizer,
    prompt: str,
    max_new: int,
    sampling: Sampling,
    key: jax.Array,
) -> str:
    """What a model writes after a prompt that begins a document, up to the document's end.

    Raises:
      UsageError: for an empty prompt, no new tokens, or more of both than the model is made for.
    """
    if not prompt:
        raise UsageError('--prompt is empty. Say how the text begins: --prompt="Return the ".')
    tokens = [tokenizer.separator, *tokenizer.encode(prompt.encode()).tolist()]
    room = max_new if model.max_length is None else model.max_length - len(tokens)
    if max_new > room:
        advice = f"--max_new={room} or less" if room > 0 else "a shorter --prompt"
        raise UsageError(
            f"--max_new={max_new} after a prompt of {len(tokens)} tokens exceeds the {model.max_length} that "
            f"the model is made for: give {advice}."
        )
    prompts, lengths = left_pad([tokens])
    new = generate(model, variables, prompts, lengths, max_new, key, sampling, tokenizer.separator)
    return tokenizer.decode(np.asarray(new[0]))
