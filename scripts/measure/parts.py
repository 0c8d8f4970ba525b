"""Parts of a long check: commands in processes of their own, each part with a deadline, and a report after each."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

ROOT = Path(__file__).parents[2]
Status = Literal["passed", "measured", "failed", "timed out"]


class Command(NamedTuple):
    """A Python program with its arguments: a script of this project, or -m and a module."""

    arguments: Sequence[str]
    environment: Mapping[str, str] = {}


class Outcome(NamedTuple):
    """What a part found."""

    status: Status
    lines: Sequence[str]
    """Sentences for a reader."""
    data: Mapping[str, Any] = {}
    """Figures for results.json."""
    markdown: str = ""
    """Tables for results.md."""


class Part(NamedTuple):
    """Commands, and what the files that they write say."""

    name: str
    share: float
    """Time that the part may take, relative to that of the others."""
    stages: Sequence[Sequence[Command]]
    """Commands of one stage run at the same time; the stages run one after another."""
    summarize: Callable[[Path, Sequence[int | None]], Outcome]
    """Called with the part's folder and the exit status of each command, None if it was killed at the deadline."""


@dataclasses.dataclass(frozen=True)
class Result:
    """A part that has been run."""

    name: str
    seconds: float
    outcome: Outcome

    def to_json(self) -> dict[str, Any]:
        status, lines, data, _ = self.outcome
        return {"name": self.name, "status": status, "seconds": self.seconds, "lines": list(lines), **data}


def run_parts(parts: Sequence[Part], folder: Path, budget: float) -> Iterator[Result]:
    """Run all parts within `budget` seconds, whatever becomes of the earlier ones.

    The time that is left is divided by the shares of the parts that are left, so what one part saves goes to the
    later ones.
    """
    end = time.monotonic() + budget
    for number, part in enumerate(parts):
        shares = sum(later.share for later in parts[number:])
        begin = time.monotonic()
        outcome = run_part(part, folder / part.name.replace(" ", "-"), (end - begin) * part.share / shares)
        yield Result(part.name, time.monotonic() - begin, outcome)


def run_part(part: Part, folder: Path, seconds: float) -> Outcome:
    """Run the commands of a part in its folder, which is made; return what they found, or why that is not known."""
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    statuses: list[int | None] = []
    for stage in part.stages:
        logs = [log_file(folder, len(statuses) + number) for number in range(len(stage))]
        statuses += run_stage(stage, logs, end)
    try:
        outcome = part.summarize(folder, statuses)
    except Exception as error:  # a command that failed has not written what is summarized
        outcome = failure(error)
    if None in statuses:
        return outcome._replace(status="timed out", lines=[f"stopped after {seconds:.0f} s", *outcome.lines])
    if outcome.status == "failed":
        ends = dict.fromkeys(line for n in range(len(statuses)) for line in _last_lines(log_file(folder, n)))
        return outcome._replace(lines=[*outcome.lines, *ends])
    return outcome


def failure(error: Exception) -> Outcome:
    """Return the outcome of a part whose files cannot be read."""
    if isinstance(error, FileNotFoundError):
        return Outcome("failed", [f"nothing was written to {error.filename}"])
    return Outcome("failed", [f"{type(error).__name__}: {error}"])


def log_file(folder: Path, number: int = 0) -> Path:
    """Return the file with everything that a command of a part printed."""
    return folder / f"log-{number}.txt"


def run_stage(commands: Sequence[Command], logs: Sequence[Path], end: float) -> list[int | None]:
    """Run commands at the same time; kill those that have not ended at the time `end`, with all their processes.

    Returns:
        The exit status of each command, None for those that were killed.
    """
    processes = []
    paths = (str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH"))
    path = os.pathsep.join(filter(None, paths))
    try:
        for command, file in zip(commands, logs, strict=True):
            with open(file, "wb") as log:
                process = subprocess.Popen(
                    [sys.executable, *command.arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "PYTHONPATH": path, **command.environment},
                    start_new_session=True,  # so that the processes it starts can be killed with it
                )
            processes.append(process)
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
        return [process.returncode for process in processes]
    finally:
        for process in processes:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _last_lines(log: Path, count: int = 8) -> list[str]:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line[:300] for line in lines if line.strip()][-count:]


def write_results(folder: Path, facts: Mapping[str, str], results: Sequence[Result]) -> None:
    """Write results.json and results.md."""
    entries = {**facts, "parts": [result.to_json() for result in results]}
    (folder / "results.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    lines = [f"# {facts['card']}", "", *(f"- {name}: {text}" for name, text in facts.items() if name != "card"), ""]
    lines += ["| part | result | s | |", "|---|---|---|---|"]
    for result in results:
        text = "<br>".join(line.replace("|", "\\|") for line in result.outcome.lines)
        lines.append(f"| {result.name} | {result.outcome.status} | {result.seconds:.0f} | {text} |")
    tables = [result.outcome.markdown for result in results if result.outcome.markdown]
    (folder / "results.md").write_text("\n".join([*lines, "", *tables]) + "\n", encoding="utf-8")
