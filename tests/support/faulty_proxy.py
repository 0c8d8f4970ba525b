"""A proxy before an HTTP server, which answers as a broken server or network does."""

import contextlib
import http.client
import http.server
import threading
import time
import urllib.parse

_ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>"


class FaultyProxy:
    """A proxy on 127.0.0.1 with a port that the system chooses.

    Attributes:
        url: http://127.0.0.1:PORT.
        fault: Called with the method and the path of each request; returns what happens to it: "" (it is passed on),
            "500", "403" or "507" (it is not passed on), "slow" (it is passed on after 50 ms), "cut" (half of the
            answer is sent), or "dropped" (the connection is closed without an answer).
        faults: The number of faults so far.
    """

    def __init__(self, target):
        self.fault, self.faults, self._lock = lambda method, path: "", 0, threading.Lock()
        host = urllib.parse.urlsplit(target).netloc
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_request(self):
                length = int(self.headers.get("Content-Length") or 0)
                assert "chunked" not in self.headers.get("Transfer-Encoding", "")
                body = self.rfile.read(length)
                fault = proxy.fault(self.command, self.path)
                with proxy._lock:
                    proxy.faults += bool(fault)
                if fault == "dropped":
                    self.close_connection = True
                elif fault.isdecimal():
                    code = {"500": "InternalError", "403": "AccessDenied", "507": "InsufficientStorage"}[fault]
                    self.answer(int(fault), [("Content-Type", "application/xml")], _ERROR.format(code=code).encode())
                else:
                    time.sleep(0.05 * (fault == "slow"))
                    connection = http.client.HTTPConnection(host, timeout=60)
                    with contextlib.closing(connection):
                        connection.request(self.command, self.path, body, dict(self.headers))
                        response = connection.getresponse()
                        content = response.read()
                    self.answer(response.status, response.getheaders(), content, cut=fault == "cut")

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_request  # noqa: N815 (names that the base class calls)

            def answer(self, status, headers, content, cut=False):
                self.send_response_only(status)
                length = {name.lower(): value for name, value in headers}.get("content-length")
                for name, value in headers:
                    if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(name, value)
                self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content[: len(content) // 2] if cut else content)
                self.close_connection = self.close_connection or cut

            def log_message(self, *arguments):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *arguments: None  # a client that was killed is gone
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()
