"""What a person sees while a run goes on: a live line on a terminal, plain lines elsewhere.

A plain line: `step 120/400  loss 0.5312  1520 images/s  0:11 left`
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from experiments.run.formatting import clock, count, measurement

Values = Mapping[str, float] | Callable[[], Mapping[str, float]]

_LIVE_INTERVAL = 0.25  # seconds between redraws: fast enough to look alive, slow enough to cost nothing
_RATE_WINDOW = 30.0  # seconds over which the rate forgets


class Progress:
    """Shows step, values, rate and time left; use it in a `with`.

    `update` may be called after every step: unless a redraw is due it reads the clock and returns. Values
    must be on the host already, or be given as a function, which is called only for a redraw.

    Args:
      total: the last step.
      start: the step a resumed run begins at.
      units_per_step: examples or tokens that one step consumes.
      unit: their name: `images`, `tokens`.
      every: seconds between plain lines.
      console: where to write, standard output by default. Whether it is a terminal decides the form.
      now: a monotonic clock in seconds.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        units_per_step: float = 1,
        unit: str = "examples",
        every: float = 10.0,
        console: Console | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._step = total, start
        self._units_per_step, self._unit = units_per_step, unit
        self._console = console or Console(highlight=False)
        self._now = now
        self._live = self._live_display() if self._console.is_terminal else None
        self._task = self._live.add_task("", total=total, completed=start, shown="") if self._live else None
        self._interval = _LIVE_INTERVAL if self._live else every
        self._values: Values = {}
        self._rate = _Rate(start, now())
        self._due = now() + self._interval
        self._last_shown: int | None = None

    def update(self, step: int, values: Values | None = None) -> None:
        """Says that `step` steps are done; `values`, where given, replace the last shown ones."""
        self._step = step
        if values is not None:
            self._values = values
        now = self._now()
        if now >= self._due or step >= self._total:
            self._due = now + self._interval
            self._show(now)

    @contextlib.contextmanager
    def pause(self, label: str) -> Iterator[None]:
        """Names what happens between steps (`evaluating`); its time does not count against the rate."""
        began = self._now()
        if self._live and self._task is not None:
            self._live.update(self._task, shown=label, refresh=True)
        try:
            yield
        finally:
            self._rate.skip(self._now() - began)

    def message(self, text: str) -> None:
        """Writes a line of its own, above the live line where there is one."""
        self._console.print(Text(text), soft_wrap=True)

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._last_shown not in (None, self._step):
            self._show(self._now())
        if self._live:
            self._live.stop()

    def line(self) -> str:
        """The present state in words."""
        parts = [f"step {self._step}/{self._total}"]
        values = self._values() if callable(self._values) else self._values
        parts += [f"{name} {measurement(value)}" for name, value in values.items()]
        rate = self._rate.steps_per_second
        if rate > 0:
            units = rate * self._units_per_step
            parts.append(
                f"{count(units) if units >= 1e5 else measurement(float(f'{units:.3g}'))} {self._unit}/s"
            )
            parts.append(f"{clock((self._total - self._step) / rate)} left")
        return "  ".join(parts)

    def _show(self, now: float) -> None:
        self._last_shown = self._step
        self._rate.observe(self._step, now)
        if self._live and self._task is not None:
            self._live.update(self._task, completed=self._step, shown=self.line(), refresh=True)
        else:
            self.message(self.line())

    def _live_display(self) -> RichProgress:
        # No thread of its own: the loop redraws, and between redraws the processor belongs to the training.
        return RichProgress(
            BarColumn(bar_width=20),
            TextColumn("{task.fields[shown]}", markup=False),
            console=self._console,
            auto_refresh=False,
        )


class _Rate:
    """Steps per second over the recent past: both sums fade with the time that passes."""

    def __init__(self, step: int, now: float) -> None:
        self._step, self._time = step, now
        self._steps = self._seconds = 0.0
        self._first = True

    @property
    def steps_per_second(self) -> float:
        return self._steps / self._seconds if self._seconds > 0 else 0.0

    def observe(self, step: int, now: float) -> None:
        steps, seconds = step - self._step, now - self._time
        if steps <= 0 or seconds <= 0:
            return
        keep = 0.5 ** (seconds / _RATE_WINDOW)
        self._steps, self._seconds = self._steps * keep + steps, self._seconds * keep + seconds
        self._step, self._time = step, now

    def skip(self, seconds: float) -> None:
        self._time += seconds
