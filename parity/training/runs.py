"""The folder of a run: config.json, env.json, metrics.jsonl, loss.png, samples.txt and checkpoints/."""

import contextlib
import functools
import hashlib
import json
import re
import uuid
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import filelock

from parity.config import GPTConfig
from parity.errors import InputError
from parity.storage.atomic import named_errors, replace_text
from parity.storage.json import read_object
from parity.storage.locks import lock_folder
from parity.training.checkpoints import RunIdentity, intact, newest_intact
from parity.training.metrics import Metrics
from parity.training.run_config import CORPUS_SAMPLES, UNRECORDED, flatten, with_current_names
from parity.training.settings import CHANGEABLE_KEYS, TrainSettings

_SAMPLE_HEADING = re.compile(r"^--- step ([0-9]{1,10}) ---\n", re.MULTILINE)


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
        self._lock: filelock.BaseFileLock | None = None
        self._created: list[Path] = []
        if not writes:
            _ = self.metrics

    @functools.cached_property
    def metrics(self) -> Metrics:
        """The metrics, read from metrics.jsonl at the first use."""
        return Metrics(self.metrics_file, self.writes)

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
        """Make the folder with its config.json, and lock it.

        Raises:
            InputError: If the folder contains a run, or a part of one, or cannot be written.
        """
        if not self.writes:
            self.metrics.forget_after(-1)
            return
        is_new = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock()
            files = (self.config_file, self.metrics_file)
            leftovers = [file.name for file in files if file.exists() and file.stat().st_size]
            if self.checkpoints.is_dir() and any(self.checkpoints.iterdir()):
                leftovers.append("checkpoints")
            if leftovers:
                raise InputError(
                    f"{self.path} already holds a run ({', '.join(leftovers)}); continue it with --resume, or name "
                    "another --run"
                )
            self._created = [*files, self.path / "env.json"]
            if is_new:
                self._created += [self.path / ".lock", self.path]
            self.metrics_file.write_text("")
            self.write(self.config_file.name, {"id": uuid.uuid4().hex, **entries})
        except OSError as error:
            raise InputError(f"run folder {self.path} cannot be written ({error})") from None

    def discard(self) -> None:
        """Delete what create() made, and release the lock: the run is refused before its first step."""
        for path in self._created:
            with contextlib.suppress(OSError):  # a folder that holds something else by now stays
                path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
        self._created = []
        self.unlock()

    def lock(self) -> None:
        """Lock the folder for this process, until unlock() or the end of the process.

        Raises:
            InputError: If another process has locked it.
        """
        if not self.writes or self._lock is not None:
            return
        self._lock = lock_folder(
            self.path, lambda: f"{self.path} is in use by {self._user()}; wait until it ends, or name another --run"
        )

    def unlock(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _user(self) -> str:
        process = self.environment().get("process")
        return "another process" if process is None else f"process {process}"

    def environment(self) -> dict[str, Any]:
        """Return the content of env.json, which is informational: nothing if it is missing or damaged."""
        try:
            return read_object(self.path / "env.json")
        except InputError:
            return {}

    def config(self) -> dict[str, Any]:
        """Return the entries of config.json, under today's names; raises InputError if the folder contains no run."""
        if not self.config_file.exists():
            raise InputError(f"{self.path} holds no run: {self.config_file.name} is missing")
        return with_current_names(read_object(self.config_file))

    def identity(self) -> RunIdentity:
        """Return what the checkpoints of this run must record."""
        entries = self.config()
        excluded = {"id", CORPUS_SAMPLES, *CHANGEABLE_KEYS}
        fixed = dict(item for item in flatten(entries) if item[0] not in excluded and item not in UNRECORDED.items())
        text = json.dumps(fixed, sort_keys=True)
        return RunIdentity(entries.get("id"), hashlib.sha256(text.encode()).hexdigest())

    def newest_intact(self) -> Path:
        """Return the newest intact checkpoint of this run; raises InputError if there is none."""
        return newest_intact(self.checkpoints, self.identity())

    def intact(self, step: int) -> Path:
        """Return the checkpoint of a step; raises InputError if it is missing, damaged, or of another run."""
        return intact(self.checkpoints, step, self.identity())

    def update(self, entries: Mapping[str, Any], changeable: Collection[str] = ()) -> list[str]:
        """Replace the entries of config.json when a run is resumed.

        Args:
            entries: The new entries.
            changeable: Flattened keys ("train.keep") whose values may differ from the saved ones.

        Returns:
            One description per changed value.

        Raises:
            InputError: If any other value differs; the message lists all of them.
        """
        config = self.config()
        if "id" in config:
            entries = {"id": config["id"], **entries}
        if entries.get(CORPUS_SAMPLES) is None:  # a corpus at an address is compared as a whole instead
            entries = {**entries, CORPUS_SAMPLES: config.get(CORPUS_SAMPLES)}
        saved, new = (dict(flatten(json.loads(json.dumps(e)))) for e in (config, entries))
        different = {
            key: f"{key} was {saved.get(key)!r} and is now {new.get(key)!r}"
            for key in sorted(saved.keys() | new.keys())
            if saved.get(key) != new.get(key) and key != CORPUS_SAMPLES
        }
        if refused := [text for key, text in different.items() if key not in changeable]:
            raise InputError(
                f"{self.path} cannot be resumed with other values: {'; '.join(refused)}. To train with them, start "
                f"a new run from its weights: --init-from {self.path}"
            )
        if config.get(CORPUS_SAMPLES) not in (None, entries.get(CORPUS_SAMPLES)):
            raise InputError(
                f"{self.path} cannot be resumed: the tokens of its corpus have changed since it began, although names "
                "and sizes of the files have not. Restore the original files, or start a new run from its weights: "
                f"--init-from {self.path}"
            )
        if different:
            self.write(self.config_file.name, entries)
        return list(different.values())

    def log(self, entries: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        self.metrics.log(entries)

    def forget_after(self, step: int, saved_metrics: tuple[int, str] | None = None) -> None:
        """Remove the metrics (see Metrics.forget_after) and samples of later steps; a resumed run writes them again."""
        self.metrics.forget_after(step, saved_metrics)
        if self.writes and self.samples_file.exists():
            kept = [(s, text) for s, text in self.samples() if s <= step]
            replace_text(self.samples_file, "".join(f"--- step {s} ---\n{text}" for s, text in kept))

    def has_samples(self, step: int) -> bool:
        """Whether samples.txt has samples of a step."""
        return self.samples_file.exists() and any(s == step for s, _ in self.samples())

    def add_samples(self, step: int, texts: Sequence[str]) -> None:
        """Append the samples of a step to samples.txt."""
        if self.writes:
            with (
                named_errors(self.samples_file),
                self.samples_file.open("a", encoding="utf-8", errors="replace") as file,
            ):
                file.write("".join(f"--- step {step} ---\n{text}\n\n" for text in texts))

    def samples(self) -> list[tuple[int, str]]:
        """Return (step, text) of all samples in samples.txt."""
        text = self.samples_file.read_bytes().decode("utf-8", errors="replace")
        parts = re.split(_SAMPLE_HEADING, text)[1:]  # step, text, step, text, ...
        return [(int(s), t) for s, t in zip(parts[::2], parts[1::2], strict=True)]

    def write(self, name: str, entries: Mapping[str, Any]) -> Path:
        """Write a JSON file atomically, and return its path."""
        if self.writes:
            replace_text(self.path / name, json.dumps(entries, indent=2) + "\n")
        return self.path / name

    def plot(self, bigram: float | None, unit: str = "token") -> None:
        """Draw loss.png from the metrics; `bigram` is the baseline's validation loss, in nats per `unit`."""
        if self.writes:
            self.metrics.plot(self.path / "loss.png", bigram, unit)


class SavedRun(NamedTuple):
    """What config.json records of a run."""

    preset: str
    init_from: str | None
    model: GPTConfig
    settings: TrainSettings


def read_run(run: RunFolder) -> SavedRun:
    """Read config.json of a run; raises InputError if its entries are not those of a training run."""
    saved = run.config()
    try:
        model, settings = GPTConfig(**saved["model"]), TrainSettings(**saved["train"])
        preset, init_from = saved["preset"], saved["init_from"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{run.config_file} was not written by this version of the scripts ({error})") from None
    except InputError as error:
        raise InputError(f"{run.config_file}: {error}") from None
    for name, value in (("preset", preset), ("init_from", init_from or "")):
        if not isinstance(value, str):
            raise InputError(f"{run.config_file}: {name} must be text, got {value!r}")
    return SavedRun(preset, init_from, model, settings)
