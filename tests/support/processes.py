"""Start several processes that meet at a port, and wait for them."""

import contextlib
import os
import random
import socket
import subprocess
import time

from support.runs import ROOT


def free_port(first=16384, last=32767):
    """Return a port below the range of outgoing connections, one of which could otherwise take it in the meantime."""
    while True:
        port = random.randint(first, last)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def spawn(arguments, **environment):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", **environment}  # compiling takes the most time
    return subprocess.Popen(list(map(str, arguments)), **pipes, cwd=ROOT, env=environment)


def finish(started, timeout=300):
    """[(exit status, output, errors)]; a process that hangs is killed, and fails the test."""
    ends = time.monotonic() + timeout
    try:
        outputs = [process.communicate(timeout=ends - time.monotonic()) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(started, outputs, strict=True)]
