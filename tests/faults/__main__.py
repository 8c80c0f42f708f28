"""Every fault at full length, with its figures: `make faults`, or `python -m tests.faults --help`."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import argparse
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TFDS_DATA_DIR", str(Path(__file__).resolve().parents[2] / ".testdata"))

from tests.faults import surroundings
from tests.faults.damage import damaged
from tests.faults.moments import interrupted


def say(text):
    print(text, flush=True)


def faults(moments, mutations, draw):
    """What there is, by name; each takes an empty folder."""
    return {
        "kill": lambda folder: interrupted(folder, moments, draw, say=say),
        "term": lambda folder: interrupted(folder, moments, draw, by=signal.SIGTERM, say=say),
        "damage": lambda folder: damaged(folder, mutations, draw, say=say),
        "disk": surroundings.full_disk,
        "place": surroundings.no_place,
        "lock": surroundings.two_in_one_folder,
        "clock": surroundings.jumping_clock,
        "worker": surroundings.dead_worker,
        "hang": surroundings.hanging_step,
    }


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--moments", type=int, default=50, help="how many kills, and how many SIGTERMs")
    parser.add_argument("--mutations", type=int, default=200, help="how many damaged checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and places")
    names = list(faults(0, 0, None))
    parser.add_argument("--only", nargs="*", choices=names, default=names, help="some of them")
    given = parser.parse_args()
    found = faults(given.moments, given.mutations, random.Random(given.seed))
    tried = []
    for name in given.only:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            tried.append(found[name](Path(folder)))
        say(f"{tried[-1]}  ({time.monotonic() - began:.0f} s)")
        for failure in tried[-1].failures:
            say(f"  FAILED {failure}")
    sys.exit(any(figures.failures for figures in tried))


if __name__ == "__main__":
    main()
