"""Starts several processes of one run on this machine.

    python -m experiments.launch --processes=2 -- experiments.train --config=configs/vision/vit.py:digits \\
        --workdir=runs/vit

Every process gets its number, and of CPUs its share of devices (`--devices`, each). What the first one
prints is shown as it is, what the others print with their number before it. Where one fails, the others are
stopped, and this command ends with its exit code; SIGTERM goes to all of them.
"""

# ruff: noqa: E402  the order of the imports is the point
from experiments.run.signals import StopFlag

STOP = StopFlag()
if __name__ == "__main__":
    STOP.install()

from absl import flags

from experiments import cli

PROCESSES = flags.DEFINE_integer("processes", 2, "how many to start", lower_bound=1)
DEVICES = flags.DEFINE_integer("devices", 1, "CPU devices of each", lower_bound=1)


def main(argv: list[str]) -> int:
    """Starts them and waits; returns the exit code."""
    # Imported here, so that --help and a wrong flag answer at once.
    from effjax.errors import UsageError
    from experiments.run import launching

    if len(argv) < 2:
        raise UsageError("what to start is missing: -- experiments.train --config=... --workdir=...")
    return launching.run(argv[1:], PROCESSES.value, DEVICES.value, STOP)


if __name__ == "__main__":
    cli.run(main, positional="-- MODULE FLAGS...: what every process runs")
