"""Requests in, tokens out: lanes of running batches, one step at a time.

`submit` and `cancel` may be called from any thread and return at once; `step` belongs to one thread, and
returns what happened. Nothing is ever written for a request but by `step`.
"""

import threading
import time
from collections.abc import Callable, Mapping

import numpy as np

from effjax.decoding.serving.lane import Lane
from effjax.decoding.serving.requests import Answer, End, Event, QueueFull, Request
from effjax.decoding.serving.schedule import Schedule
from effjax.errors import UsageError, did_you_mean


class Engine:
    """Writes for many at once.

    Args:
      lanes: running batches by the name of their cache policy.
      queue: requests that may wait, besides those for which there is a row.
      clock: seconds, which only grow.
    """

    def __init__(
        self, lanes: Mapping[str, Lane], queue: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if not lanes:
            raise UsageError("there are no lanes: name at least one cache policy.")
        if queue < 0:
            raise UsageError(f"queue={queue} must be 0 or more requests.")
        self.lanes, self.queue = dict(lanes), queue
        self.schedules = {
            name: Schedule(lane.rows, lane.pages, lane.page, lane.slots, lane.length)
            for name, lane in self.lanes.items()
        }
        self._clock = clock
        self._changed = threading.Condition()

    def submit(self, request: Request) -> Answer:
        """Takes a request.

        Raises:
          UsageError: for an unknown lane or token; a `TooLarge` for more than can ever be held.
          QueueFull: where too many wait.
        """
        schedule = self.schedules.get(request.cache)
        if schedule is None:
            raise UsageError(
                f"cache is {request.cache!r}, which is not served. {did_you_mean(request.cache, self.lanes)}"
            )
        schedule.check(request)
        vocab = self.lanes[request.cache].model.vocab
        if strange := [token for token in request.prompt if not 0 <= token < vocab]:
            raise UsageError(f"token {strange[0]} is unknown: the model has the tokens 0 to {vocab - 1}.")
        with self._changed:
            if schedule.idle <= 0 and self._waiting() >= self.queue:
                raise QueueFull(f"{self._waiting()} requests wait, and {self.queue} may: try again later.")
            answer = Answer(request, self._clock())
            schedule.add(answer)
            self._changed.notify()
        return answer

    def cancel(self, answer: Answer) -> None:
        """Ends an answer before the next step, whether it has begun or not; one that has ended stays."""
        with self._changed:
            answer.unwanted = True
            self._changed.notify()

    def wait(self, seconds: float) -> bool:
        """Returns whether there is something to do, after up to so long."""
        with self._changed:
            return self._changed.wait_for(self._busy, seconds)

    def step(self) -> list[Event]:
        """Lets requests leave and join, and writes a token for each that runs."""
        with self._changed:
            now = self._clock()
            events = [Event(answer, end="cancelled") for answer in self._unwanted()]
            for event in events:
                self._end(event.answer, "cancelled", now)
            joined = {name: schedule.admit(now) for name, schedule in self.schedules.items()}
            running = {name: schedule.running for name, schedule in self.schedules.items()}
        for name, answers in joined.items():
            lane = self.lanes[name]
            for answer in answers:
                assert answer.row is not None
                answer.cache_bytes = lane.bytes_of(len(answer.pages))
                lane.join(answer.request, answer.row, answer.pages)
        # All lanes are started before the first is waited for.
        written = {
            name: self.lanes[name].advance(_alive(self.lanes[name].rows, rows))
            for name, rows in running.items()
            if rows
        }
        tokens = {name: np.asarray(each) for name, each in written.items()}
        with self._changed:
            now = self._clock()
            for name, each in tokens.items():
                for row, answer in running[name]:
                    events.append(self._wrote(answer, int(each[row]), now))
        return events

    def state(self) -> dict[str, dict[str, int]]:
        """Of every lane: who runs, who waits, and the pages."""
        with self._changed:
            return {
                name: dict(
                    rows=len(schedule.rows),
                    running=len(schedule.running),
                    waiting=len(schedule.waiting),
                    pages=schedule.pool.count,
                    free_pages=schedule.pool.free,
                )
                for name, schedule in self.schedules.items()
            }

    def _wrote(self, answer: Answer, token: int, now: float) -> Event:
        answer.first = now if answer.first is None else answer.first
        answer.tokens.append(token)
        end: End | None = None
        if token in answer.request.stop_tokens:
            end = "stop"
        elif len(answer.tokens) == answer.request.max_new:
            end = "length"
        if end is not None:
            self._end(answer, end, now)
        return Event(answer, token, end)

    def _end(self, answer: Answer, end: End, now: float) -> None:
        self.schedules[answer.request.cache].remove(answer)
        answer.end, answer.ended = end, now

    def _unwanted(self) -> list[Answer]:
        return [
            answer
            for schedule in self.schedules.values()
            for answer in (*schedule.waiting, *(answer for _, answer in schedule.running))
            if answer.unwanted
        ]

    def _busy(self) -> bool:
        return any(schedule.waiting or schedule.running for schedule in self.schedules.values())

    def _waiting(self) -> int:
        """Those for which there is no row; the others join in the next step, if there are pages."""
        return sum(max(-schedule.idle, 0) for schedule in self.schedules.values())


def _alive(rows: int, running: list[tuple[int, Answer]]) -> np.ndarray:
    alive = np.zeros(rows, bool)
    alive[[row for row, _ in running]] = True
    return alive
