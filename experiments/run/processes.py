"""Several processes of one run: how they find each other, what they agree on, and how they stop together.

Every host runs the same command. A run of several processes is one where `--distributed` says so, or where
the environment does: the three variables below, as `experiments.launch` and a JobSet set them, or what SLURM,
Open MPI and Cloud TPU leave. The first process writes the files of the run; all of them write checkpoints.
"""

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from effjax.errors import EffjaxError, RunError, UsageError
from experiments.run.files import to_json
from experiments.run.signals import StopFlag
from experiments.run.workdir import differences, environment

COORDINATOR, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# Of a process that is gone: how long the others wait for a sign of life, and for company at the end.
SILENCE_SECONDS, COMPANY_SECONDS = 30, 60


def join(distributed: bool | None = None) -> None:
    """Joins the other processes of the run, where there are any. Before anything asks for a device.

    Args:
      distributed: whether there are; None follows the environment.

    Raises:
      UsageError: where half of it is said, or nothing is found that was asked for.
    """
    explicit = {name: os.environ[name] for name in (COORDINATOR, COUNT, INDEX) if name in os.environ}
    if distributed is False or (distributed is None and not explicit and not _found()):
        return
    if explicit and len(explicit) < 3:
        missing = " and ".join(name for name in (COORDINATOR, COUNT, INDEX) if name not in explicit)
        raise UsageError(f"{' and '.join(explicit)} is set, and {missing} is not: a process needs all three.")
    asked: dict[str, Any] = {}
    if explicit:
        asked = dict(
            coordinator_address=explicit[COORDINATOR],
            num_processes=_number(COUNT),
            process_id=_number(INDEX),
            cluster_detection_method="deactivate",
        )
    try:
        jax.distributed.initialize(
            **asked, heartbeat_timeout_seconds=SILENCE_SECONDS, shutdown_timeout_seconds=COMPANY_SECONDS
        )
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"the other processes cannot be joined ({str(error).splitlines()[0]}). Outside of SLURM, Open "
            f"MPI and Cloud TPU set {COORDINATOR}=HOST:PORT, {COUNT} and {INDEX} on every host, or use "
            f"python -m experiments.launch on one."
        ) from error


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise UsageError(f"{name}={os.environ[name]!r} is no number.") from None


def _found() -> bool:
    """Whether a scheduler says that there is more than one process."""

    def more_than_one(name: str) -> bool:
        said = os.environ.get(name, "")
        return said.isdigit() and int(said) > 1

    # SLURM_PROCID is set within `srun` alone, SLURM_NTASKS also in the script around it.
    slurm = "SLURM_PROCID" in os.environ and more_than_one("SLURM_NTASKS")
    tpu = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
    return slurm or more_than_one("OMPI_COMM_WORLD_SIZE") or tpu


def several() -> bool:
    """Whether the run has more than one process."""
    return jax.process_count() > 1


def first() -> bool:
    """Whether this process writes the files of the run."""
    return jax.process_index() == 0


def agree(said: dict[str, Any]) -> None:
    """Compares what the processes are about to do, before they do it.

    Args:
      said: what must be the same everywhere: config, folder, versions.

    Raises:
      UsageError: on every process, naming what differs and where.
    """
    if not several():
        return
    versions = {key: environment()[key] for key in ("python", "versions", "git")}
    theirs = [json.loads(text) for text in _from_all(to_json({**said, **versions}))]
    hosts = _from_all(socket.gethostname())
    for number, other in enumerate(theirs):
        found = [
            f"{path.removeprefix('run.')}: {before!r} on process 0 ({hosts[0]}), {after!r} on process "
            f"{number} ({hosts[number]})"
            for path, (before, after) in differences(theirs[0], other, "run").items()
        ]
        if found:
            told = f"the processes do not agree. {'; '.join(found[:8])}. Start all with the same."
            raise _everywhere(UsageError(told))


def by_first(action: Callable[[], str]) -> str:
    """Does something in the first process, and tells the others what it said.

    Raises:
      UsageError, RunError: on every process, where the first raised one.
    """
    if not several():
        return action()
    said: dict[str, Any] = {}
    error: EffjaxError | None = None
    if first():
        try:
            said = {"said": action()}
        except (UsageError, RunError) as raised:
            error, said = raised, {"raised": type(raised).__name__, "message": str(raised)}
    told = json.loads(_from_all(to_json(said))[0])
    if error is not None:
        raise _everywhere(error)
    if "raised" in told:
        kind = UsageError if told["raised"] == "UsageError" else RunError
        raise _everywhere(kind(told["message"]))
    answer: str = told["said"]
    return answer


def shared(path: str) -> None:
    """Checks that a folder that the first process made is there for all.

    Raises:
      UsageError: on every process, where it is not.
    """
    if not several():
        return
    there = [json.loads(text) for text in _from_all(to_json([os.path.exists(path), socket.gethostname()]))]
    missing = [f"{number} ({host})" for number, (found, host) in enumerate(there) if not found]
    if missing:
        told = f"'{path}', which process 0 made, is not there for process {', '.join(missing)}"
        raise _everywhere(UsageError(f"{told}: the workdir has to lie on a disk that all hosts share."))


def _everywhere(error: EffjaxError) -> EffjaxError:
    """Marks an error that every process raises: they end together, see `cli.run`."""
    error.everywhere = True  # type: ignore[attr-defined]
    return error


def _from_all(text: str) -> list[str]:
    """A text of every process, in their order."""
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.int32(len(data)))).reshape(-1)
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(data)] = data
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
    return [row[:length].tobytes().decode() for row, length in zip(rows, lengths, strict=True)]


class Together:
    """A stop that all processes make at the same moment, however few of them were told to.

    Every process asks as often as the others do, in the same places; jax's coordination service finds the
    first time of asking that none of them has passed yet.
    """

    def __init__(self, stop: StopFlag) -> None:
        self._stop, self._asked = stop, 0
        # The service hears signals since the processes joined; of those before, the flag knows.
        self._before = several() and "true" in _from_all(to_json(stop.requested))

    def requested(self) -> bool:
        """Whether to stop here."""
        if not several():
            return self._stop.requested
        self._asked += 1
        if self._before:
            return True
        return bool(multihost_utils.reached_preemption_sync_point(self._asked))


# What jax says where a process cannot be reached, by the library that noticed.
_GONE = ("Gloo", "coordination service", "heartbeat", "NCCL", "DEADLINE_EXCEEDED", "UNAVAILABLE")


@contextlib.contextmanager
def one_fails_all_fail() -> Iterator[None]:
    """Says what a process means that another one cannot reach.

    Raises:
      RunError: in the place of what jax raised.
    """
    try:
        yield
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        if not several() or not any(word in reason for word in _GONE):
            raise
        raise RunError(
            f"another process of the run is gone, or cannot be reached ({reason[:300]}). Start all of them "
            f"again with the same command: the run goes on behind its newest checkpoint."
        ) from error
