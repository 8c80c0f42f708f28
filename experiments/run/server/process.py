"""A server from its start to its end: socket, event loop, engine's thread, and a request to stop."""

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from effjax.errors import RunError, UsageError
from experiments.run.server.app import Limits, make_app
from experiments.run.server.service import Service
from experiments.run.signals import StopFlag

# Connections beyond these are answered with 503.
CONNECTIONS = 1024


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
      UsageError: where that cannot be.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        listening.close()
        raise UsageError(
            f"--host={host} --port={port} cannot be listened to ({error}): name another, or --port=0 for any."
        ) from None
    return listening


def run(
    service: Service,
    limits: Limits,
    listening: socket.socket,
    stop: StopFlag,
    grace: float,
    ready: Callable[[], None],
) -> None:
    """Serves until it is told to stop; then answers those who are there, for up to `grace` seconds.

    Raises:
      RunError: if the engine fails.
    """
    # What a client does wrong is told to the client; what fails here is logged.
    logging.getLogger("uvicorn").addHandler(logging.StreamHandler())
    config = uvicorn.Config(
        make_app(service, limits),
        http=_protocol(limits.seconds),
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=2,
    )
    asyncio.run(_serve(_Server(config), service, listening, stop, grace, ready))
    if service.error is not None:
        failed = f"{type(service.error).__name__}: {service.error}"
        raise RunError(f"the engine failed, and the server with it: {failed}") from service.error


async def _serve(
    server: uvicorn.Server,
    service: Service,
    listening: socket.socket,
    stop: StopFlag,
    grace: float,
    ready: Callable[[], None],
) -> None:
    service.start()
    serving = asyncio.ensure_future(server.serve(sockets=[listening]))
    try:
        while not (server.started or serving.done()):
            await asyncio.sleep(0.01)
        ready()
        while not (stop.requested or service.error or serving.done()):
            await asyncio.sleep(0.05)
        await service.drain(grace)
    finally:
        service.end()
        server.should_exit = True
        await serving


class _Server(uvicorn.Server):
    """Leaves signals to the driver."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


def _protocol(seconds: float) -> type[H11Protocol]:
    class Patient(H11Protocol):
        """Waits for the head of a request only so long, however its bytes trickle."""

        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            """Starts to wait for the first request."""
            super().connection_made(transport)
            self._wait()

        def on_response_complete(self) -> None:
            """Starts to wait for the next."""
            super().on_response_complete()
            self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            """Waits no more."""
            if self._late is not None:
                self._late.cancel()
            super().connection_lost(exc)

        def _wait(self) -> None:
            if self._late is not None:
                self._late.cancel()
            self._late = self.loop.call_later(seconds, self._give_up)

        def _give_up(self) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self.transport.abort()

    return Patient
