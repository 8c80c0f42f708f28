"""Shows what a trained model becomes when its tokens are reduced, without training it again.

    python -m experiments.accelerate --workdir=runs/vit --method=pitome:keep=0.9 --method=random:keep=0.9
    python -m experiments.accelerate --workdir=runs/vit --method=tome:macs=0.67 --method=pitome:macs=0.67
    python -m experiments.accelerate --config=configs/vision/vit.py:s16 --config.train.start=CONVERTED \\
        --method=tome:remove=13 --out=accelerated

A method is a kind of `effjax.tokens` and its fields; `macs=0.5` finds the strength that leaves half of the
network's MACs. Prints accuracy, agreement with the full model, MACs, tokens a layer, measured time, speed-up
and the share of the promised speed-up that came true. Leaves the table, two Pareto plots and a picture of
which tokens went where in WORKDIR/accelerate (or --out), and a section in the report of the run. Weights of
other libraries come through experiments.convert and a config that names their data.
"""

from absl import flags

from experiments import cli

cli.define_config("configs/vision/vit.py:digits")
WORKDIR = flags.DEFINE_string("workdir", None, "folder of a trained run")
STEP = flags.DEFINE_integer("step", None, "which checkpoint of it; the newest by default")
METHODS = flags.DEFINE_multi_string("method", [], "KIND:FIELD=VALUE,...; may be given several times")
EVALUATOR = flags.DEFINE_string("evaluator", None, "of the config; the first by default")
BATCH = flags.DEFINE_integer("batch", None, "examples a timed batch; what the evaluator takes by default")
ROUNDS = flags.DEFINE_integer("rounds", 10, "timings of each model, taken in turn")
OUT = flags.DEFINE_string("out", None, "folder to write; WORKDIR/accelerate by default")


def main(argv: list[str]) -> None:
    """Measures and reports."""
    del argv
    # Imported here, so that --help and a wrong flag answer at once.
    from effjax.errors import UsageError
    from experiments.run import accelerating
    from experiments.run.method_spec import parse

    if not METHODS.value:
        raise UsageError("--method is missing. Example: --method=pitome:keep=0.925.")
    methods = [parse(spec) for spec in METHODS.value]
    if WORKDIR.value is not None:
        source = accelerating.of_run(WORKDIR.value, STEP.value)
    else:
        if OUT.value is None:
            raise UsageError("say --workdir=RUN, or --config=CONFIG with --out=FOLDER for the results.")
        source = accelerating.of_config(cli.load_config())
    accelerating.run(
        source,
        methods,
        evaluator=EVALUATOR.value,
        batch_size=BATCH.value,
        rounds=ROUNDS.value,
        out=OUT.value,
    )


if __name__ == "__main__":
    cli.run(main)
