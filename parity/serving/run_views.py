"""Runs as the page shows them: the list, loss curves, checkpoints and samples of a run folder."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parity.config import GPTConfig
from parity.data.tokenizer import Tokenizer
from parity.errors import InputError
from parity.training import checkpoints
from parity.training.metrics import Metrics
from parity.training.run_list import find_runs, summarize
from parity.training.runs import RunFolder, read_run

_MOST_SAMPLED = 200  # steps whose samples are shown, the newest ones


def list_runs(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the summaries of all runs in the folders, the newest first."""
    entries = [dataclasses.asdict(summarize(folder)) for folder in _folders(folders)]
    return [{key: _json(value) for key, value in entry.items()} for entry in sorted(entries, key=lambda e: -e["time"])]


def find_run(folders: Sequence[Path], path: str) -> Path:
    """Return the run folder that list_runs() calls `path`; raise InputError for any other folder."""
    for folder in _folders(folders):
        if str(folder) == path:
            return folder
    raise InputError(f"there is no run {path!r:.200}; reload the list of runs")


def _folders(folders: Sequence[Path]) -> list[Path]:
    """Each run once, even if it was named and is inside a folder of runs; a folder that does not exist has none."""
    found = find_runs([folder for folder in folders if folder.is_dir()])
    return list({folder.resolve(): folder for folder in reversed(found)}.values())


def checkpoint(folder: Path, step: int, config: GPTConfig, tokenizer: Tokenizer) -> Path:
    """Return the folder of an intact checkpoint for the model that is served; raises InputError for another model."""
    saved = read_run(RunFolder(folder))
    if dataclasses.replace(saved.model, drop_rate=config.drop_rate) != config or (
        saved.settings.tokenizer != tokenizer.name
    ):
        raise InputError(
            f"{folder.name} has a model of another shape or tokenizer than the one that is served; start the server "
            f"with --run {folder}"
        )
    return RunFolder(folder).intact(step)


def run_version(folder: Path) -> str:
    """Return a text that changes whenever the run has logged or saved something."""
    parts = []
    for name in ("metrics.jsonl", "samples.txt", "checkpoints"):
        try:
            status = (folder / name).stat()
            parts.append(f"{status.st_size}.{status.st_mtime_ns}")
        except OSError:
            parts.append("-")
    return "/".join(parts)


def describe_run(folder: Path) -> dict[str, Any]:
    """Return curves, checkpoints and samples of a run."""
    run = RunFolder(folder)
    metrics = Metrics(run.metrics_file)
    samples: dict[int, list[str]] = {}
    for step, text in run.samples() if run.samples_file.exists() else []:
        samples.setdefault(step, []).append(text.rstrip("\n"))
    return {
        "version": run_version(folder),
        "summary": {key: _json(value) for key, value in dataclasses.asdict(summarize(folder)).items()},
        "training": metrics.curve,
        "validation": sorted(metrics.evaluations.items()),
        "skipped": sorted(metrics.nonfinite),
        "best_step": metrics.best_step(),
        "checkpoints": checkpoints.steps(run.checkpoints),
        "samples": [{"step": step, "texts": texts} for step, texts in sorted(samples.items())[-_MOST_SAMPLED:]],
    }


def _json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
