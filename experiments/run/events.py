"""Event files for those who live in TensorBoard: `tensorboard --logdir=runs`."""

import os
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

from experiments.run.files import naming

_FLUSH_EVERY = 10.0  # seconds; a flush waits for the disk


class EventFile:
    """One event file, written in the caller's thread.

    tensorboardX's own `SummaryWriter` hands events to a thread through a short queue; when the disk is full
    that thread dies, the queue fills, and the training would wait for ever.

    Args:
      folder: where TensorBoard looks; made where it is missing.
      restart_at: the first step this run will write. TensorBoard then forgets what earlier files of the
        folder say about this step and later ones.
    """

    def __init__(self, folder: str | os.PathLike[str], *, restart_at: int | None = None) -> None:
        self._folder = Path(folder)
        with naming(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            # Nanoseconds: a run that is resumed at once must not overwrite its predecessor.
            self._records = RecordWriter(str(self._folder / f"events.out.tfevents.{time.time_ns()}"))
        self._flushed_at = time.monotonic()
        self._write(Event(file_version="brain.Event:2"))
        if restart_at is not None:
            self._write(Event(step=restart_at, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds `{tag: value}` at a step."""
        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(Event(step=step, summary=Summary(value=points)))

    def close(self) -> None:
        """Puts everything on disk."""
        with naming(self._folder):
            try:
                self._records.flush()
            finally:
                self._records.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        with naming(self._folder):
            self._records.write(event.SerializeToString())
            if time.monotonic() - self._flushed_at > _FLUSH_EVERY:
                self._records.flush()
                self._flushed_at = time.monotonic()
