"""Run a script that sends itself a signal at a chosen moment, so that no test depends on timing.

    python interrupting.py SIGTERM parity.training.runs:RunFolder.log:3 scripts/train_jax.py ARGUMENTS

The signal is sent when the function is called for the third time, before it runs.
"""

import functools
import importlib
import os
import runpy
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def interrupted(number, moment, name, *arguments):
    """Return the command that runs the script `name` and sends it the signal `number` at `moment`."""
    return [sys.executable, __file__, number.name, moment, str(ROOT / "scripts" / name), *map(str, arguments)]


def send_at(number, moment):
    module, path, count = moment.split(":")
    *classes, name = path.split(".")
    owner = functools.reduce(getattr, classes, importlib.import_module(module))
    function = getattr(owner, name)
    calls = 0

    @functools.wraps(function)
    def wrapper(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == int(count):
            os.kill(os.getpid(), number)
        return function(*arguments, **options)

    setattr(owner, name, wrapper)


if __name__ == "__main__":
    number, moment, *sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    send_at(signal.Signals[number], moment)
    runpy.run_path(sys.argv[0], run_name="__main__")
