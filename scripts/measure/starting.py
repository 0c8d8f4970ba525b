"""Whole processes of the scripts, from their start to their end, with the compilation cache that users have."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from measure.timing import Workload
from parity.errors import InputError

# Variables by which the other benchmarks choose a cache.
_CACHE = {"JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"}


def script(folder: Path, name: str, arguments: Sequence[str]) -> Workload:
    """Run a script in a folder, in which its cache folder is as well; a run folder of an earlier call is deleted."""
    environment = {variable: value for variable, value in os.environ.items() if variable not in _CACHE}
    environment["GPT_PARITY_CACHE"] = str(folder / "cache")
    program = [sys.executable, str(Path(__file__).parents[1] / name), *arguments]
    if name.startswith("train"):
        shutil.rmtree(folder / "run", ignore_errors=True)

    def call() -> None:
        done = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise InputError(f"{name} failed: {done.stderr[-500:]}")

    return Workload(call, lambda: 0, os.environ["MEASURE_ON"])
