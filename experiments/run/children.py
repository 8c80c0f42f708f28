"""Programs of ours that others start: each in a process of its own, its words in a file."""

import collections
import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from effjax.errors import Preempted
from experiments.run.signals import StopFlag

SECONDS = 0.2  # between two looks


@dataclasses.dataclass(frozen=True)
class Job:
    """A program to run.

    Attributes:
      module: as after `python -m`.
      arguments: behind it.
      log: what it says is added to.
    """

    module: str
    arguments: tuple[str, ...]
    log: Path


def run_all(
    jobs: Iterable[Job],
    processes: int,
    stop: StopFlag,
    ended: Callable[[Job, int, str], None],
    looked: Callable[[tuple[Job, ...]], None] = lambda running: None,
) -> None:
    """Runs programs to their ends, so many at a time; hands a SIGTERM on to all of them.

    Args:
      jobs: in this order.
      processes: how many run at a time.
      stop: whether this process was told to stop.
      ended: hears of each its exit code, and the last line that it said.
      looked: hears a few times a second which are running.

    Raises:
      Preempted: where this process or one of the others was told to stop.
    """
    waiting, running = collections.deque(jobs), dict[Job, subprocess.Popen[bytes]]()
    told, preempted = set[Job](), False
    try:
        while running or (waiting and not (stop.requested or preempted)):
            while waiting and len(running) < processes and not (stop.requested or preempted):
                job = waiting.popleft()
                running[job] = _start(job)
            looked(tuple(running))
            time.sleep(SECONDS)
            for job, child in list(running.items()):
                code = child.poll()
                if code is None:
                    if (stop.requested or preempted) and job not in told:
                        told.add(job)
                        child.terminate()
                    continue
                del running[job]
                if code == Preempted.exit_code or (code and stop.requested):
                    preempted = True
                else:
                    ended(job, code, _last_line(job.log))
    finally:
        for child in running.values():
            child.kill()
            child.wait()
    if stop.requested or preempted:
        raise Preempted("told to stop. Run the same command again to go on.")


def _start(job: Job) -> "subprocess.Popen[bytes]":
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as output:
        command = (sys.executable, "-m", job.module, *job.arguments)
        return subprocess.Popen(command, stdout=output, stderr=output, env=os.environ)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return (lines or ["it said nothing"])[-1].removeprefix("error: ")
