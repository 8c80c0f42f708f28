"""Trains several configs, accelerates each with several methods, and draws what is worth its cost.

    python -m experiments.compare --config=configs/vision/vit.py:digits,configs/vision/swin.py:digits \\
        --method=pitome:keep=0.9 --method=tome:macs=0.6 --out=runs/compared

    python -m experiments.compare --config=configs/vision/vit.py:digits --out=runs/smaller \\
        --recipe='configs/compress/prune.py:taylor steps[0].left=0.5' \\
        --recipe='configs/compress/prune.py:taylor steps[0].left=0.25'

Every config is trained and measured in processes of its own, under OUT/runs. What is complete is not done
again: after a stop, the same command goes on where it was. Methods apply to the configs whose models can
reduce their tokens; the others stand in the table as they are. A recipe is what experiments.compress takes,
with what `--recipe.` would change behind it; it makes every config smaller. Leaves compare.md, compare.json,
one plot of quality against MACs and one against measured latency, each with the Pareto front, and report.html
in OUT.
Speed-ups are those within one process, turn by turn; latencies of different configs come from different
processes and are as comparable as the machine was quiet. Exit codes as of experiments.train.
"""

# ruff: noqa: E402  the order of the imports is the point
from experiments.run.signals import StopFlag

STOP = StopFlag()
if __name__ == "__main__":
    STOP.install()

from absl import flags

from experiments import cli

cli.define_configs("configs/vision/vit.py:digits,configs/vision/swin.py:digits")
METHODS = flags.DEFINE_multi_string("method", [], "KIND:FIELD=VALUE,...; may be given several times")
RECIPES = flags.DEFINE_multi_string(
    "recipe", [], "'FILE[:VARIANT] KEY=VALUE ...'; may be given several times"
)
BATCH = flags.DEFINE_integer("batch", None, "examples a timed batch; what the evaluator takes by default")
ROUNDS = flags.DEFINE_integer("rounds", 10, "timings of each model, taken in turn")
OUT = flags.DEFINE_string("out", None, "folder of the comparison; made where it is missing")


def main(argv: list[str]) -> int:
    """Trains, measures and reports; returns the exit code."""
    del argv
    # Imported here, so that --help and a wrong flag answer at once.
    from effjax.errors import UsageError
    from experiments.run import comparing
    from experiments.run.method_spec import parse
    from experiments.run.recipe_spec import parse as parse_recipe

    if OUT.value is None:
        raise UsageError("--out is missing. Say where the comparison shall live: --out=runs/NAME.")
    for spec in METHODS.value:
        parse(spec)
    recipes = tuple(parse_recipe(spec) for spec in RECIPES.value)
    request = comparing.Request(tuple(METHODS.value), recipes, BATCH.value, ROUNDS.value)
    return comparing.run(cli.load_configs(), request, OUT.value, STOP)


if __name__ == "__main__":
    cli.run(main)
