"""Evaluates a trained run with the evaluators of its config, or asks it probes.

    python -m experiments.evaluate --workdir=runs/vit
    python -m experiments.evaluate --workdir=runs/vit --step=1000 --noema
    python -m experiments.evaluate --workdir=runs/lm --probes=copy,recall,needle --lengths=64,128,256
    python -m experiments.evaluate --workdir=runs/lm --probes=needle,recall --method=window:budget=64 \\
        --method=heavy_hitters:budget=64 --method="all:storage=quantised(bits=4,residual=32)"

Prints a line of metrics for each evaluator; of text also the perplexity and the bits a byte. `--ema` and
`--noema` choose between the averaged and the last weights; by default each evaluator's own setting holds.

With `--probes` it prints instead the share of right answers of a language model to questions that only its
context answers, by length in tokens: see `effjax.data.probes`. With `--method`, as in experiments.accelerate,
answers are decoded token by token, by the full model and by each method, with the bytes of the caches of a
sequence of the last length.
"""

from absl import flags

from experiments import cli

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run")
STEP = flags.DEFINE_integer("step", None, "which checkpoint; the newest by default")
EMA = flags.DEFINE_boolean("ema", None, "averaged or last weights; what each evaluator says by default")
PROBES = flags.DEFINE_list("probes", None, "what a language model is asked: copy, recall, induction, needle")
LENGTHS = flags.DEFINE_list("lengths", ["64"], "of --probes: how many tokens a sequence has")
METHODS = flags.DEFINE_multi_string(
    "method",
    [],
    "of --probes: KIND:FIELD=VALUE,... that changes how a model writes; may be given several times",
)
EXAMPLES = flags.DEFINE_integer("examples", 256, "of --probes: how many sequences of each length")


def main(argv: list[str]) -> None:
    """Evaluates."""
    del argv
    from effjax.errors import UsageError
    from experiments.run.method_spec import parse
    from experiments.run.restore import load_state

    if WORKDIR.value is None:
        raise UsageError("--workdir is missing. Name a run: --workdir=runs/NAME.")
    lengths = [_length(text) for text in LENGTHS.value]
    if METHODS.value and not PROBES.value:
        raise UsageError("--method is asked probes: name them, --probes=needle,recall.")
    methods = [parse(spec) for spec in METHODS.value]
    program, state = load_state(WORKDIR.value, STEP.value)
    title = f"{WORKDIR.value}, step {int(state.step)}"
    if PROBES.value:
        _ask(program, state, title, lengths, methods)
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


def _ask(program, state, title: str, lengths: list[int], methods: list) -> None:
    from experiments.run.closing import print_table
    from experiments.run.probing import probe_table, written_table

    variables = program.variables(state, state.ema is not None if EMA.value is None else EMA.value)
    asked, columns = (PROBES.value or [], lengths, EXAMPLES.value), list(map(str, lengths))
    title = f"{title}: share of right answers"
    if methods:
        headings = ["method", "probe", f"cache of {lengths[-1]}", *columns]
        print_table(title, headings, written_table(program, variables, methods, *asked))
    else:
        print_table(title, ["tokens", *columns], probe_table(program, variables, *asked))


def _length(text: str) -> int:
    from effjax.errors import UsageError

    if not text.strip().isdigit() or int(text) < 1:
        raise UsageError(f"--lengths={text!r} is no number of tokens: give such as --lengths=64,128.")
    return int(text)


if __name__ == "__main__":
    cli.run(main)
