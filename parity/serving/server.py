"""The HTTP server: uvicorn, with limits for slow clients."""

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from parity.errors import InputError

HEADER_SECONDS = 10.0
"""A client has so long to send the headers of a request after it has connected, or after their first byte."""
STALL_SECONDS = 60.0
"""A client that reads nothing of its response for so long is disconnected."""


class Protocol(H11Protocol):
    """HTTP/1.1 that disconnects clients which send no request, half of one, or read nothing."""

    _deadline: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._deadline = self.loop.call_later(HEADER_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:  # the headers are complete
            self._deadline = _cancelled(self._deadline)
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def on_response_complete(self) -> None:
        self._deadline = _cancelled(self._deadline)
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline, self._stalled = _cancelled(self._deadline), _cancelled(self._stalled)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = _cancelled(self._stalled)
        self._stalled = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        self._stalled = _cancelled(self._stalled)
        super().resume_writing()


def _cancelled(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Cancel a timer, and return the value of one that is not set."""
    if timer is not None:
        timer.cancel()
    return None


KEEP_ALIVE_SECONDS = 5
"""A connection without a request is closed after so long."""


class Server(uvicorn.Server):
    """Calls `announce` with the server's address once it answers, and returns from `run` after SIGINT or SIGTERM."""

    announce: Callable[[str], None]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.announce(_address(self.servers[0].sockets[0]))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop when the requests have ended; at a second SIGINT at once. uvicorn would raise the signal again."""
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def new_server(app: ASGIApp, host: str, port: int, announce: Callable[[str], None]) -> Server:
    """Return a server; its `run` serves until SIGINT or SIGTERM, and then ends the requests that it has.

    Args:
        app: The application.
        host: Address or name to listen on.
        port: Port to listen on; 0 for a free one.
        announce: Called with the address of the server once it answers.

    Raises:
        InputError: If the server cannot listen there.
    """
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        h11_max_incomplete_event_size=2**15,
    )
    server = Server(config)
    server.announce = announce
    try:
        _bindable(host, port)
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: {error.strerror or error}; give another one") from None
    return server


def _bindable(host: str, port: int) -> None:
    """Raise OSError if the server cannot listen; uvicorn would log this and exit."""
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[:1]:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)


def _address(listener: Any) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
