"""The folder that a run leaves: config.json, env.json, metrics.jsonl, loss.png, samples.txt, checkpoints/."""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from parity.config import GPTConfig
from parity.errors import InputError
from parity.storage.atomic import replace_text
from parity.training.settings import TrainSettings

_SAMPLE_HEADING = re.compile(r"^--- step (\d+) ---\n", re.MULTILINE)


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

    @property
    def samples_file(self) -> Path:
        return self.path / "samples.txt"

    def create(self, entries: Mapping[str, Any]) -> None:
        """Make the folder with its config.json; raises InputError where a run is already there."""
        if self.config_file.exists():
            raise InputError(f"{self.path} already holds a run; continue it with --resume, or name another --run")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.metrics_file.write_text("")
            self.write(self.config_file.name, entries)
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

    def update(self, entries: Mapping[str, Any], changeable: Sequence[str] = ()) -> list[str]:
        """Take over entries for a run that goes on; what changed, in words.

        Raises InputError, listing what differs, for changes in any but the `changeable` keys.
        """
        saved, wanted = (dict(_flatten(json.loads(json.dumps(e)))) for e in (self.config(), entries))
        different = {
            key: f"{key} is {saved.get(key)!r} there, {wanted.get(key)!r} here"
            for key in sorted(saved.keys() | wanted.keys())
            if saved.get(key) != wanted.get(key)
        }
        if refused := [text for key, text in different.items() if key not in changeable]:
            raise InputError(f"{self.path} belongs to another configuration: {'; '.join(refused)}")
        if different:
            self.write(self.config_file.name, entries)
        return list(different.values())

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
        """Drop the metrics and samples of later steps: a resumed run writes them again."""
        kept = [entry for entry in self.metrics() if entry["step"] <= step]
        replace_text(self.metrics_file, "".join(json.dumps(entry) + "\n" for entry in kept))
        if self.samples_file.exists():
            text = self.samples_file.read_text(encoding="utf-8", errors="replace")
            parts = re.split(_SAMPLE_HEADING, text)[1:]  # step, text, step, text, ...
            kept_parts = [(s, t) for s, t in zip(parts[::2], parts[1::2], strict=True) if int(s) <= step]
            replace_text(self.samples_file, "".join(f"--- step {s} ---\n{t}" for s, t in kept_parts))

    def best_step(self) -> int | None:
        """The evaluated step with the lowest validation loss; the first of equals."""
        evaluated = [(e["validation_loss"], e["step"]) for e in self.metrics() if "validation_loss" in e]
        return min(evaluated)[1] if evaluated else None

    def add_sample(self, step: int, text: str) -> None:
        with self.samples_file.open("a", encoding="utf-8") as file:
            file.write(f"--- step {step} ---\n{text}\n\n")

    def write(self, name: str, entries: Mapping[str, Any]) -> Path:
        """Write a JSON file of the folder, whole or not at all."""
        replace_text(self.path / name, json.dumps(entries, indent=2) + "\n")
        return self.path / name

    def plot(self, bigram: float | None) -> Path:
        target = self.path / "loss.png"
        plot_metrics(target, self.metrics(), bigram)
        return target


class FollowedRun(RunFolder):
    """A run folder as all processes but the first have it: they read it once, and keep in memory what they'd write.

    So all of them decide alike by metrics(), however late the storage shows them what the first one wrote.
    """

    @functools.cached_property
    def _entries(self) -> list[dict[str, Any]]:
        return super().metrics()

    def create(self, entries: Mapping[str, Any]) -> None:
        self._entries.clear()

    def log(self, entries: Mapping[str, Any]) -> None:
        self._entries.append(dict(entries))

    def metrics(self) -> list[dict[str, Any]]:
        return self._entries

    def forget_after(self, step: int) -> None:
        self._entries[:] = [entry for entry in self._entries if entry["step"] <= step]

    def add_sample(self, step: int, text: str) -> None:
        pass

    def write(self, name: str, entries: Mapping[str, Any]) -> Path:
        return self.path / name

    def plot(self, bigram: float | None) -> Path:
        return self.path / "loss.png"


def run_config(
    preset: str, model: GPTConfig, settings: TrainSettings, corpus_sha256: str, init: str | None = None
) -> dict[str, Any]:
    """The entries of config.json."""
    return {
        "preset": preset,
        "init": init,
        "corpus_sha256": corpus_sha256,
        "model": model.to_dict(),
        "train": dataclasses.asdict(settings),
    }


def saved_job(run: RunFolder) -> tuple[GPTConfig, TrainSettings, dict[str, Any]]:
    """Configuration and settings in a run's config.json, and all of it."""
    saved = run.config()
    try:
        return GPTConfig(**saved["model"]), TrainSettings(**saved["train"]), {"init": None, **saved}
    except (KeyError, TypeError) as error:
        raise InputError(f"{run.config_file} was not written by this version of the scripts ({error})") from None


def plot_metrics(target: Path, metrics: Sequence[Mapping[str, Any]], bigram: float | None = None) -> None:
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
