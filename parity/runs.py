"""The folder that a run leaves: config.json, metrics.jsonl, loss.png, samples.txt, checkpoints/."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from parity.config import GPTConfig
from parity.errors import InputError
from parity.settings import TrainSettings


@dataclasses.dataclass(frozen=True)
class RunFolder:
    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def config_file(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    def create(self, entries: Mapping[str, Any]) -> None:
        """Make the folder with its config.json; raises InputError where a run is already there."""
        if self.config_file.exists():
            raise InputError(f"{self.path} already holds a run; continue it with --resume, or name another --run")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _replace(self.config_file, json.dumps(entries, indent=2) + "\n")
            self.metrics_file.write_text("")
        except OSError as error:
            raise InputError(f"run folder {self.path} cannot be written ({error})") from None

    def config(self) -> dict[str, Any]:
        """What create() was given; raises InputError where the folder holds no run."""
        try:
            return json.loads(self.config_file.read_text())
        except FileNotFoundError:
            raise InputError(f"{self.path} holds no run: {self.config_file.name} is missing") from None
        except ValueError as error:
            raise InputError(f"{self.config_file} is not valid JSON ({error})") from None

    def require(self, entries: Mapping[str, Any]) -> None:
        """Raise InputError, listing what differs, unless the run was made with these entries."""
        saved, wanted = (dict(_flatten(json.loads(json.dumps(e)))) for e in (self.config(), entries))
        different = [
            f"{key} is {saved.get(key)!r} there, {wanted.get(key)!r} here"
            for key in sorted(saved.keys() | wanted.keys())
            if saved.get(key) != wanted.get(key)
        ]
        if different:
            raise InputError(f"{self.path} belongs to another configuration: {'; '.join(different)}")

    def log(self, entries: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(entries) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        lines = self.metrics_file.read_text().splitlines() if self.metrics_file.exists() else []
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except ValueError:
                break  # a line cut by a crash; resuming writes it again
        return found

    def forget_after(self, step: int) -> None:
        """Drop the metrics of later steps: a resumed run writes them again."""
        kept = [entry for entry in self.metrics() if entry["step"] <= step]
        _replace(self.metrics_file, "".join(json.dumps(entry) + "\n" for entry in kept))

    def add_sample(self, step: int, text: str) -> None:
        with (self.path / "samples.txt").open("a", encoding="utf-8") as file:
            file.write(f"--- step {step} ---\n{text}\n\n")

    def plot(self, bigram: float | None) -> Path:
        target = self.path / "loss.png"
        plot_losses(target, self.metrics(), bigram)
        return target


def run_config(
    preset: str, model: GPTConfig, settings: TrainSettings, corpus_sha256: str, backend: str
) -> dict[str, Any]:
    """The entries of config.json."""
    return {
        "preset": preset,
        "backend": backend,
        "corpus_sha256": corpus_sha256,
        "model": model.to_dict(),
        "train": dataclasses.asdict(settings),
    }


def plot_losses(target: Path, metrics: Sequence[Mapping[str, Any]], bigram: float | None = None) -> None:
    """Picture of training and validation loss by step, from lines of metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for key, style in (("loss", {"alpha": 0.6}), ("validation_loss", {"marker": "o", "markersize": 3})):
        points = [(entry["step"], entry[key]) for entry in metrics if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label="training" if key == "loss" else "validation", **style)
    if bigram is not None:
        axes.axhline(bigram, linestyle="--", color="gray", label=f"bigram {bigram:.2f}")
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    part = target.with_suffix(".part.png")
    figure.savefig(part, dpi=120)
    plt.close(figure)
    part.replace(target)


def _flatten(entries: Mapping[str, Any], prefix: str = ""):
    for key, value in entries.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _replace(target: Path, text: str) -> None:
    part = target.with_suffix(target.suffix + ".part")
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(target)
