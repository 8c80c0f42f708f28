"""Says where a run hangs: the stage and the stacks of all threads, once the loop is silent for too long.

    limit = max(60 s, 20 x the median of the last steps);  half an hour while it evaluates or saves

Nothing is stopped: a slow disk may come back. Every process of a run has a watchdog, so that where one hangs
all say what they wait for.
"""

import collections
import contextlib
import os
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType

import jax

# By the file in which the innermost frame of ours stands.
STAGES = {
    "effjax/data/": "waiting for a batch: the data are slow, or their disk does not answer",
    "effjax/train/checkpoint": "writing or reading a checkpoint",
    "effjax/train/evaluators": "evaluating",
    "effjax/train/program": "compiling",
    "effjax/train/loop": "waiting for the device, or for another process",
}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Watchdog:
    """Watches the thread that makes it. Use it in a `with`.

    Args:
      times: the median of steps, above which silence is told.
      at_least: seconds of silence that are never told.
      paused: seconds of silence that are told within `pause`.
      every: seconds between looks.
      tell: gets the text.
    """

    def __init__(
        self,
        times: float = 20.0,
        at_least: float = 60.0,
        paused: float = 1800.0,
        every: float = 1.0,
        tell: Callable[[str], None] = _say,
    ) -> None:
        self._times, self._at_least, self._paused, self._every = times, at_least, paused, every
        self._tell = tell
        self._watched = threading.get_ident()
        self._steps: collections.deque[float] = collections.deque(maxlen=50)
        self._last = time.monotonic()
        self._told = self._pausing = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def beat(self) -> None:
        """Says that a step is done."""
        now = time.monotonic()
        if not self._pausing:
            self._steps.append(now - self._last)
        self._last, self._told = now, False

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Something other than steps is done within."""
        self.beat()
        self._pausing = True
        try:
            yield
        finally:
            self.beat()
            self._pausing = False

    def __enter__(self) -> "Watchdog":
        self._last = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()

    def _limit(self) -> float:
        # Before the first step it compiles, and nobody knows for how long.
        if self._pausing or not self._steps:
            return self._paused
        return max(self._at_least, self._times * statistics.median(self._steps))

    def _watch(self) -> None:
        while not self._end.wait(self._every):
            silent = time.monotonic() - self._last
            if silent > self._limit() and not self._told:
                self._told = True
                self._tell(self._report(silent))

    def _report(self, silent: float) -> str:
        frames = sys._current_frames()
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        lines = [
            f"no step for {silent:.0f} s in process {jax.process_index()} ({os.getpid()}), "
            f"{_stage(frames.get(self._watched))}."
        ]
        for number, frame in frames.items():
            if number != threading.get_ident():
                lines.append(f"thread {names.get(number, number)}")
                lines += [line.rstrip() for line in traceback.format_stack(frame)]
        return "\n".join(lines)


def _stage(frame: FrameType | None) -> str:
    while frame is not None:
        file = frame.f_code.co_filename.replace(os.sep, "/")
        for part, stage in STAGES.items():
            if part in file:
                return stage
        frame = frame.f_back
    return "outside of the loop"
