"""The pages of the server: OpenAI's completions, and what a keeper of a server asks for.

POST /v1/completions     a text that goes on from a prompt, whole or as server-sent events
GET  /v1/models          what is served
GET  /health             200 while requests are taken, else 503
GET  /metrics            for Prometheus
"""

import asyncio
import contextlib
import dataclasses
import hmac
import time
from typing import Any

from anyio import to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from experiments.run.server.body import parse
from experiments.run.server.problems import Problem, to_json
from experiments.run.server.service import Completion, Service


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one client may ask of the server.

    Attributes:
      body: the most bytes of a request.
      seconds: in which a client must send its request, and take each piece of the answer.
      key: that a client must know; None asks for none.
      hosts: names under which the server may be called; None takes any. A page of the web that a browser
        shows could otherwise call a server of this machine under a name of its own.
    """

    body: int = 2**20
    seconds: float = 20.0
    key: str | None = None
    hosts: frozenset[str] | None = None


def make_app(service: Service, limits: Limits) -> ASGIApp:
    """The application."""

    async def completions(request: Request) -> Any:
        body = await read_body(request, limits)
        # Reading a long prompt takes its time.
        asked = await to_thread.run_sync(parse, body, service.served)
        completion = service.open(asked)
        if asked.stream:
            return Stream(completion, limits.seconds)
        return await whole(completion, request)

    async def models(request: Request) -> Response:
        lengths = [lane.length for lane in service.engine.lanes.values()]
        model = dict(
            id=service.served.name,
            object="model",
            created=started,
            owned_by="effjax",
            caches=list(service.served.caches),
            policies={name: lane.told for name, lane in service.engine.lanes.items()},
            max_length=lengths[0],
        )
        return answer(200, dict(object="list", data=[model]))

    async def health(request: Request) -> Response:
        return answer(503 if service.stopping else 200, dict(status="stopping" if service.stopping else "ok"))

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(service.state()), media_type="text/plain; version=0.0.4")

    async def problem(request: Request, error: Exception) -> Response:
        assert isinstance(error, Problem)
        service.metrics.refused[error.status] += 1
        return answer(error.status, error.body(), error.headers())

    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        known = "POST /v1/completions, GET /v1/models, GET /health, GET /metrics"
        return await problem(request, Problem(error.status_code, f"{error.detail}. Known: {known}."))

    async def broken(request: Request, error: Exception) -> Response:
        return await problem(request, Problem(500, "the server failed: its log says how."))

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    started = int(time.time())
    routes = [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/models", models),
        Route("/health", health),
        Route("/metrics", metrics),
    ]
    handlers: dict[Any, Any] = {
        Problem: problem,
        HTTPException: unknown,
        ClientDisconnect: gone,
        Exception: broken,
    }
    return Guard(Starlette(routes=routes, exception_handlers=handlers), limits)


class Guard:
    """Lets those in who may come in."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An application."""
        try:
            if scope["type"] == "http":
                self._check(Request(scope))
        except Problem as error:
            await answer(error.status, error.body(), error.headers())(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _check(self, request: Request) -> None:
        limits = self._limits
        host = request.headers.get("host", "").rsplit(":", 1)[0]
        if limits.hosts is not None and host not in limits.hosts:
            raise Problem(403, "this server is called by the address that it was started with.")
        if limits.key is None or request.url.path == "/health":
            return
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {limits.key}".encode()):
            raise Problem(401, "send the header 'Authorization: Bearer KEY' with the key of this server.")


async def read_body(request: Request, limits: Limits) -> bytes:
    """The whole body.

    Raises:
      Problem: for one that is no JSON, is too large, or comes too slowly.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise Problem(415, "send the header 'Content-Type: application/json', and JSON.")
    large = Problem(413, f"the body is larger than {limits.body} bytes: send less.", code="body_too_large")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > limits.body:
        raise large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.body:
                    raise large
    except TimeoutError:
        raise Problem(408, f"the body did not come within {limits.seconds:g} seconds.") from None
    return bytes(body)


async def whole(completion: Completion, request: Request) -> Response:
    """The answer in one piece; a client that leaves ends it."""

    async def collect() -> str:
        return "".join([piece async for piece in completion.pieces()])

    writing, leaving = asyncio.ensure_future(collect()), asyncio.ensure_future(_left(request.receive))
    try:
        await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not writing.done():
            raise ClientDisconnect
        text = writing.result()
        told = _chunk(completion, text, completion.reason)
        return answer(200, told | dict(usage=completion.usage(), timings=completion.timings()))
    finally:
        completion.close()
        await _cancelled(writing, leaving)


class Stream(Response):
    """The answer as server-sent events; a client that leaves, or takes none, ends it."""

    def __init__(self, completion: Completion, seconds: float) -> None:
        self._completion, self._seconds = completion, seconds
        super().__init__(headers={"cache-control": "no-cache"}, media_type="text/event-stream")
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An application."""
        writing, leaving = asyncio.ensure_future(self._write(send)), asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        except TimeoutError:
            pass  # the server closes a connection whose answer has no end
        finally:
            self._completion.close()
            await _cancelled(writing, leaving)

    async def _write(self, send: Send) -> None:
        completion, asked = self._completion, self._completion.asked
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for piece in completion.pieces():
                await self._event(send, to_json(_chunk(completion, piece, None)))
            told = _chunk(completion, "", completion.reason) | dict(timings=completion.timings())
            await self._event(send, to_json(told))
            if asked.usage:
                counts = _chunk(completion, "", None) | dict(choices=[], usage=completion.usage())
                await self._event(send, to_json(counts))
        except Problem as error:
            await self._event(send, to_json(error.body()))
        await self._event(send, b"[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _event(self, send: Send, data: bytes) -> None:
        async with asyncio.timeout(self._seconds):
            body = b"data: " + data + b"\n\n"
            await send({"type": "http.response.body", "body": body, "more_body": True})


def answer(status: int, body: Any, headers: dict[str, str] | None = None) -> Response:
    """An answer in JSON."""
    return Response(to_json(body), status, headers, "application/json")


def _chunk(completion: Completion, text: str, reason: str | None) -> dict[str, Any]:
    request = completion.answer.request
    return dict(
        id=completion.name,
        object="text_completion",
        created=completion.created,
        model=completion.model,
        cache=request.cache,
        choices=[dict(index=0, text=text, finish_reason=reason, logprobs=None)],
    )


async def _left(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancelled(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.gather(*tasks, return_exceptions=True)
