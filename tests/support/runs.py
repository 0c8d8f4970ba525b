"""Run scripts as a user runs them, and read the files that they write."""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def command(name, *arguments):
    return [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]


@functools.cache
def _server():
    program = Path(__file__).with_name("fork_server.py")
    server = subprocess.Popen([sys.executable, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.stdin.close)
    return server


def run_program(command, *, input="", cwd=None, env=None, timeout=300):
    """Run a Python program, given as [interpreter, file, *arguments], to its end.

    With another environment it is a process of its own. With this one it is a fork of a process that has imported JAX
    and PyTorch; see fork_server.py.

    Returns:
        subprocess.CompletedProcess, with texts.
    """
    if env is not None or command[0] != sys.executable or not hasattr(os, "fork"):
        return subprocess.run(command, capture_output=True, text=True, input=input, cwd=cwd, env=env, timeout=timeout)
    with tempfile.TemporaryDirectory() as folder:
        files = {name: os.path.join(folder, name) for name in ("stdin", "stdout", "stderr")}
        for path in files.values():
            Path(path).write_text(input if path == files["stdin"] else "", encoding="utf-8")
        request = {"argv": list(map(str, command[1:])), "cwd": str(cwd or Path.cwd()), "timeout": timeout, **files}
        request["env"] = dict(os.environ)  # a test may have changed it since the server started
        server = _server()
        print(json.dumps(request), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        out, err = (Path(files[name]).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(command, status, out, err)


def run_script(name, *arguments, **options):
    return run_program(command(name, *arguments), **options)


def metrics(folder, after=-1):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in lines if entry["step"] > after]
