"""metrics.jsonl of a run: appended to while training, and summarized in memory of constant size."""

import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from parity.errors import InputError
from parity.figures import new_figure
from parity.storage.atomic import named_errors, sync
from parity.storage.json import as_object, parse

_MOST_POINTS = 4096
"""Number of points of the training curve that are kept; of a longer run, every second, fourth, ... step is."""


class Metrics:
    """The metrics of a run.

    All processes of a run keep the same summary, so that they decide alike from it; the first one also writes the file.

    Args:
        file: metrics.jsonl, which is read once, here.
        writes: Whether this process writes the file.
    """

    def __init__(self, file: Path, writes: bool = True):
        self.file, self._writes = file, writes
        self._clear()
        for _, entry in self._lines():
            if entry is not None:
                self._count(entry)

    def _clear(self) -> None:
        self.evaluations: dict[int, float] = {}
        """{step: validation loss in nats per token}."""
        self.nonfinite: set[int] = set()
        """Steps that were skipped because their loss or gradient was not finite."""
        self.last_step = -1
        """Largest step in the file; -1 if there is none."""
        self.curve: list[tuple[int, float]] = []
        """(step, training loss in nats per token) of at most 4,096 steps."""
        self._stride = 1
        self._hash, self._size = hashlib.sha256(), 0

    def log(self, entries: Mapping[str, Any]) -> None:
        """Append one line."""
        self._count(entries)
        if not self._writes:
            return
        line = (json.dumps(entries) + "\n").encode()
        with named_errors(self.file), self.file.open("ab") as file:
            file.write(line)
        self._hash.update(line)
        self._size += len(line)

    def flush(self) -> tuple[int, str]:
        """Flush the file to disk; return its size and sha256, which a checkpoint's manifest records."""
        if self._writes and self.file.exists():
            sync(self.file)
        return self._size, self._hash.hexdigest()

    def best_step(self, last: float = math.inf) -> int | None:
        """Return the evaluated step, up to `last`, with the lowest validation loss; ties go to the earliest step."""
        evaluated = [(loss, step) for step, loss in self.evaluations.items() if step <= last]
        return min(evaluated)[1] if evaluated else None

    def forget_after(self, step: int, saved: tuple[int, str] | None = None) -> None:
        """Remove the lines of later steps, because a resumed run writes them again.

        If a line is damaged, or the file is not the one that belongs to the checkpoint, a warning says so, and a copy
        of the file is kept as metrics.jsonl.damaged.

        Args:
            step: The step of the checkpoint that the run resumes from; -1 removes all lines.
            saved: Size and sha256 of the file when that checkpoint was saved, if the manifest records them.
        """
        if not self._writes:  # the file may be rewritten at this moment
            self.evaluations = {number: loss for number, loss in self.evaluations.items() if number <= step}
            self.nonfinite = {number for number in self.nonfinite if number <= step}
            return
        self._clear()
        part = self.file.with_name(self.file.name + ".part")
        damaged, logged = [], bytearray(step + 1)
        with named_errors(part), part.open("wb") as kept:
            for number, (line, entry) in enumerate(self._lines(), 1):
                if entry is None:
                    damaged.append(number)
                elif entry["step"] <= step:
                    self._count(entry)
                    logged[entry["step"]] = 1
                    kept.write(line)
                    self._hash.update(line)
                    self._size += len(line)
            kept.flush()
            os.fsync(kept.fileno())
        problems = []
        if damaged:
            problems.append(f"damaged lines ({_numbers(damaged)}) are left out")
        if missing := [number for number in range(1, step + 1) if not logged[number]]:
            problems.append(f"the lines of steps {_numbers(missing)} are missing")
        if saved is not None and not problems and saved != (self._size, self._hash.hexdigest()):
            problems.append(f"its lines are not those that it had when the checkpoint of step {step} was saved")
        if problems:
            copy = self.file.with_name(self.file.name + ".damaged")
            if self.file.exists():
                shutil.copyfile(self.file, copy)
            warnings.warn(f"{self.file}: {'; '.join(problems)}; the file as it was is {copy.name}", stacklevel=2)
        part.replace(self.file)

    def plot(self, target: Path, bigram: float | None = None, unit: str = "token") -> None:
        """Draw training and validation loss by step.

        Args:
            target: The PNG file to write.
            bigram: Validation loss of the baseline, drawn as a horizontal line.
            unit: What the loss has one term for.
        """
        figure = new_figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        if self.curve:
            axes.plot(*zip(*self.curve, strict=True), label="training", alpha=0.6)
        if self.evaluations:
            stride = math.ceil(len(self.evaluations) / _MOST_POINTS)
            points = sorted(self.evaluations.items())
            axes.plot(*zip(*points[::-stride], strict=True), label="validation", marker="o", markersize=3)
        if bigram is not None:
            axes.axhline(bigram, linestyle="--", color="gray", label=f"bigram {bigram:.2f}")
        axes.set(xlabel="step", ylabel=f"loss (nats per {unit})")
        axes.grid(alpha=0.3)
        axes.legend()
        part = target.with_suffix(".part.png")
        figure.savefig(part, dpi=120)
        part.replace(target)

    def _count(self, entry: Mapping[str, Any]) -> None:
        step = entry["step"]
        self.last_step = max(self.last_step, step)
        if "validation_loss" in entry:
            self.evaluations[step] = entry["validation_loss"]
        elif "nonfinite" in entry:
            self.nonfinite.add(step)
        elif "loss" in entry and step % self._stride == 0:
            self.curve.append((step, entry["loss"]))
            if len(self.curve) > _MOST_POINTS:
                self._stride *= 2
                self.curve = [point for point in self.curve if point[0] % self._stride == 0]

    def _lines(self) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
        """Yield each line and its entry, None for a damaged one; without a last line that a crash cut."""
        if not self.file.exists():
            return
        with self.file.open("rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    return
                yield line, _parse(line)


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the entry of a line, or None if it is damaged."""
    try:
        entry = as_object(parse(line, "", strict=False), "")
    except InputError:
        return None
    if not _is_number(entry.get("step"), int) or not 0 <= entry["step"] < 2**31:
        return None
    losses = (entry[key] for key in ("loss", "validation_loss") if key in entry)
    return entry if all(_is_number(loss, int | float) and math.isfinite(loss) for loss in losses) else None


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _numbers(values: list[int]) -> str:
    return ", ".join(map(str, values[:5])) + f" and {len(values) - 5} others" * (len(values) > 5)
