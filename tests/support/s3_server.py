"""A local S3 server (moto) in a process of its own."""

import contextlib
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator

import pytest

_PROGRAM = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=int(sys.argv[1]), verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing-key",
    "AWS_SECRET_ACCESS_KEY": "testing-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}


class S3Server:
    """A server on 127.0.0.1 with a port that the system chooses. Its objects last as long as its process.

    Attributes:
        url: http://127.0.0.1:PORT, which `environment` names as AWS_ENDPOINT_URL.
        environment: The variables that a client needs.
    """

    def __init__(self, port: int = 0):
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.strip():
            raise RuntimeError("moto's server did not start")
        self.port = int(line)
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {**ENVIRONMENT, "AWS_ENDPOINT_URL": self.url}
        self._wait()

    def _wait(self):
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(self.url, timeout=5):
                return
            if time.monotonic() > deadline:
                raise RuntimeError("moto's server does not answer")
            time.sleep(0.05)

    def new_bucket(self) -> str:
        """Make an empty bucket, and return its address."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/{name}", method="PUT"), timeout=30).close()
        return f"s3://{name}"

    def pause(self):
        """Let the server answer nothing until `go_on`."""
        self._process.send_signal(19)  # SIGSTOP

    def go_on(self):
        self._process.send_signal(18)  # SIGCONT

    def close(self):
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def s3_environment() -> Iterator[S3Server]:
    """Start a server, and let the environment of this process name it until the end of the context."""
    server = S3Server()
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in server.environment.items():
                patch.setenv(name, value)
            yield server
    finally:
        server.close()
