"""Draws pairs of noise and picture from a trained flow, for reflow and distillation (Liu et al. 2023).

    python -m experiments.pairs --workdir=runs/flow --out=runs/flow-pairs --count=10000 --guidance=1.5
    python -m experiments.train --config=configs/diffusion/instaflow.py:digits-reflow --workdir=runs/reflow

The folder holds `noise.npy`, the pictures (or latents), and what each shows; a config reads it as a source of
kind `arrays`. A run that was stopped goes on where it was. Also prints how straight the paths are.
"""

from absl import flags

from experiments import cli

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run")
OUT = flags.DEFINE_string("out", None, "folder to write")
COUNT = flags.DEFINE_integer(
    "count", None, "pairs to draw; by default as many as there are training examples"
)
GUIDANCE = flags.DEFINE_float("guidance", 1.0, "scale of classifier-free guidance; 1 is none")
SAMPLER = flags.DEFINE_string("sampler", "euler", "euler, heun or dpm_solver for a flow")
STEPS = flags.DEFINE_integer("steps", 25, "steps of the sampler")
BATCH = flags.DEFINE_integer("batch", 256, "pairs at a time")
SEED = flags.DEFINE_integer("seed", 0, "decides all noise")
STEP = flags.DEFINE_integer("step", None, "checkpoint to take; by default the newest")


def main(argv: list[str]) -> int:
    """Writes the folder; returns the exit code."""
    del argv
    # Imported here, so that --help and a wrong flag answer at once.
    from effjax.errors import UsageError
    from experiments.run import pairing
    from experiments.run.sampling import Request

    if WORKDIR.value is None or OUT.value is None:
        missing = "workdir" if WORKDIR.value is None else "out"
        raise UsageError(f"--{missing} is missing. Example: --workdir=runs/flow --out=runs/flow-pairs.")
    request = Request(
        guidance=GUIDANCE.value,
        sampler=SAMPLER.value,
        steps=STEPS.value,
        seed=SEED.value,
        batch=BATCH.value,
    )
    return pairing.run(WORKDIR.value, OUT.value, request, COUNT.value, step=STEP.value)


if __name__ == "__main__":
    cli.run(main)
