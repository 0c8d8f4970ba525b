"""The HTTP server: uvicorn, with limits for slow clients."""

import asyncio
import errno
import logging
import signal
import socket
from collections.abc import Callable, Sequence
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
        transport.set_write_buffer_limits(high=0)  # so that pause_writing is called for the last bytes, too
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
        self._watch()

    def resume_writing(self) -> None:
        self._stalled = _cancelled(self._stalled)
        super().resume_writing()

    def _watch(self) -> None:
        size = self.transport.get_write_buffer_size()
        self._stalled = _cancelled(self._stalled)
        self._stalled = self.loop.call_later(STALL_SECONDS, self._check, size)

    def _check(self, size: int) -> None:
        if self.transport.get_write_buffer_size() < size:  # the client reads, though slowly
            self._watch()
        else:
            self.transport.abort()


def _cancelled(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Cancel a timer, and return the value of one that is not set."""
    if timer is not None:
        timer.cancel()
    return None


KEEP_ALIVE_SECONDS = 5
"""A connection without a request is closed after so long."""


class Server(uvicorn.Server):
    """Calls `announce` with the server's address once it answers, and returns from `run` after SIGINT or SIGTERM."""

    def __init__(self, config: uvicorn.Config, listeners: list[socket.socket], announce: Callable[[str], None]):
        super().__init__(config)
        self._listeners = listeners
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(self._listeners)
        if self.started:
            self._announce(_address(self._listeners[0]))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop when the requests have ended; at a second SIGINT at once. uvicorn would raise the signal again."""
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def new_server(app: ASGIApp, listeners: list[socket.socket], announce: Callable[[str], None]) -> Server:
    """Return a server; its `run` serves until SIGINT or SIGTERM, and then ends the requests that it has.

    Args:
        app: The application.
        listeners: What `bind` returned.
        announce: Called with the address of the server once it answers.

    Raises:
        InputError: If another program has begun to listen there since then.
    """
    for listener in listeners:
        try:
            listener.listen()
        except OSError as error:
            raise InputError(f"{_address(listener)}: {error.strerror or error}; give another --port") from None
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        h11_max_incomplete_event_size=2**15,
    )
    return Server(config, listeners, announce)


def bind(host: str, port: int) -> list[socket.socket]:
    """Reserve the addresses of a server.

    Args:
        host: Address or name; of a name all addresses are reserved that this machine has.
        port: Port; 0 for a free one, at the first address of the host.

    Raises:
        InputError: If the server could not listen there.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"--port must be in 0..65535, got {port}")
    listeners: list[socket.socket] = []
    problem: OSError | None = None
    try:
        for family, kind, protocol, _, address in dict.fromkeys(_addresses(host, port)):
            try:
                listeners.append(_bound(family, kind, protocol, address))
            except OSError as error:
                if error.errno not in _ABSENT:
                    raise
                problem = error
            if listeners and port == 0:
                break
        if not listeners:
            raise problem or OSError("the host has no address")
    except OSError as error:
        for listener in listeners:
            listener.close()
        raise InputError(f"--host {host} --port {port}: {error.strerror or error}; give another one") from None
    return listeners


_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""Errors of an address that the machine lacks, such as that of localhost in IPv6."""


def _addresses(host: str, port: int) -> Sequence[Any]:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:  # such as a label of more than 63 characters
        raise OSError(str(error)) from None


def _bound(family: int, kind: int, protocol: int, address: Any) -> socket.socket:
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # the same port in IPv4 is a listener of its own
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
