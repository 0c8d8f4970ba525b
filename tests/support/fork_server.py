"""Run Python programs in forks of one process that has imported the large packages, which takes longer than most runs.

    python fork_server.py

Each line of standard input is a program to run, as JSON: argv, cwd, files for stdin, stdout and stderr, and timeout in
seconds. Each line of output is its exit status, negative for a signal. This project's own modules are not imported
here. A program ends as if it had been started by itself, except that the interpreter's memory is not taken down, which
takes half a second.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import sys
import threading
import time

import flax.nnx
import jax
import matplotlib
import optax
import orbax.checkpoint
import PIL.Image
import rich.progress
import safetensors
import tiktoken
import torch
import tyro

__all__ = ["PIL", "flax", "jax", "matplotlib", "optax", "orbax", "rich", "safetensors", "tiktoken", "torch", "tyro"]


def wait(child, seconds):
    """Return the exit status of the child, which is killed after that many seconds."""
    end = time.monotonic() + seconds
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)


def serve():
    """Answer requests. Return the request in each child; the server itself returns None."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    gc.freeze()  # so that the collector does not copy pages that the children share
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            return request
        print(wait(child, request["timeout"]), file=answers, flush=True)
    return None


def redirect(stdin, stdout, stderr):
    for number, path, flags in ((0, stdin, os.O_RDONLY), (1, stdout, os.O_WRONLY), (2, stderr, os.O_WRONLY)):
        file = os.open(path, flags)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = os.fdopen(0, closefd=False)  # without what the server has read ahead


def run(path):
    """Run the program, and do what the interpreter does at its end. Return the exit status."""
    sys.path[0] = os.path.dirname(path)
    status = 0
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as error:
        status = error.code
        if not isinstance(status, int | None):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()
    return status or 0


if __name__ == "__main__" and (request := serve()):
    redirect(request["stdin"], request["stdout"], request["stderr"])
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv = request["argv"]
    os._exit(run(sys.argv[0]))
