"""Trains several configs, accelerates each with several methods, and draws what is worth its cost.

    python -m experiments.compare --config=configs/vision/vit.py:digits,configs/vision/swin.py:digits \\
        --method=pitome:keep=0.9 --method=tome:macs=0.6 --out=runs/compared

    python -m experiments.compare --config=configs/vision/vit.py:digits --out=runs/smaller \\
        --recipe='configs/compress/prune.py:taylor steps[0].left=0.5' \\
        --recipe='configs/compress/prune.py:taylor steps[0].left=0.25'

    python -m experiments.compare --config=configs/vision/vit.py:digits --out=runs/swept --processes=2 \\
        --sweep=optimizer.lr=log:1e-4:1e-2 --sweep=model.drop_path=0,0.1 --trials=9 --halving=3

Every config is trained and measured in processes of its own, under OUT/runs. What is complete is not done
again: after a stop, the same command goes on where it was. Methods apply to the configs whose models can
reduce their tokens; the others stand in the table as they are. A recipe is what experiments.compress takes,
with what `--recipe.` would change behind it; it makes every config smaller. Leaves compare.md, compare.json,
one plot of quality against MACs and one against measured latency, each with the Pareto front, and report.html
in OUT.
Speed-ups are those within one process, turn by turn; latencies of different configs come from different
processes and are as comparable as the machine was quiet.

With --sweep one config is trained with other values of some keys instead: all combinations, or --trials of
them drawn at random, and with --halving most of them for a part of the steps only. Leaves sweep.md,
sweep.json, a plot for every key and report.html in OUT. Exit codes as of experiments.train.
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
SWEEP = flags.DEFINE_multi_string(
    "sweep", [], "KEY=VALUE,VALUE,... or KEY=log:LOW:HIGH (uniform, integer); may be given several times"
)
TRIALS = flags.DEFINE_integer(
    "trials", None, "points of the sweep drawn at random; all by default", lower_bound=1
)
HALVING = flags.DEFINE_integer(
    "halving", None, "of the points of a sweep, one in so many goes on, as much longer"
)
METRIC = flags.DEFINE_string(
    "metric", None, "SPLIT/NAME that a sweep looks for; by default the evaluator's own"
)
PROCESSES = flags.DEFINE_integer("processes", 1, "runs of a sweep at a time", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "of the points of a sweep that are drawn")
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
    if SWEEP.value:
        return _sweep(OUT.value)
    if TRIALS.value or HALVING.value or METRIC.value:
        raise UsageError(
            "--trials, --halving and --metric are of a sweep: name a key with --sweep=KEY=VALUES."
        )
    for spec in METHODS.value:
        parse(spec)
    recipes = tuple(parse_recipe(spec) for spec in RECIPES.value)
    request = comparing.Request(tuple(METHODS.value), recipes, BATCH.value, ROUNDS.value)
    return comparing.run(cli.load_configs(), request, OUT.value, STOP)


def _sweep(out: str) -> int:
    """Sweeps one config."""
    from effjax.errors import UsageError
    from experiments.run import sweeping
    from experiments.run.sweep_space import parse

    loaded = cli.load_configs()
    if len(loaded) > 1 or METHODS.value or RECIPES.value:
        raise UsageError("--sweep takes one config, and no methods or recipes.")
    axes = tuple(parse(said) for said in SWEEP.value)
    request = sweeping.Request(axes, TRIALS.value, HALVING.value, METRIC.value, PROCESSES.value, SEED.value)
    return sweeping.run(loaded[0], request, out, STOP)


if __name__ == "__main__":
    cli.run(main)
