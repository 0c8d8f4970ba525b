"""The entries of a run's config.json, of this version and of older ones."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from parity.config import GPTConfig
from parity.training.settings import TrainSettings

# Keys of config.json before version 0.2, and settings that it did not have, with the values that were used.
_RENAMED = {"initial": "init_scheme", "validation_part": "validation_fraction"}
_FORMER_VALUES = {"sample_temperature": 0.8, "sample_top_k": 50, "window_order": "shuffled"}
UNRECORDED = {"train.window_order": "shuffled"}
"""Settings that are newer than the identity of a run, with the values that leave the identity as it was."""
CORPUS_SAMPLES = "corpus_samples"
"""Key of config.json: a hash of samples of the corpus's tokens (agreement.py), since version 0.2."""


def run_config(
    preset: str,
    model: GPTConfig,
    settings: TrainSettings,
    corpus_sha256: str,
    init_from: str | None = None,
    corpus_samples: str | None = None,
) -> dict[str, Any]:
    """Return the entries of config.json."""
    return {
        "preset": preset,
        "init_from": init_from,
        "corpus_sha256": corpus_sha256,
        CORPUS_SAMPLES: corpus_samples,
        "model": model.to_dict(),
        "train": dataclasses.asdict(settings),
    }


def with_current_names(entries: dict[str, Any]) -> dict[str, Any]:
    """Translate the config.json of an older version."""
    if isinstance(entries, dict) and isinstance(entries.get("train"), dict):
        train = {_RENAMED.get(name, name): value for name, value in entries["train"].items()}
        entries["train"] = {**_FORMER_VALUES, **train}
        entries["init_from"] = entries.pop("init", entries.get("init_from"))
    return entries


def flatten(entries: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the entries of nested mappings as ("outer.inner", value)."""
    for key, value in entries.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
