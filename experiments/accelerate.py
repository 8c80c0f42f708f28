"""Shows what a trained model becomes when its tokens are reduced or its steps cached, without more training.

    python -m experiments.accelerate --workdir=runs/vit --method=pitome:keep=0.9 --method=random:keep=0.9
    python -m experiments.accelerate --workdir=runs/vit --method=tome:macs=0.67 --method=pitome:macs=0.67
    python -m experiments.accelerate --config=configs/vision/vit.py:s16 --config.train.start=CONVERTED \\
        --method=tome:remove=13 --out=accelerated

A method is a kind of `effjax.tokens` and its fields; `macs=0.5` finds the strength that leaves half of the
network's MACs. Prints accuracy, agreement with the full model, MACs, tokens a layer, measured time, speed-up
and the share of the promised speed-up that came true. Leaves the table, two Pareto plots and a picture of
which tokens went where in WORKDIR/accelerate (or --out), and a section in the report of the run. Weights of
other libraries come through experiments.convert and a config that names their data.

    python -m experiments.accelerate --workdir=runs/dit --method=cg_taylor:threshold=0.1 --guidance=2

Of a diffusion run it draws the same pictures by each method, and prints at how many calls of the network
all layers ran, how far the pictures are from the full model's, and the measured time. There a method may also
be a kind of `effjax.diffusion.caches`.

    python -m experiments.accelerate --workdir=runs/probes --evaluator=needle --method=window:budget=64 \\
        --method="heavy_hitters:budget=64,storage=plain()"

Of a language model's run methods are those of `effjax.compress`, or such as change how it writes: kinds of
`effjax.decoding.policies`, unified_softmax:splits=8, gemfilter:layer=1,keep=64, skip_layers:layers=(1,2),
early_exit:blocks=3. By each of these the evaluator's rows are decoded token by token, and accuracy, bytes of
the caches, keys read, MACs and time of a token are printed, and drawn as quality against bytes.
"""

from typing import Any

from absl import flags

from experiments import cli

cli.define_config("configs/vision/vit.py:digits")
WORKDIR = flags.DEFINE_string("workdir", None, "folder of a trained run")
STEP = flags.DEFINE_integer("step", None, "which checkpoint of it; the newest by default")
METHODS = flags.DEFINE_multi_string("method", [], "KIND:FIELD=VALUE,...; may be given several times")
EVALUATOR = flags.DEFINE_string("evaluator", None, "of the config; the first by default")
BATCH = flags.DEFINE_integer("batch", None, "examples a timed batch; what the evaluator takes by default")
ROUNDS = flags.DEFINE_integer("rounds", 10, "timings of each model, taken in turn")
EXAMPLES = flags.DEFINE_integer(
    "examples", 256, "of a language run: rows decoded under a cache policy, at most"
)
GUIDANCE = flags.DEFINE_float("guidance", 1.0, "of a diffusion run: scale of classifier-free guidance")
SAMPLER = flags.DEFINE_string("sampler", None, "of a diffusion run: as in experiments.sample")
STEPS = flags.DEFINE_integer("sampler_steps", None, "of a diffusion run: steps of the sampler")
OUT = flags.DEFINE_string("out", None, "folder to write; WORKDIR/accelerate by default")


def main(argv: list[str]) -> None:
    """Measures and reports."""
    del argv
    # Imported here, so that --help and a wrong flag answer at once.
    from effjax.errors import UsageError
    from effjax.train.tasks.diffusion import Diffusion
    from effjax.train.tasks.language import Language
    from experiments.run import (
        accelerated_language,
        accelerated_sampling,
        accelerated_writing,
        accelerating,
        sampling,
    )
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
    if isinstance(source.program.task, Diffusion):
        request = sampling.Request(
            guidance=GUIDANCE.value, sampler=SAMPLER.value, steps=STEPS.value, per_class=4
        )
        accelerated_sampling.run(source, methods, request, rounds=ROUNDS.value, out=OUT.value)
        return
    if isinstance(source.program.task, Language):
        stepwise = [isinstance(asked.method, accelerated_writing.STEPWISE) for asked in methods]
        if any(stepwise) and not all(stepwise):
            told = methods[stepwise.index(True)].label
            raise UsageError(f"--method={told} is measured token by token: ask for others by themselves.")
        said: dict[str, Any] = dict(evaluator=EVALUATOR.value, rounds=ROUNDS.value, out=OUT.value)
        if all(stepwise):
            accelerated_writing.run(source, methods, examples=EXAMPLES.value, **said)
        else:
            accelerated_language.run(source, methods, **said)
        return
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
