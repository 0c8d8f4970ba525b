"""The files of a classifier: classifier.json, beside the weights in transformers' form or an adapter in peft's."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from parity.config import GPTConfig
from parity.errors import InputError
from parity.storage.atomic import replace_text
from parity.storage.json import read_object
from parity.storage.manifest import check_weights
from parity.weights import huggingface, peft_files
from parity.weights.classifier import (
    CLASSIFIER_FILE,
    ClassifierConfig,
    backbone,
    config_entries,
    differences,
    head_rows,
)
from parity.weights.load import merge_adapter
from parity.weights.table import check, rows


class Classifier(NamedTuple):
    """A classifier with its weights."""

    classifier: ClassifierConfig
    config: GPTConfig
    """Configuration of the model without a head over tokens."""
    arrays: Mapping[str, Any]
    """The model's weights, with an adapter merged; an array is read when it is used."""
    format: str
    """Their format."""
    head: Mapping[str, Any]
    """The head's weights, in the huggingface format."""


def write(folder: Path, config: GPTConfig, arrays: Mapping[str, Any], classifier: ClassifierConfig) -> None:
    """Write config.json, model.safetensors and classifier.json.

    Args:
        folder: The folder, which is made if it does not exist.
        config: Configuration of the model without a head over tokens.
        arrays: The weights of the model and of the head, in the huggingface format.
        classifier: The options.
    """
    huggingface.write(folder, config, arrays, eos_id=classifier.pad_id, entries=config_entries(classifier))
    write_options(folder, classifier)


def write_options(folder: Path, classifier: ClassifierConfig) -> None:
    """Write classifier.json."""
    text = json.dumps(dataclasses.asdict(classifier), indent=2, ensure_ascii=False)
    replace_text(folder / CLASSIFIER_FILE, text + "\n")


def read_options(folder: Path) -> ClassifierConfig:
    """Read classifier.json; raises InputError if it is missing or describes no classifier."""
    file = folder / CLASSIFIER_FILE
    entries = read_object(file, hint="give a folder or a run of a classifier")
    names = {field.name for field in dataclasses.fields(ClassifierConfig)}
    if entries.keys() != names or not isinstance(entries["labels"], list):
        raise InputError(f"{file} must have the keys {', '.join(sorted(names))}, and a list of labels")
    try:
        return ClassifierConfig(**entries)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def read(folder: Path) -> Classifier:
    """Read a classifier; the base of one that was trained with adapters is found by the name that it records.

    Raises:
        InputError: If files are missing or damaged, or do not fit each other; the message names the file.
    """
    classifier = read_options(folder)
    check_weights(folder)
    if (folder / peft_files.CONFIG_FILE).is_file():
        adapter = peft_files.read(folder, with_head=True)
        config, stored, format = merge_adapter(folder, adapter)
        arrays, head = without_head(config, stored, format), adapter.head
    else:
        config, stored, format = huggingface.read(folder)
        names = {row.huggingface for row in head_rows(classifier)}
        arrays = {name: array for name, array in stored.items() if name not in names}
        head = {name: array for name, array in stored.items() if name in names}
    config = backbone(config)
    classifier.check(config)
    for part, layout, table in ((arrays, format, rows(config)), (head, "huggingface", head_rows(classifier))):
        check({name: tuple(array.shape) for name, array in part.items()}, config, layout, str(folder), table)
    return Classifier(classifier, config, arrays, format, head)


def without_head(config: GPTConfig, arrays: Mapping[str, Any], format: str) -> dict[str, Any]:
    """Return the weights of a language model without an untied head over tokens."""
    kept = {name for row in rows(backbone(config)) for name in row.names(format, config)}
    return {name: array for name, array in arrays.items() if name in kept}


def refuse_for_transformers(classifier: ClassifierConfig, origin: str) -> None:
    """Raise InputError unless transformers' GPT2ForSequenceClassification computes the same function."""
    if reason := differences(classifier):
        raise InputError(
            f"{origin}: transformers' GPT2ForSequenceClassification cannot hold this classifier: {reason}; train one "
            "with --position last-token and without --head-bias"
        )
