"""Starts runs of several processes and looks into them."""

import os
import time

from experiments.run import processes
from tests.experiments.driver import metric_rows, start

CONFIG = ("--config=configs/language/lm.py:smoke", "--config.train.log_every=1 steps")


def launched(*arguments, processes=2):
    return start(
        "launch", f"--processes={processes}", "--devices=2", "--", "experiments.train", *CONFIG, *arguments
    )


def children(running):
    """Numbers of the processes of a run, by their place in it."""
    found = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat") as stat, open(f"/proc/{name}/environ") as environ:
                parent = int(stat.read().rpartition(")")[2].split()[1])
                said = dict(line.partition("=")[::2] for line in environ.read().split("\0"))
        except OSError:
            continue
        if parent == running.pid:
            found[int(said[processes.INDEX])] = int(name)
    return found


def until(condition, seconds=180):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert condition()


def trained_rows(workdir):
    return {row["step"]: row["loss"] for row in metric_rows(workdir) if row["split"] == "train"}
