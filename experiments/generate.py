"""Writes on from prompts with a trained language model.

    python -m experiments.generate --workdir=runs/lm --prompt="Return the " --max_new=200
    python -m experiments.generate --workdir=runs/lm --prompt="Return the " --top_k=40 --seed=1
    python -m experiments.generate --workdir=runs/lm --prompt="Return" --prompt="The class" --beams=4
    python -m experiments.generate --workdir=runs/lm --prompts=prompts.txt --min_p=0.1 --top_p=1
    python -m experiments.generate --workdir=runs/lm --prompt="Return" --draft=runs/small --draft_tokens=4
    python -m experiments.generate --workdir=runs/lm --prompt="Return" --draft_layers=0,1,3
    python -m experiments.generate --workdir=runs/lm --prompts=long.txt --method=gemfilter:layer=1,keep=64
    python -m experiments.generate --workdir=runs/lm --prompts=long.txt --method=heavy_hitters:budget=128

Prints each prompt and what follows it, up to the end of the document or --max_new tokens; all prompts are
written on at once. The same seed gives the same texts; --temperature=0 always takes the most likely token,
and --beams searches for the likeliest text.

A draft proposes tokens, of which the model checks several in one step; texts follow the same distribution as
without, and are the same at --temperature=0. --draft names a run of a smaller model of the same tokenizer,
--draft_layers some layers of the model itself, and --draft_words looks in the text for what followed the same
words before.

With --method=gemfilter the model reads of each prompt the tokens that an early layer chooses, which are shown
on standard error: `effjax.decoding.gemfilter`. --method=unified_softmax sums over cached keys in parts:
`effjax.mixers.unified_softmax`. Any other method is a kind of `effjax.decoding.policies`, and says which
tokens the caches keep.

What it took (time to the first token, tokens a second, bytes of the caches, how much was accepted; measured
after compiling) goes to standard error, so that the texts can be piped.
"""

from pathlib import Path

from absl import flags

from experiments import cli

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run")
PROMPT = flags.DEFINE_multi_string("prompt", [], "how a text begins; may be given several times")
PROMPTS = flags.DEFINE_string("prompts", None, "a file with a prompt in every line that is not empty")
MAX_NEW = flags.DEFINE_integer("max_new", 200, "the most tokens to write after each prompt")
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "divides the logits; 0 takes the most likely token")
TOP_K = flags.DEFINE_integer("top_k", None, "draw from this many most likely tokens; by default from all")
TOP_P = flags.DEFINE_float("top_p", 0.95, "draw from the most likely tokens that hold this mass; 1 takes all")
MIN_P = flags.DEFINE_float(
    "min_p", 0.0, "draw from tokens of at least this share of the largest probability; 0 takes all"
)
BEAMS = flags.DEFINE_integer(
    "beams", None, "search for the likeliest text with this many beams instead of drawing"
)
LENGTH_PENALTY = flags.DEFINE_float(
    "length_penalty", 1.0, "of --beams: power of the length that divides the log-probability of a text"
)
DRAFT = flags.DEFINE_string("draft", None, "folder of a run whose model proposes tokens")
DRAFT_LAYERS = flags.DEFINE_list(
    "draft_layers", None, "layers of the model itself that propose tokens, from 0: 0,1,3"
)
DRAFT_WORDS = flags.DEFINE_integer(
    "draft_words", None, "propose what followed at most this many last tokens where they stood before"
)
DRAFT_TOKENS = flags.DEFINE_integer("draft_tokens", None, "how many are proposed at a time; by default 4")
METHODS = flags.DEFINE_multi_string(
    "method",
    [],
    "what is read of long prompts, gemfilter:layer=1,keep=64, or kept in caches, window:budget=64",
)
SEED = flags.DEFINE_integer("seed", 0, "of the draws")
STEP = flags.DEFINE_integer("step", None, "step of the checkpoint; by default the newest")


def main(argv: list[str]) -> int:
    """Loads the run, writes, prints."""
    del argv
    # Imported here, so that --help and a wrong flag answer at once.
    from rich.console import Console

    from effjax.decoding.beam import Beams
    from effjax.decoding.sampling import Sampling
    from effjax.errors import UsageError
    from experiments.run import writing
    from experiments.run.closing import closing_table
    from experiments.run.drafting import Drafting
    from experiments.run.shortcuts import Shortcuts

    if WORKDIR.value is None:
        raise UsageError("--workdir is missing. Name a run that was trained: --workdir=runs/NAME.")
    prompts = [*PROMPT.value, *(_lines(PROMPTS.value) if PROMPTS.value else [])]
    if not prompts:
        raise UsageError('--prompt is missing. Say how the text begins: --prompt="Return the ".')
    how: Sampling | Beams = Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value, MIN_P.value)
    if BEAMS.value is not None:
        how = Beams(BEAMS.value, LENGTH_PENALTY.value)
    drafting = None
    if not DRAFT.value is DRAFT_LAYERS.value is DRAFT_WORDS.value is DRAFT_TOKENS.value is None:
        tokens = {} if DRAFT_TOKENS.value is None else {"tokens": DRAFT_TOKENS.value}
        drafting = Drafting(DRAFT.value, _layers(DRAFT_LAYERS.value), DRAFT_WORDS.value, **tokens)
    shortcuts = Shortcuts.of(METHODS.value, drafting)
    written = writing.write(WORKDIR.value, prompts, MAX_NEW.value, how, SEED.value, STEP.value, shortcuts)
    notes = Console(stderr=True, highlight=False)
    for text in written.read or ():
        notes.print(f"read: {text}", markup=False)
    for prompt, text in zip(prompts, written.texts, strict=True):
        print(prompt + text)
    closing_table(
        f"{WORKDIR.value}, {len(prompts)} prompt{'s' * (len(prompts) > 1)}",
        writing.figures(written),
        notes,
    )
    return 0


def _layers(numbers: list[str] | None) -> tuple[int, ...] | None:
    from effjax.errors import UsageError

    if numbers is None:
        return None
    if strange := [number for number in numbers if not number.strip().isdecimal()]:
        raise UsageError(f"--draft_layers: '{strange[0]}' is no layer. Give numbers: --draft_layers=0,1,3.")
    return tuple(int(number) for number in numbers)


def _lines(path: str) -> list[str]:
    from effjax.errors import UsageError

    file = Path(path).expanduser()
    if not file.is_file():
        raise UsageError(f"--prompts='{path}' is no file. Name a text file with a prompt in every line.")
    lines = [line for line in file.read_text(errors="replace").splitlines() if line.strip()]
    if not lines:
        raise UsageError(f"--prompts='{path}' has no lines: write a prompt into each.")
    return lines


if __name__ == "__main__":
    cli.run(main)
