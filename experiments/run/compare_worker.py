"""Measures one trained run for `experiments.compare`, in a process of its own."""

import json
from pathlib import Path

from experiments import cli
from experiments.run.accelerating import measure, of_run, write
from experiments.run.method_spec import parse


def main(argv: list[str]) -> None:
    """Reads the request, measures, and leaves the table."""
    asked = json.loads(Path(argv[1]).read_text())
    source = of_run(asked["workdir"], None)
    reduces = hasattr(source.program.experiment.model, "reduce")
    evaluator = next(iter(source.program.experiment.evaluators.values()))
    rows, picture = measure(
        source.program,
        source.variables,
        evaluator,
        [parse(spec) for spec in asked["methods"]] if reduces else [],
        batch_size=asked["batch"],
        rounds=asked["rounds"],
    )
    write(Path(asked["out"]), rows, picture)


if __name__ == "__main__":
    cli.run(main, positional="REQUEST.json")
