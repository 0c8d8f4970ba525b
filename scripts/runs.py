"""List training runs, and show in which settings they differ.

    python scripts/runs.py                                  # all runs in runs/, the newest first
    python scripts/runs.py runs other/runs --sort loss      # the lowest validation loss first
    python scripts/runs.py --compare runs/A runs/B          # the settings in which these runs differ
    python scripts/runs.py --json                           # for other programs

The state of a run is finished, stopped (its last step is in a checkpoint, so resuming repeats nothing), unfinished
(still running, or killed between two checkpoints) or damaged.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.table import Table

from parity.cli import parse
from parity.console import PlainConsole
from parity.errors import InputError, exit_with_message
from parity.training.run_list import RunSummary, differences, find_runs, summarize

_ORDER: dict[str, Callable[[RunSummary], Any]] = {
    "time": lambda run: -run.time,
    "name": lambda run: run.name,
    "loss": lambda run: math.inf if run.best_loss is None else run.best_loss,
    "steps": lambda run: -(run.steps or 0),
    "size": lambda run: -run.size,
}


@dataclasses.dataclass(frozen=True)
class Args:
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[FOLDER ...]")] = (Path("runs"),)
    """Run folders, and folders that contain runs."""
    sort: Literal["time", "name", "loss", "steps", "size"] = "time"
    """Order of the list: newest, by name, lowest validation loss, most steps or largest first."""
    compare: bool = False
    """Instead of the list, print the settings in which the runs differ."""
    json: bool = False
    """Print JSON instead of a table."""


def main() -> None:
    args = parse(Args, __doc__)
    console = PlainConsole(width=None if sys.stdout.isatty() else 200)
    if args.compare and args.sort != "time":
        raise InputError("--sort orders the list of runs; --compare shows them in the order in which they are given")
    folders = find_runs(args.folders)
    if args.compare:
        _compare(folders, args.json, console)
        return
    runs = sorted(map(summarize, folders), key=_ORDER[args.sort])
    if args.json:
        sys.stdout.write(json.dumps([dataclasses.asdict(run) for run in runs], indent=1) + "\n")
        return
    table = Table("name", "preset", "backend", "state", "steps", "best loss", "at step", "size", "last written")
    for run in runs:
        table.add_row(
            run.name,
            run.preset or "",
            run.backend or "",
            f"{run.state}: {run.problem}" if run.problem else run.state,
            "" if run.steps is None else f"{run.steps:,} of {run.planned_steps:,}",
            "" if run.best_loss is None else f"{run.best_loss:.4f}",
            "" if run.best_step is None else f"{run.best_step:,}",
            f"{run.size / 1e6:,.1f} MB",
            f"{datetime.fromtimestamp(run.time):%Y-%m-%d %H:%M}",
        )
    console.print(table)


def _compare(folders: list[Path], as_json: bool, console: PlainConsole) -> None:
    if len(folders) < 2:
        raise InputError(f"--compare needs two or more runs, got {len(folders)}")
    rows = differences(folders)
    if as_json:
        names = [str(folder) for folder in folders]
        entries = {key: dict(zip(names, values, strict=True)) for key, values in rows.items()}
        sys.stdout.write(json.dumps(entries, indent=1) + "\n")
        return
    if not rows:
        console.print("the runs have the same settings")
        return
    table = Table("setting", *(folder.resolve().name for folder in folders))
    for key, values in rows.items():
        table.add_row(key, *map(str, values))
    console.print(table)


if __name__ == "__main__":
    with exit_with_message():
        main()
