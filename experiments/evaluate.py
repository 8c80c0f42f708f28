"""Evaluates a trained run with the evaluators of its config, or asks it probes.

    python -m experiments.evaluate --workdir=runs/vit
    python -m experiments.evaluate --workdir=runs/vit --step=1000 --noema
    python -m experiments.evaluate --workdir=runs/lm --probes=copy,recall,needle --lengths=64,128,256

Prints a line of metrics for each evaluator; of text also the perplexity and the bits a byte. `--ema` and
`--noema` choose between the averaged and the last weights; by default each evaluator's own setting holds.

With `--probes` it prints instead the share of right answers of a language model to questions that only its
context answers, by length in tokens: see `effjax.data.probes`.
"""

from absl import flags

from experiments import cli

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run")
STEP = flags.DEFINE_integer("step", None, "which checkpoint; the newest by default")
EMA = flags.DEFINE_boolean("ema", None, "averaged or last weights; what each evaluator says by default")
PROBES = flags.DEFINE_list("probes", None, "what a language model is asked: copy, recall, induction, needle")
LENGTHS = flags.DEFINE_list("lengths", ["64"], "of --probes: how many tokens a sequence has")
EXAMPLES = flags.DEFINE_integer("examples", 256, "of --probes: how many sequences of each length")


def main(argv: list[str]) -> None:
    """Evaluates."""
    del argv
    from effjax.errors import UsageError
    from experiments.run.restore import load_state

    if WORKDIR.value is None:
        raise UsageError("--workdir is missing. Name a run: --workdir=runs/NAME.")
    lengths = [_length(text) for text in LENGTHS.value]
    program, state = load_state(WORKDIR.value, STEP.value)
    title = f"{WORKDIR.value}, step {int(state.step)}"
    if PROBES.value:
        _ask(program, state, title, lengths)
    else:
        _evaluate(program, state, title)


def _evaluate(program, state, title: str) -> None:
    from effjax.errors import UsageError
    from experiments.run.closing import closing_table
    from experiments.run.formatting import measurement
    from experiments.run.restore import read_weights

    if not program.experiment.evaluators:
        raise UsageError("this run's config has no evaluators.")
    shown: dict[str, str] = {}
    for name, evaluator in program.experiment.evaluators.items():
        variables = program.variables(state, evaluator.ema if EMA.value is None else EMA.value)
        values = evaluator.open(read_weights)(program, variables, lambda: None)
        shown |= {f"{name} {metric}": measurement(value) for metric, value in values.items()}
    closing_table(title, shown)


def _ask(program, state, title: str, lengths: list[int]) -> None:
    from experiments.run.closing import print_table
    from experiments.run.probing import probe_table

    variables = program.variables(state, state.ema is not None if EMA.value is None else EMA.value)
    rows = probe_table(program, variables, PROBES.value or [], lengths, EXAMPLES.value)
    print_table(f"{title}: share of right answers", ["tokens", *map(str, lengths)], rows)


def _length(text: str) -> int:
    from effjax.errors import UsageError

    if not text.strip().isdigit() or int(text) < 1:
        raise UsageError(f"--lengths={text!r} is no number of tokens: give such as --lengths=64,128.")
    return int(text)


if __name__ == "__main__":
    cli.run(main)
