"""Makes a trained network smaller by a recipe, and leaves a new run beside it.

    python -m experiments.compress --workdir=runs/lm --recipe=configs/compress/round.py:int4 --out=runs/lm-4
    python -m experiments.compress --workdir=runs/vit --recipe=configs/compress/round.py:int8 --out=runs/vit-8

A recipe is a config: a list of steps (`effjax.compress.steps`), calibrated on the run's training data;
`--recipe.steps[0].layout.bits=3` changes it as `--config.` does a run's. The folder that is left is a run
to evaluate, sample and generate with. Its weights are stored as the
recipe says and do not train.

Prints what the run's evaluators say of both, the bytes that the weights hold on the device, and the time of a
batch and, of a language model, of a token; and of every layout how a product with it compares with the same
weights in bfloat16, in one row and in many: which bits bring time on this device, and which only memory.
The report of the new run says the same, and table.json what experiments.compare reads.

What every step leaves lies in OUT.steps until all are taken: after a stop, the same command goes on behind
the last whole step. Exit codes as of experiments.train.
"""

# ruff: noqa: E402  the order of the imports is the point
from experiments.run.signals import StopFlag

STOP = StopFlag()
if __name__ == "__main__":
    STOP.install()

from absl import flags

from experiments import cli
from experiments.run.config_file import define_config, load_config

define_config("configs/compress/round.py:int8", name="recipe", what="what to do")
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the trained run")
OUT = flags.DEFINE_string("out", None, "folder of the run to leave")
STEP = flags.DEFINE_integer("step", None, "which checkpoint; the newest by default")
EMA = flags.DEFINE_boolean("ema", None, "averaged or last weights; the averaged where there are any")
ROUNDS = flags.DEFINE_integer("rounds", 10, "timings of each, taken in turn")


def main(argv: list[str]) -> None:
    """Compresses, evaluates, reports."""
    del argv
    # Imported here, so that --help and a wrong flag answer at once.
    from effjax.errors import UsageError
    from experiments.run import compressing

    if WORKDIR.value is None or OUT.value is None:
        raise UsageError("say --workdir=RUN, the trained run, and --out=FOLDER, the run to leave.")
    compressing.run(
        WORKDIR.value,
        load_config(name="recipe"),
        OUT.value,
        step=STEP.value,
        ema=EMA.value,
        rounds=ROUNDS.value,
        stop=STOP,
    )


if __name__ == "__main__":
    cli.run(main)
