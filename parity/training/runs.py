"""The folder of a run: config.json, env.json, metrics.jsonl, loss.png, samples.txt and checkpoints/."""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from parity.config import GPTConfig
from parity.errors import InputError
from parity.figures import new_figure
from parity.storage.atomic import replace_text
from parity.training.settings import TrainSettings

_SAMPLE_HEADING = re.compile(r"^--- step (\d+) ---\n", re.MULTILINE)
# Keys of config.json before version 0.2, and settings that it did not have, with the values that were used.
_RENAMED = {"initial": "init_scheme", "validation_part": "validation_fraction"}
_FORMER_VALUES = {"sample_temperature": 0.8, "sample_top_k": 50}


class RunFolder:
    """The folder of a run, and what is written into it.

    Args:
        path: The folder.
        writes: Whether this process writes the folder. In a run of several processes only the first one does. The
            others read the metrics once, here, and from then on keep theirs in memory, so that all processes decide
            alike from `metrics`, however late a shared file system shows them what the first one wrote.
    """

    def __init__(self, path: Path, writes: bool = True):
        self.path, self.writes = path, writes
        self._in_memory = None if writes else self._read_metrics()

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def config_file(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples_file(self) -> Path:
        return self.path / "samples.txt"

    def create(self, entries: Mapping[str, Any]) -> None:
        """Make the folder with its config.json; raises InputError if it already contains a run."""
        if self._in_memory is not None:
            self._in_memory.clear()
            return
        if self.config_file.exists():
            raise InputError(f"{self.path} already holds a run; continue it with --resume, or name another --run")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.metrics_file.write_text("")
            self.write(self.config_file.name, entries)
        except OSError as error:
            raise InputError(f"run folder {self.path} cannot be written ({error})") from None

    def config(self) -> dict[str, Any]:
        """Return the entries of config.json, under today's names; raises InputError if the folder contains no run."""
        try:
            return _with_current_names(json.loads(self.config_file.read_text()))
        except FileNotFoundError:
            raise InputError(f"{self.path} holds no run: {self.config_file.name} is missing") from None
        except ValueError as error:
            raise InputError(f"{self.config_file} is not valid JSON ({error})") from None

    def update(self, entries: Mapping[str, Any], changeable: Sequence[str] = ()) -> list[str]:
        """Replace the entries of config.json when a run is resumed.

        Args:
            entries: The new entries.
            changeable: Flattened keys ("train.keep") whose values may differ from the saved ones.

        Returns:
            One description per changed value.

        Raises:
            InputError: If any other value differs; the message lists all of them.
        """
        saved, new = (dict(_flatten(json.loads(json.dumps(e)))) for e in (self.config(), entries))
        different = {
            key: f"{key} is {saved.get(key)!r} there, {new.get(key)!r} here"
            for key in sorted(saved.keys() | new.keys())
            if saved.get(key) != new.get(key)
        }
        if refused := [text for key, text in different.items() if key not in changeable]:
            raise InputError(f"{self.path} belongs to another configuration: {'; '.join(refused)}")
        if different:
            self.write(self.config_file.name, entries)
        return list(different.values())

    def log(self, entries: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        if self._in_memory is not None:
            self._in_memory.append(dict(entries))
            return
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(entries) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl."""
        return self._read_metrics() if self._in_memory is None else list(self._in_memory)

    def _read_metrics(self) -> list[dict[str, Any]]:
        lines = self.metrics_file.read_text().splitlines() if self.metrics_file.exists() else []
        metrics = []
        for line in lines:
            try:
                metrics.append(json.loads(line))
            except ValueError:
                break  # a crash cut this line; the resumed run writes it again
        return metrics

    def forget_after(self, step: int) -> None:
        """Remove the metrics and samples of later steps, because a resumed run writes them again."""
        kept = [entry for entry in self.metrics() if entry["step"] <= step]
        if self._in_memory is not None:
            self._in_memory = kept
            return
        replace_text(self.metrics_file, "".join(json.dumps(entry) + "\n" for entry in kept))
        if self.samples_file.exists():
            text = self.samples_file.read_text(encoding="utf-8", errors="replace")
            parts = re.split(_SAMPLE_HEADING, text)[1:]  # step, text, step, text, ...
            kept_parts = [(s, t) for s, t in zip(parts[::2], parts[1::2], strict=True) if int(s) <= step]
            replace_text(self.samples_file, "".join(f"--- step {s} ---\n{t}" for s, t in kept_parts))

    def best_step(self) -> int | None:
        """Return the evaluated step with the lowest validation loss; ties go to the earliest step."""
        evaluated = [(e["validation_loss"], e["step"]) for e in self.metrics() if "validation_loss" in e]
        return min(evaluated)[1] if evaluated else None

    def add_sample(self, step: int, text: str) -> None:
        """Append a sample to samples.txt."""
        if self.writes:
            with self.samples_file.open("a", encoding="utf-8") as file:
                file.write(f"--- step {step} ---\n{text}\n\n")

    def write(self, name: str, entries: Mapping[str, Any]) -> Path:
        """Write a JSON file atomically, and return its path."""
        if self.writes:
            replace_text(self.path / name, json.dumps(entries, indent=2) + "\n")
        return self.path / name

    def plot(self, bigram: float | None) -> None:
        """Draw loss.png from the metrics; `bigram` is the baseline's validation loss."""
        if self.writes:
            plot_metrics(self.path / "loss.png", self.metrics(), bigram)


class SavedRun(NamedTuple):
    """What config.json records of a run."""

    preset: str
    init_from: str | None
    model: GPTConfig
    settings: TrainSettings


def run_config(
    preset: str, model: GPTConfig, settings: TrainSettings, corpus_sha256: str, init_from: str | None = None
) -> dict[str, Any]:
    """Return the entries of config.json."""
    return {
        "preset": preset,
        "init_from": init_from,
        "corpus_sha256": corpus_sha256,
        "model": model.to_dict(),
        "train": dataclasses.asdict(settings),
    }


def read_run(run: RunFolder) -> SavedRun:
    """Read config.json of a run; raises InputError if its entries are not those of a training run."""
    saved = run.config()
    try:
        model, settings = GPTConfig(**saved["model"]), TrainSettings(**saved["train"])
        return SavedRun(saved["preset"], saved["init_from"], model, settings)
    except (KeyError, TypeError) as error:
        raise InputError(f"{run.config_file} was not written by this version of the scripts ({error})") from None


def plot_metrics(target: Path, metrics: Sequence[Mapping[str, Any]], bigram: float | None = None) -> None:
    """Draw training and validation loss by step.

    Args:
        target: The PNG file to write.
        metrics: Lines of metrics.jsonl.
        bigram: Validation loss of the baseline, drawn as a horizontal line.
    """
    figure = new_figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, style in (("loss", {"alpha": 0.6}), ("validation_loss", {"marker": "o", "markersize": 3})):
        points = [(entry["step"], entry[key]) for entry in metrics if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label="training" if key == "loss" else "validation", **style)
    if bigram is not None:
        axes.axhline(bigram, linestyle="--", color="gray", label=f"bigram {bigram:.2f}")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    part = target.with_suffix(".part.png")
    figure.savefig(part, dpi=120)
    part.replace(target)


def _with_current_names(entries: dict[str, Any]) -> dict[str, Any]:
    """Translate the config.json of an older version."""
    if isinstance(entries, dict) and isinstance(entries.get("train"), dict):
        train = {_RENAMED.get(name, name): value for name, value in entries["train"].items()}
        entries["train"] = {**_FORMER_VALUES, **train}
        entries["init_from"] = entries.pop("init", entries.get("init_from"))
    return entries


def _flatten(entries: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in entries.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
