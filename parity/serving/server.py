"""The HTTP server: uvicorn, with limits for slow clients."""

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from parity.errors import InputError

HEADER_SECONDS = 10.0
"""A client has so long to send the headers of its first request."""


class Protocol(H11Protocol):
    """HTTP/1.1 that closes connections on which no request arrives; uvicorn does so after the first request only."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._deadline = self.loop.call_later(HEADER_SECONDS, self._close_without_request)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    def _close_without_request(self) -> None:
        if self.scope is None:
            self.transport.abort()


class Server(uvicorn.Server):
    """Calls `announce` with the server's address once it answers."""

    announce: Callable[[str], None]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.announce(_address(self.servers[0].sockets[0]))


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
        timeout_keep_alive=5,
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
