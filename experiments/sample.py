"""Draws from a trained diffusion run: pictures as a PNG grid with one row a class, videos as a GIF.

    python -m experiments.sample --workdir=runs/dit --out=digits.png --guidance=2
    python -m experiments.sample --workdir=runs/dit --out=threes.png --classes=3 --sampler=ddpm --steps=250
    python -m experiments.sample --workdir=runs/dit --out=way.png --trajectory=10
    python -m experiments.sample --workdir=runs/pt --out=told.png --examples=0,1,2
    python -m experiments.sample --workdir=runs/vdt --out=clips.gif
    python -m experiments.sample --workdir=runs/vdt --out=next.gif --given=forward:given=2

With `--given` parts of held-out clips are given and the rest is drawn; a row of the real clips stands above.
What may be given: forward, backward, interpolation, image_to_video, random_frames, completion, unconditional.
A model that is told a text, or another array, is told those of held-out examples, a row each. With
`--trajectory` a row shows one picture on its way out of the noise; `--cache` skips work between the steps.
The same seed gives the same picture in every place of the grid, whatever the batch and the devices.
"""

from absl import flags

from experiments import cli

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run")
OUT = flags.DEFINE_string("out", None, "PNG to write, or GIF for videos")
CLASSES = flags.DEFINE_list("classes", None, "class numbers, one row each; by default the first ten")
EXAMPLES = flags.DEFINE_list(
    "examples", None, "numbers of held-out examples to take conditions from, one row each, instead of classes"
)
PER_CLASS = flags.DEFINE_integer("per_class", 8, "pictures in a row")
GUIDANCE = flags.DEFINE_float("guidance", 1.0, "scale of classifier-free guidance; 1 is none")
INTERVAL = flags.DEFINE_list(
    "interval", None, "share of the way that is guided, as in 0.2,0.8: 0 is the picture and 1 noise"
)
GIVEN = flags.DEFINE_string(
    "given", None, "of a video run: what of held-out clips is given, as in forward:given=2"
)
SAMPLER = flags.DEFINE_string(
    "sampler",
    None,
    "ddpm, ddim or dpm_solver for a DDPM run, euler, heun or dpm_solver for a flow; by default ddim or euler",
)
STEPS = flags.DEFINE_integer("steps", None, "steps of the sampler; by default its own number")
CACHE = flags.DEFINE_string("cache", None, "a step cache, as in cg_taylor:threshold=0.1 or bac:updates=5")
TRAJECTORY = flags.DEFINE_integer("trajectory", None, "states to show on the way from noise to one picture")
SEED = flags.DEFINE_integer("seed", 0, "decides all noise")
STEP = flags.DEFINE_integer("step", None, "checkpoint to take; by default the newest")
USE_EMA = flags.DEFINE_boolean("use_ema", None, "take averaged weights; by default where the run keeps them")


def main(argv: list[str]) -> int:
    """Writes the grid; returns the exit code."""
    del argv
    # Imported here, so that --help and a wrong flag answer at once.
    from effjax.errors import UsageError
    from experiments.run import clips, sampling

    if WORKDIR.value is None or OUT.value is None:
        missing = "workdir" if WORKDIR.value is None else "out"
        raise UsageError(f"--{missing} is missing. Example: --workdir=runs/dit --out=pictures.png.")
    return sampling.run(
        WORKDIR.value,
        OUT.value,
        sampling.Request(
            classes=None if CLASSES.value is None else sampling.numbers_of("classes", CLASSES.value),
            examples=None if EXAMPLES.value is None else sampling.numbers_of("examples", EXAMPLES.value),
            per_class=PER_CLASS.value,
            guidance=GUIDANCE.value,
            interval=(0.0, 1.0) if INTERVAL.value is None else sampling.shares(INTERVAL.value),
            sampler=SAMPLER.value,
            steps=STEPS.value,
            seed=SEED.value,
            given=None if GIVEN.value is None else clips.parse(GIVEN.value),
            cache=None if CACHE.value is None else sampling.parse_cache(CACHE.value),
            trajectory=TRAJECTORY.value,
        ),
        step=STEP.value,
        ema=USE_EMA.value,
    )


if __name__ == "__main__":
    cli.run(main)
