"""Summaries of run folders: how far each run got, its best loss, its size, and how runs differ in their settings."""

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from parity.errors import InputError
from parity.storage.json import as_object, get_entry, parse, read_object
from parity.training import checkpoints
from parity.training.run_config import flatten
from parity.training.runs import RunFolder

# What reading a damaged file can raise.
_DAMAGE = (InputError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


@dataclasses.dataclass
class RunSummary:
    """The facts that the files of a run record."""

    name: str
    path: str
    time: float
    """When the run was last written to, in seconds since 1970."""
    size: int
    """Bytes on disk."""
    state: str = "damaged"
    """finished; stopped (the newest checkpoint is of the last step, so resuming repeats nothing); unfinished (still
    running, or killed between two checkpoints); damaged."""
    problem: str = ""
    """Description of the damage; empty if there is none."""
    preset: str | None = None
    backend: str | None = None
    steps: int | None = None
    planned_steps: int | None = None
    best_loss: float | None = None
    """Lowest validation loss, in nats per token."""
    best_step: int | None = None


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """Return the run folders among `folders` and directly inside them.

    Raises:
        InputError: For a path that is not a folder.
    """
    runs = []
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder; name a run folder, or a folder of runs")
        inside = [folder] if _is_run(folder) else [path for path in sorted(folder.iterdir()) if _is_run(path)]
        runs += inside
    return runs


def summarize(folder: Path) -> RunSummary:
    """Return the summary of a run; a damaged run gets the state `damaged`, never an exception."""
    size, time = _size_and_time(folder)
    summary = RunSummary(folder.resolve().name, str(folder), time, size)
    try:
        _read(RunFolder(folder, writes=True), summary)
    except _DAMAGE as error:
        summary.state, summary.problem = "damaged", str(error).splitlines()[0] if str(error) else type(error).__name__
    return summary


def differences(folders: Sequence[Path]) -> dict[str, list[Any]]:
    """Return the settings in which runs differ, {key: [value of each run]}; a setting that a run lacks is None.

    Raises:
        InputError: For a run whose config.json cannot be read.
    """
    configs = []
    for folder in folders:
        try:
            configs.append(dict(flatten(RunFolder(folder).config())))
        except _DAMAGE as error:
            raise InputError(f"{folder}: its config.json cannot be read ({error})") from None
    keys = dict.fromkeys(key for config in configs for key in config)
    values = {key: [config.get(key) for config in configs] for key in keys}
    return {key: row for key, row in values.items() if any(value != row[0] for value in row)}


def _is_run(path: Path) -> bool:
    return path.is_dir() and any((path / name).exists() for name in ("config.json", "metrics.jsonl", "checkpoints"))


def _size_and_time(folder: Path) -> tuple[int, float]:
    size, time = 0, folder.stat().st_mtime
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.lstat(os.path.join(parent, name))
            except OSError:  # deleted in the meantime, by a run that is still running
                continue
            size, time = size + status.st_size, max(time, status.st_mtime)
    return size, time


def _read(run: RunFolder, summary: RunSummary) -> None:
    config = run.config()
    summary.preset, summary.planned_steps = str(config["preset"]), int(config["train"]["steps"])
    environment = run.path / "env.json"
    if environment.exists():
        summary.backend = get_entry(read_object(environment), "backend", str, environment.name)
    summary.steps = 0
    for entry in _metrics(run.metrics_file):
        summary.steps = max(summary.steps, int(entry["step"]))
        loss = entry.get("validation_loss")
        if loss is not None and math.isfinite(loss) and (summary.best_loss is None or loss < summary.best_loss):
            summary.best_loss, summary.best_step = float(loss), int(entry["step"])
    saved = checkpoints.steps(run.checkpoints)
    for step in saved:
        if not (checkpoints.step_folder(run.checkpoints, step) / checkpoints.MANIFEST).is_file():
            raise InputError(f"the checkpoint of step {step} has no {checkpoints.MANIFEST}")
    newest = saved[-1] if saved else None
    if newest != summary.steps:
        summary.state = "unfinished"
    else:
        summary.state = "finished" if newest >= summary.planned_steps else "stopped"


def _metrics(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the evaluations and the last complete entry of metrics.jsonl, without parsing the other lines."""
    if not file.exists():
        return
    last = b""
    with file.open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):  # a crash can leave an incomplete last line
                last = line
                if b'"validation_loss"' in line:
                    yield as_object(parse(line, file.name, strict=False), file.name)
    if last:
        yield as_object(parse(last, file.name, strict=False), file.name)
