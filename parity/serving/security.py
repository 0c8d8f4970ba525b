"""What every request must pass before a route sees it, and the headers of every response.

The server is made for the machine of its user. A page of another site that the user visits can send requests to
127.0.0.1 as well: the checks of Host (against DNS rebinding), Origin and Content-Type refuse those, and no response
allows another site to read it.
"""

import asyncio
import hmac
import ipaddress
import json
import socket
from collections.abc import Iterable
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from parity.errors import printable

_MOST_CHARACTERS = 2000  # of a message
BODY_SECONDS = 30.0
"""A client has so long to send the body of its request."""
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class JsonResponse(JSONResponse):
    """JSON in ASCII, because the name of a file that is not UTF-8 becomes a text which UTF-8 cannot encode."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def error_response(
    status: int, message: str, *, param: str | None = None, code: str | None = None, headers: Any = None
) -> Response:
    """Return an error in the form of OpenAI's API."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
    error = {
        "message": printable(message, _MOST_CHARACTERS),
        "type": "server_error" if status >= 500 else kind,
        "param": param,
        "code": code,
    }
    return JsonResponse({"error": error}, status, headers)


class Guard:
    """ASGI middleware that refuses requests which a client of this machine would not send, and limits their bodies.

    Args:
        app: The application.
        hosts: Names by which clients may address the server, besides localhost and IP addresses.
        api_key: If given, all paths but `public` need the header `Authorization: Bearer KEY`.
        largest_body: Largest number of bytes of a body.
        public: Paths which need no key; one that ends with "/*" stands for all paths that begin like it.
    """

    def __init__(
        self, app: ASGIApp, *, hosts: Iterable[str], api_key: str | None, largest_body: int, public: Iterable[str]
    ):
        self._app = app
        self._hosts = {"localhost", *(host.lower() for host in hosts)}
        self._key = None if api_key is None else api_key.encode()
        self._largest_body = largest_body
        self._public = tuple(public)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message["headers"]}
                extra = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *(pair for pair in extra if pair[0] not in present)]
            await send(message)

        response = self._refusal(scope)
        if response is None:
            body = await self._body(receive)
            if isinstance(body, bytes):
                await self._app(scope, _replay(body, receive), send_with_headers)
                return
            response = body
        response.headers["Connection"] = "close"  # the rest of a body is not read
        await response(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        path, method = scope["path"], scope["method"]
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_own(hosts[0]):
            return error_response(
                403, "the Host header does not name this server; use its IP address or localhost", code="wrong_host"
            )
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in {f"{scheme}://{hosts[0].lower()}" for scheme in _SCHEMES}:
            return error_response(403, "requests from pages of other sites are refused", code="wrong_origin")
        if self._key is not None and not self._is_public(path):
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode("latin-1"), self._key):
                return error_response(
                    401,
                    "the server was started with --api-key: send the header Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        if method == "POST" and headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return error_response(415, "the Content-Type must be application/json", code="wrong_content_type")
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length[:20]) > self._largest_body:
            return self._too_large()
        return None

    def _is_own(self, host: str) -> bool:
        name, has_port, port = host.strip().lower().rpartition(":")
        if not has_port or port.endswith("]"):
            name = host.strip().lower()
        elif port and not (port.isascii() and port.isdigit()):
            return False
        if name in self._hosts:
            return True
        try:
            ipaddress.ip_address(name[1:-1] if name[:1] == "[" and name[-1:] == "]" else name)
        except ValueError:
            return False
        return True

    def _is_public(self, path: str) -> bool:
        return any(path == public or (public[-1] == "*" and path.startswith(public[:-1])) for public in self._public)

    def _too_large(self) -> Response:
        return error_response(413, f"the body has more than {self._largest_body} bytes", code="too_large")

    async def _body(self, receive: Receive) -> bytes | Response:
        parts, size = [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return error_response(400, "the connection was closed before the end of the body")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self._largest_body:
                        return self._too_large()
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            return error_response(408, f"the body took longer than {BODY_SECONDS:g} seconds", code="timeout")


_SCHEMES = ("http", "https")  # https, for a proxy on this machine


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body, which was read already, and then what the client does."""
    is_first = True

    async def replayed() -> Message:
        nonlocal is_first
        if is_first:
            is_first = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replayed


def own_names(host: str) -> list[str]:
    """Return the names by which clients may address a server that listens on `host`."""
    return [host, socket.gethostname()]
