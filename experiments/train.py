"""Trains what a config describes, or resumes where the run in the workdir stopped.

    python -m experiments.train --config=configs/vision/vit.py:digits --workdir=runs/vit
    python -m experiments.train --config=configs/vision/vit.py:digits --workdir=runs/b --config.train.seed=1
    python -m experiments.train --replay=runs/vit/replay/step_120

On several hosts the same command is started on every one, see docs/pods.md.

Leaves config.json, environment.json, metrics.jsonl, goodput.jsonl, events/, checkpoints/, plots/ and
report.html in the workdir. Exit codes: 0 done, 1 failed (also where an evaluator failed), 2 asked wrongly, 75
stopped by SIGTERM and resumable.
"""

# ruff: noqa: E402  the order of the imports is the point
from experiments.run.signals import StopFlag

# Before anything heavy is imported: a SIGTERM during start-up must not look like a crash.
STOP = StopFlag()
if __name__ == "__main__":
    STOP.install()

from absl import flags

from experiments import cli

cli.define_config("configs/vision/vit.py:digits")
DISTRIBUTED = flags.DEFINE_boolean(
    "distributed", None, "whether other processes run the same command; by default what the environment says"
)
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; made where it is missing")
PROFILE = flags.DEFINE_integer(
    "profile", 0, "trace this many steps into WORKDIR/profile, after ten to warm up"
)
REPLAY = flags.DEFINE_string("replay", None, "folder of a bad step: repeats it and shows where it went wrong")


def main(argv: list[str]) -> int:
    """Trains or replays; returns the exit code."""
    del argv
    # Imported here, so that --help and a wrong flag answer at once.
    from effjax.errors import UsageError
    from experiments.run import processes, replay, training

    if REPLAY.value is not None:
        return replay.run(REPLAY.value)
    if WORKDIR.value is None:
        raise UsageError("--workdir is missing. Say where the run shall live: --workdir=runs/NAME.")
    processes.join(DISTRIBUTED.value)
    with processes.one_fails_all_fail():
        return training.run(cli.load_config(), WORKDIR.value, stop=STOP, profile_steps=PROFILE.value)


if __name__ == "__main__":
    cli.run(main)
