"""A classification head on a GPTModel; gpt_jax/classifier.py is its twin.

parity/weights/classifier.py has the table. The model file does not know the head: add_classifier() puts it on a model,
in place of the one over tokens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt_torch.lora import export_adapter, lora_config
from gpt_torch.model import GPTModel, at_least_float32
from gpt_torch.modes import eval_mode, require_values, unwrap
from gpt_torch.weights import copy_arrays, export_arrays, load_weights, to_numpy
from parity.config import IGNORE_INDEX, is_counted
from parity.errors import InputError
from parity.storage.paths import user_path
from parity.training.objective import Objective
from parity.tuning.labeled import label_batches
from parity.weights import classifier_files, peft_files
from parity.weights.classifier import ClassifierConfig, backbone, head_rows, initial_head


def add_classifier(model: nn.Module, classifier: ClassifierConfig, seed: int = 0) -> None:
    """Give a model a classification head.

    The model is changed in place: it loses a head over tokens of its own, if it has one.

    Args:
        model: A GPTModel, with or without adapters.
        classifier: Options of the head.
        seed: Seed of the head's initial values, which equal those of gpt_jax with the same seed.

    Raises:
        InputError: If the model has a classification head already, or the options do not fit it.
    """
    gpt = unwrap(model)
    require_values(gpt)
    if classifier_config(gpt) is not None:
        raise InputError("the model has a classification head already")
    classifier.check(gpt.config)
    if not gpt.config.tied_head:
        del gpt.out_head
    gpt.config = backbone(gpt.config)
    weight = gpt.tok_emb.weight
    head = nn.Linear(weight.shape[1], len(classifier.labels), classifier.bias, device="meta", dtype=weight.dtype)
    gpt.score = head.to_empty(device=weight.device)
    gpt.classifier = classifier
    copy_arrays(gpt, initial_head(gpt.config, classifier, seed), "huggingface", "head", head_rows(classifier))


def classifier_config(model: nn.Module) -> ClassifierConfig | None:
    """Return the options of a model's classification head, or None if it has none."""
    return getattr(unwrap(model), "classifier", None)


def label_logits(model: GPTModel, inputs: Tensor, lengths: Tensor) -> Tensor:
    """Return the logits of the labels.

    Args:
        model: A model with a classification head.
        inputs: Token ids, integers [B, T], padded at the end.
        lengths: Integers [B]; the head reads position lengths[b] - 1 of row b.

    Returns:
        Logits [B, Y], in float32 at least.
    """
    gpt = unwrap(model)
    x = gpt.hidden(inputs)  # [B, T, D]
    x = x[torch.arange(len(x), device=x.device), lengths - 1]  # [B, D]
    return at_least_float32(gpt.score(x))  # [B, Y]


def summed_loss(model: GPTModel, inputs: Tensor, targets: Tensor, lengths: Tensor) -> Tensor:
    """Return the cross-entropy of the labels in nats, summed over the rows whose target is not ignored.

    Args:
        model: A model with a classification head.
        inputs: Token ids, integers [B, T], padded at the end.
        targets: Numbers of the labels, integers [B]; -1 and -100 are ignored.
        lengths: See label_logits().

    Returns:
        A scalar of dtype float32 or float64.
    """
    known = torch.where(is_counted(targets), targets, IGNORE_INDEX)
    return F.cross_entropy(label_logits(model, inputs, lengths), known, ignore_index=IGNORE_INDEX, reduction="sum")


def label_objective(classifier: ClassifierConfig) -> Objective:
    """Return the objective of training a classifier, whose batches are (inputs [B, T], targets [B], lengths [B])."""

    def rows(model: GPTModel, inputs: Tensor, targets: Tensor, lengths: Tensor) -> Tensor:
        return label_logits(model, inputs, lengths)

    return Objective(summed_loss, check=classifier.check_targets, rows=rows)


@torch.inference_mode()
def classify(model: nn.Module, texts: Sequence[Sequence[int]]) -> np.ndarray:
    """Return the probability of each label for each text.

    Args:
        model: A model with a classification head.
        texts: Token ids of the texts, at most n_ctx each, unless the classifier cuts them to its `length`.

    Returns:
        Probabilities [B, Y], float32 or float64: a row for each text, with one number in [0, 1] per label.

    Raises:
        InputError: If the model has no classification head, a text is longer than n_ctx, or an id is outside the
            vocabulary.
    """
    gpt, classifier = unwrap(model), require_classifier(model)
    device = gpt.tok_emb.weight.device
    result: Any = [None] * len(texts)
    with eval_mode(gpt):
        for numbers, *batch in label_batches(texts, classifier, gpt.config):
            logits = label_logits(gpt, *(torch.from_numpy(part).long().to(device) for part in batch))
            for number, probabilities in zip(numbers, to_numpy(logits.softmax(-1)), strict=False):
                result[number] = probabilities
    return np.array(result).reshape(len(texts), len(classifier.labels))


def save_classifier(
    model: nn.Module, folder: str | Path, base: str | None = None, base_sha256: str | None = None
) -> None:
    """Write a classifier: its weights as transformers' GPT2ForSequenceClassification opens them, or its adapters and
    its head as peft opens them, and classifier.json, which has what those files cannot hold.

    Args:
        model: A model with a classification head.
        folder: The folder, which is made if it does not exist.
        base: Name of the base of adapters; see gpt_torch.save_adapter().
        base_sha256: Hash of its weights.

    Raises:
        InputError: If the model has no classification head, or the folder holds a model in another format.
        OSError: If the folder cannot be written.
    """
    gpt, classifier, path = unwrap(model), require_classifier(model), user_path(folder)
    head = export_arrays(gpt, "huggingface", head_rows(classifier))
    lora = lora_config(gpt)
    if lora is None:
        classifier_files.write(path, gpt.config, {**export_arrays(gpt, "huggingface"), **head}, classifier)
    else:
        adapter = peft_files.Adapter(lora, export_adapter(gpt), base, base_sha256, str(path), head)
        peft_files.write(path, gpt.config, adapter)
        classifier_files.write_options(path, classifier)


def load_classifier(folder: str | Path, device: torch.device | str | None = None, **options: Any) -> GPTModel:
    """Load what save_classifier() of either backend, or a run that trained a classifier, wrote.

    Args:
        folder: The folder. Adapters are merged into their base, which is found by the name that they record.
        device: Device of the parameters; by default the CPU.
        options: Further arguments of `GPTModel`, for example `attention`.

    Returns:
        A `GPTModel` with a classification head, for `classify`.

    Raises:
        InputError: If files are missing or damaged, or do not fit each other.
    """
    stored = classifier_files.read(user_path(folder))
    model = GPTModel(stored.config, None, **options)
    load_weights(model, stored.arrays, stored.format, origin=str(folder))
    add_classifier(model, stored.classifier)
    copy_arrays(model, stored.head, "huggingface", str(folder), head_rows(stored.classifier))
    return model.to(device or "cpu")


def require_classifier(model: nn.Module) -> ClassifierConfig:
    classifier = classifier_config(model)
    if classifier is None:
        raise InputError("the model has no classification head; give it one with add_classifier()")
    return classifier
