"""Evaluates a trained run with the evaluators of its config.

    python -m experiments.evaluate --workdir=runs/vit
    python -m experiments.evaluate --workdir=runs/vit --step=1000 --noema

Prints a line of metrics for each evaluator. `--ema` and `--noema` choose between the averaged and the last
weights; by default each evaluator's own setting holds.
"""

from absl import flags

from experiments import cli

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run")
STEP = flags.DEFINE_integer("step", None, "which checkpoint; the newest by default")
EMA = flags.DEFINE_boolean("ema", None, "averaged or last weights; what each evaluator says by default")


def main(argv: list[str]) -> None:
    """Evaluates."""
    del argv
    from effjax.errors import UsageError
    from experiments.run.closing import closing_table
    from experiments.run.formatting import measurement
    from experiments.run.restore import load_state, read_weights

    if WORKDIR.value is None:
        raise UsageError("--workdir is missing. Name a run: --workdir=runs/NAME.")
    program, state = load_state(WORKDIR.value, STEP.value)
    if not program.experiment.evaluators:
        raise UsageError("this run's config has no evaluators.")
    shown: dict[str, str] = {}
    for name, evaluator in program.experiment.evaluators.items():
        variables = program.variables(state, evaluator.ema if EMA.value is None else EMA.value)
        values = evaluator.open(read_weights)(program, variables, lambda: None)
        shown |= {f"{name} {metric}": measurement(value) for metric, value in values.items()}
    closing_table(f"{WORKDIR.value}, step {int(state.step)}", shown)


if __name__ == "__main__":
    cli.run(main)
