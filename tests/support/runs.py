"""Run scripts as a user runs them, and read the files that they write."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def command(name, *arguments):
    return [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]


def run_script(name, *arguments, **options):
    return subprocess.run(command(name, *arguments), capture_output=True, text=True, timeout=300, **options)


def metrics(folder, after=-1):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in lines if entry["step"] > after]
