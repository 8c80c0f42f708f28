"""A request to stop, as clusters make it: SIGTERM now, and a short time to leave in good order."""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

_Handler = Callable[[int, FrameType | None], Any] | int | None


class StopFlag:
    """Remembers that the run was told to stop; the loop looks at it between steps.

        stop = StopFlag().install()      # first thing in `main`, long before the first compile
        ...
        if stop.requested:
            save(); raise Preempted("...")

    A handler that was there before is called too. SIGINT keeps its default, so that Ctrl-C still ends the
    program at once. Python runs handlers between byte codes of the main thread: a signal that arrives while
    XLA compiles is seen when the compiler returns.
    """

    def __init__(self) -> None:
        self._requested_at: float | None = None
        self._before: dict[int, _Handler] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived."""
        return self._requested_at is not None

    @property
    def requested_at(self) -> float | None:
        """When the first signal arrived, on the clock of `time.monotonic`, or None."""
        return self._requested_at

    def install(self, *signals: int) -> "StopFlag":
        """Starts to listen to `signals` (by default SIGTERM); returns itself.

        Raises:
          RuntimeError: outside the main thread, where Python cannot set handlers.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("StopFlag.install must be called in the main thread.")
        for number in signals or (signal.SIGTERM,):
            if number not in self._before:
                self._before[number] = signal.signal(number, self._receive)
        return self

    def uninstall(self) -> None:
        """Gives every signal back to the handler it had."""
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._requested_at is None:
            self._requested_at = time.monotonic()
            # `print` may be what this handler interrupts, and its buffer refuses to be entered twice.
            os.write(2, f"{signal.Signals(number).name} received: stopping after the step\n".encode())
        before = self._before.get(number)
        if callable(before):
            before(number, frame)
