"""A classification head on a GPTModel; gpt_torch/classifier.py is its twin.

parity/weights/classifier.py has the table. The model file does not know the head: add_classifier() puts it on a model,
in place of the one over tokens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from gpt_jax.arrays import at_least_float32
from gpt_jax.lora import export_adapter, lora_config
from gpt_jax.model import GPTModel, Linear
from gpt_jax.weights import config_of, copy_arrays, export_arrays, load_weights, parameters
from parity.config import is_counted
from parity.errors import InputError
from parity.storage.paths import user_path
from parity.training.objective import Objective
from parity.tuning.labeled import label_batches
from parity.weights import classifier_files, peft_files
from parity.weights.classifier import ClassifierConfig, backbone, head_rows, initial_head


def add_classifier(model: Any, classifier: ClassifierConfig, seed: int = 0) -> None:
    """Give a model a classification head.

    The model is changed in place: it loses a head over tokens of its own, if it has one.

    Args:
        model: A GPTModel, with or without adapters.
        classifier: Options of the head.
        seed: Seed of the head's initial values, which equal those of gpt_torch with the same seed.

    Raises:
        InputError: If the model has a classification head already, or the options do not fit it.
    """
    config = config_of(model)
    parameters(model)  # raises for a DecodingModel
    if classifier_config(model) is not None:
        raise InputError("the model has a classification head already")
    classifier.check(config)
    if not config.tied_head:
        del model.out_head
    model.config = backbone(config)
    dtype = model.tok_emb.embedding[...].dtype
    head = Linear(config.n_embd, len(classifier.labels), use_bias=classifier.bias)
    model.score = jax.tree.map(lambda a: a.astype(dtype), head)
    model.classifier = classifier
    copy_arrays(model, initial_head(model.config, classifier, seed), "huggingface", "head", head_rows(classifier))


def classifier_config(model: Any) -> ClassifierConfig | None:
    """Return the options of a model's classification head, or None if it has none."""
    config_of(model)  # raises for another class
    return getattr(model, "classifier", None)


def label_logits(model: Any, inputs: Array, lengths: Array, key: Array | None = None) -> Array:
    """Return the logits of the labels.

    Args:
        model: A model with a classification head.
        inputs: Token ids, integers [B, T], padded at the end.
        lengths: Integers [B]; the head reads position lengths[b] - 1 of row b.
        key: Turns dropout on.

    Returns:
        Logits [B, Y], in float32 at least.
    """
    x = model.hidden(inputs, key)  # [B, T, D]
    x = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]  # [B, D]
    return at_least_float32(model.score(x))  # [B, Y]


def summed_loss(model: Any, inputs: Array, targets: Array, lengths: Array, key: Array | None = None) -> Array:
    """Return the cross-entropy of the labels in nats, summed over the rows whose target is not ignored.

    Args:
        model: A model with a classification head.
        inputs: Token ids, integers [B, T], padded at the end.
        targets: Numbers of the labels, integers [B]; -1 and -100 are ignored.
        lengths: See label_logits().
        key: Turns dropout on.

    Returns:
        A scalar of dtype float32 or float64.
    """
    logprobs = jax.nn.log_softmax(label_logits(model, inputs, lengths, key), axis=-1)  # [B, Y]
    own = jnp.take_along_axis(logprobs, jnp.maximum(targets, 0)[:, None], axis=-1)[:, 0]  # [B]
    return -jnp.where(is_counted(targets), own, 0).sum()


def label_objective(classifier: ClassifierConfig) -> Objective:
    """Return the objective of training a classifier, whose batches are (inputs [B, T], targets [B], lengths [B])."""

    def loss(model: Any, inputs: Array, targets: Array, lengths: Array, key: Array | None = None, **_: Any) -> Array:
        return summed_loss(model, inputs, targets, lengths, key)

    def rows(model: Any, inputs: Array, targets: Array, lengths: Array, key: Array | None = None, **_: Any) -> Array:
        return label_logits(model, inputs, lengths, key)

    return Objective(loss, check=classifier.check_targets, rows=rows)


@jax.jit
def _probabilities(model: GPTModel, inputs: Array, lengths: Array) -> Array:
    return jax.nn.softmax(label_logits(model, inputs, lengths), axis=-1)


def classify(model: GPTModel, texts: Sequence[Sequence[int]]) -> np.ndarray:
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
    config, classifier = config_of(model), require_classifier(model)
    result: Any = [None] * len(texts)
    for numbers, *batch in label_batches(texts, classifier, config):
        for number, probabilities in zip(numbers, np.asarray(_probabilities(model, *batch)), strict=False):
            result[number] = probabilities
    return np.array(result).reshape(len(texts), len(classifier.labels))


def save_classifier(
    model: GPTModel, folder: str | Path, base: str | None = None, base_sha256: str | None = None
) -> None:
    """Write a classifier: its weights as transformers' GPT2ForSequenceClassification opens them, or its adapters and
    its head as peft opens them, and classifier.json, which has what those files cannot hold.

    Args:
        model: A model with a classification head.
        folder: The folder, which is made if it does not exist.
        base: Name of the base of adapters; see gpt_jax.save_adapter().
        base_sha256: Hash of its weights.

    Raises:
        InputError: If the model has no classification head, or the folder holds a model in another format.
        OSError: If the folder cannot be written.
    """
    config, classifier, path = config_of(model), require_classifier(model), user_path(folder)
    head = export_arrays(model, "huggingface", head_rows(classifier))
    lora = lora_config(model)
    if lora is None:
        classifier_files.write(path, config, {**export_arrays(model, "huggingface"), **head}, classifier)
    else:
        adapter = peft_files.Adapter(lora, export_adapter(model), base, base_sha256, str(path), head)
        peft_files.write(path, config, adapter)
        classifier_files.write_options(path, classifier)


def load_classifier(folder: str | Path, device: jax.Device | None = None, **options: Any) -> GPTModel:
    """Load what save_classifier() of either backend, or a run that trained a classifier, wrote.

    Args:
        folder: The folder. Adapters are merged into their base, which is found by the name that they record.
        device: Device of the parameters; by default JAX's default device.
        options: Further arguments of `GPTModel`, for example `attention`.

    Returns:
        A `GPTModel` with a classification head, for `classify`.

    Raises:
        InputError: If files are missing or damaged, or do not fit each other.
    """
    stored = classifier_files.read(user_path(folder))
    model = nnx.eval_shape(lambda: GPTModel(stored.config, seed=None, **options))
    with jax.default_device(device):
        load_weights(model, stored.arrays, stored.format, origin=str(folder))
        add_classifier(model, stored.classifier)
        copy_arrays(model, stored.head, "huggingface", str(folder), head_rows(stored.classifier))
    return model if device is None else jax.device_put(model, device)


def require_classifier(model: Any) -> ClassifierConfig:
    classifier = classifier_config(model)
    if classifier is None:
        raise InputError("the model has no classification head; give it one with add_classifier()")
    return classifier
