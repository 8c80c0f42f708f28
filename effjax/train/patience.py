"""Two habits of orbax, while it reads or writes: how it gives up on files, and by which clock on a deadline.

It reads or writes all arrays at once and closes its event loop at the first that fails. What the others still
had in flight would then end in a closed loop, each with a traceback of its own on the terminal.

Its deadlines are counted by the clock on the wall. Where that jumps ahead, as on a laptop that was shut for
an hour, a write that lacked a second fails; where it jumps back, one that failed is waited for longer.
"""

import asyncio
import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def patience() -> Iterator[None]:
    """While entered, tasks of new event loops end before these close, and orbax counts steady seconds."""
    make, steady = asyncio.new_event_loop, _Steady()
    modules = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("orbax.checkpoint.") and getattr(module, "time", None) is time
    ]
    asyncio.new_event_loop = _PatientLoop
    for module in modules:
        module.time = steady  # type: ignore[attr-defined]
    try:
        yield
    finally:
        asyncio.new_event_loop = make
        for module in modules:
            module.time = time  # type: ignore[attr-defined]


class _Steady:
    """The module `time`, whose `time()` begins with the clock on the wall and does not jump with it."""

    def __init__(self) -> None:
        self._ahead = time.time() - time.monotonic()

    def time(self) -> float:
        return time.monotonic() + self._ahead

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


class _PatientLoop(asyncio.SelectorEventLoop):
    """An event loop that lets its tasks end before it closes."""

    def close(self) -> None:
        if not self.is_closed() and (pending := asyncio.all_tasks(self)):
            self.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
        super().close()

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.Handle:
        """What a thread still had in flight when the loop was closed has nobody left to tell."""
        try:
            return super().call_soon_threadsafe(callback, *args, context=context)
        except RuntimeError:
            if not self.is_closed():
                raise
            return asyncio.Handle(callback, args, self, context)
