"""Between the engine's thread and the event loop: who waits for which answer.

The engine steps in a thread of its own and hands over what happened; the event loop gives every answer's part
to whoever reads it, and never waits for the engine.
"""

import asyncio
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from effjax.decoding.serving.engine import Engine
from effjax.decoding.serving.requests import Answer, Event, QueueFull, TooLarge
from effjax.errors import UsageError
from experiments.run.server.body import Asked, Served
from experiments.run.server.metrics import Metrics
from experiments.run.server.problems import Problem
from experiments.run.server.text import TextStream

# A client that is refused comes back after so many seconds at most.
LATEST_RETRY = 60
STOPS = "the server stops: send the request to another one, or later."


class Worker(threading.Thread):
    """Steps an engine until it is told to stop.

    Args:
      engine: it.
      deliver: what is done with the events of a step, in this thread.
      failed: what is done with an error, which ends the thread.
    """

    def __init__(
        self,
        engine: Engine,
        deliver: Callable[[list[Event]], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        super().__init__(name="engine", daemon=True)
        self._engine, self._deliver, self._failed = engine, deliver, failed
        self._ending = threading.Event()

    def run(self) -> None:
        """The loop."""
        try:
            while not self._ending.is_set():
                if self._engine.wait(0.1) and (events := self._engine.step()):
                    self._deliver(events)
        except BaseException as error:
            self._failed(error)

    def end(self) -> None:
        """Ends the thread after its step."""
        self._ending.set()
        self.join()


class Completion:
    """One answer as text, piece by piece.

    Args:
      service: that gives it.
      asked: what is answered.
      answer: what the engine writes.
    """

    def __init__(self, service: "Service", asked: Asked, answer: Answer) -> None:
        self.asked, self.answer = asked, answer
        self.name, self.created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        self.model = service.served.name
        self.events: asyncio.Queue[list[Event] | None] = asyncio.Queue()
        self.tokens = 0
        self.reason: str | None = None
        self._service = service
        # Who waits for the whole of a text that nothing but its tokens can end is woken once.
        self._each = asked.stream or bool(asked.stops)
        self._new: list[Event] = []
        self._text = TextStream(service.served.tokenizer, asked.stops)

    async def pieces(self) -> AsyncIterator[str]:
        """Text as it comes; when it ends there is a `reason`.

        Raises:
          Problem: if the server stops before the answer ends.
        """
        while self.reason is None:
            events = await self.events.get()
            if events is None:
                raise Problem(503, STOPS)
            piece = "".join(map(self._read, events))
            if piece:
                yield piece

    def take(self, event: Event) -> None:
        """Gives it to whoever reads."""
        self._new.append(event)
        if self._each or event.end is not None:
            self.events.put_nowait(self._new)
            self._new = []

    def _read(self, event: Event) -> str:
        """The text that one more token makes."""
        if event.token is None:
            raise Problem(503, STOPS)
        if self.reason is not None:
            return ""
        self.tokens += 1
        # A stop token is no part of the text.
        piece = "" if event.end == "stop" else self._text.push(event.token)
        if event.end is not None and not self._text.stopped:
            piece += self._text.finish()
        self.reason = "stop" if self._text.stopped else event.end
        return piece

    def close(self) -> None:
        """Frees what the answer has, if it has not ended; it is safe to call at any time."""
        self._service.close(self)

    def usage(self) -> dict[str, int]:
        """OpenAI's counts."""
        prompt = len(self.answer.request.prompt)
        return dict(prompt_tokens=prompt, completion_tokens=self.tokens, total_tokens=prompt + self.tokens)

    def timings(self) -> dict[str, float]:
        """What the answer took; the text behind its first token gives the rate."""
        answer, now = self.answer, time.monotonic()
        assert answer.joined is not None
        assert answer.first is not None
        return dict(
            queue_seconds=answer.joined - answer.arrived,
            first_token_seconds=answer.first - answer.arrived,
            seconds=now - answer.arrived,
            tokens_per_second=(self.tokens - 1) / max(now - answer.first, 1e-9),
            cache_bytes=answer.cache_bytes,
        )


class Service:
    """Answers of one engine; lives on the event loop.

    Args:
      engine: that writes.
      served: what it serves.
    """

    def __init__(self, engine: Engine, served: Served) -> None:
        self.engine, self.served = engine, served
        self.metrics = Metrics(served.caches)
        self.stopping = False
        self.error: BaseException | None = None
        self._open: dict[Answer, Completion] = {}
        self._worker: Worker | None = None

    def start(self) -> None:
        """Starts the engine's thread; called on the event loop."""
        loop = asyncio.get_running_loop()

        def on_loop(function: Callable[[Any], None]) -> Callable[[Any], None]:
            def call(told: Any) -> None:
                loop.call_soon_threadsafe(function, told)

            return call

        self._worker = Worker(self.engine, on_loop(self._deliver), on_loop(self._fail))
        self._worker.start()

    async def drain(self, seconds: float) -> None:
        """Takes no more requests, and waits until those that are there are answered, up to so long."""
        self.stopping = True
        until = time.monotonic() + seconds
        while self._open and self.error is None and time.monotonic() < until:
            await asyncio.sleep(0.05)

    def end(self) -> None:
        """Ends the engine's thread, and all answers."""
        self.stopping = True
        if self._worker is not None:
            self._worker.end()
        for completion in self._open.values():
            completion.events.put_nowait(None)

    def open(self, asked: Asked) -> Completion:
        """Hands a request to the engine.

        Raises:
          Problem: if the engine does not take it.
        """
        if self.stopping:
            raise Problem(503, STOPS)
        try:
            answer = self.engine.submit(asked.request)
        except TooLarge as error:
            raise Problem(413, str(error), "max_tokens", "context_length_exceeded") from None
        except UsageError as error:
            raise Problem(400, str(error), "prompt") from None
        except QueueFull as error:
            raise Problem(429, str(error), code="queue_full", retry_after=self._retry_after()) from None
        # The engine's first event comes through the loop, and so not before this is done.
        completion = self._open[answer] = Completion(self, asked, answer)
        return completion

    def close(self, completion: Completion) -> None:
        """Forgets an answer, and ends it where it has not ended."""
        answer = completion.answer
        if self._open.pop(answer, None) is None:
            return
        if answer.end is None:
            self.engine.cancel(answer)
        cache = answer.request.cache
        self.metrics.ended[cache, completion.reason or "cancelled"] += 1
        if completion.reason is not None:
            told = completion.timings()
            self.metrics.queued[cache].add(told["queue_seconds"])
            self.metrics.first[cache].add(told["first_token_seconds"])
            self.metrics.whole[cache].add(told["seconds"])

    def state(self) -> dict[str, dict[str, Any]]:
        """Of every lane: who runs, who waits, the pages, and the bytes."""
        return {
            name: told | dict(cache_bytes=self.engine.lanes[name].cache_bytes)
            for name, told in self.engine.state().items()
        }

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            if event.token is not None:
                self.metrics.wrote(event.answer.request.cache, 1)
            completion = self._open.get(event.answer)
            if completion is not None:
                completion.take(event)

    def _fail(self, error: BaseException) -> None:
        self.error, self.stopping = error, True
        for completion in self._open.values():
            completion.events.put_nowait(None)

    def _retry_after(self) -> int:
        """About when a row is free, by how long answers have taken."""
        rows = sum(told["rows"] for told in self.engine.state().values())
        return min(max(round(self.metrics.mean_seconds() / rows), 1), LATEST_RETRY)
