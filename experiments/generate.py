"""Writes on from a prompt with a trained language model.

    python -m experiments.generate --workdir=runs/lm --prompt="Return the " --max_new=200
    python -m experiments.generate --workdir=runs/lm --prompt="Return the " --top_k=40 --seed=1

Prints the prompt and what follows it, up to the end of the document or --max_new tokens. The same seed gives
the same text; --temperature=0 always takes the most likely token.
"""

from absl import flags

from experiments import cli

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run")
PROMPT = flags.DEFINE_string("prompt", None, "how the text begins")
MAX_NEW = flags.DEFINE_integer("max_new", 200, "the most tokens to write")
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "divides the logits; 0 takes the most likely token")
TOP_K = flags.DEFINE_integer("top_k", None, "draw from this many most likely tokens; by default from all")
TOP_P = flags.DEFINE_float("top_p", 0.95, "draw from the most likely tokens that hold this mass; 1 takes all")
SEED = flags.DEFINE_integer("seed", 0, "of the draws")
STEP = flags.DEFINE_integer("step", None, "step of the checkpoint; by default the newest")


def main(argv: list[str]) -> int:
    """Loads the run, writes, prints."""
    del argv
    # Imported here, so that --help and a wrong flag answer at once.
    from effjax.decoding.sampling import Sampling
    from effjax.errors import UsageError
    from experiments.run import writing

    if WORKDIR.value is None:
        raise UsageError("--workdir is missing. Name a run that was trained: --workdir=runs/NAME.")
    if PROMPT.value is None:
        raise UsageError('--prompt is missing. Say how the text begins: --prompt="Return the ".')
    sampling = Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value)
    print(writing.write(WORKDIR.value, PROMPT.value, MAX_NEW.value, sampling, SEED.value, STEP.value))
    return 0


if __name__ == "__main__":
    cli.run(main)
