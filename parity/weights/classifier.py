"""Classification: a head over labels in place of tokens, its rows of the table, and its initial values.

A classifier reads the final hidden state x [D] at one position of a text, and its logits [Y] are x W + b. The rows are
like those of a model (parity/weights/table.py); their huggingface names are those of transformers'
GPT2ForSequenceClassification, which has the matrix, `score.weight`, but no bias.
"""

import dataclasses
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from parity.config import IGNORE_INDEX, GPTConfig, is_counted
from parity.errors import InputError, check_choice
from parity.weights.table import Row, shapes

Position = Literal["last-token", "last"]
CLASSIFIER_FILE = "classifier.json"
"""Holds a ClassifierConfig, beside the weights of a classifier or beside its adapter."""
HEAD = "score"
"""The head's name in every format."""
_MOST_LABELS = 2**16


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """Options of a classifier.

    Raises:
        InputError: For fewer than two labels, a label that is empty or occurs twice, and a value out of range.
    """

    labels: tuple[str, ...]
    """The labels, in the order of the logits (axis Y)."""
    pad_id: int
    """Token that texts are padded with at their end; no text contains it."""
    bias: bool = False
    """Whether the head has a bias."""
    position: Position = "last-token"
    """Position that the head reads: that of the text's last token, or the last one, of the padding if there is any."""
    length: int | None = None
    """Number of tokens that texts are padded to if the last position is read, where the padding matters."""

    def __post_init__(self) -> None:
        if isinstance(self.labels, str) or not isinstance(self.labels, Sequence):
            raise InputError(
                f'the labels of a classifier must be a tuple such as ("no", "yes"), got {self.labels!r:.60}'
            )
        object.__setattr__(self, "labels", tuple(self.labels))
        check_choice("position", self.position, get_args(Position))
        if not all(isinstance(label, str) and label for label in self.labels):
            raise InputError("a label of a classifier must be text that is not empty")
        if len(set(self.labels)) < len(self.labels) or not 2 <= len(self.labels) <= _MOST_LABELS:
            raise InputError(f"a classifier needs 2 to {_MOST_LABELS} different labels, got {len(set(self.labels))}")
        if type(self.bias) is not bool:
            raise InputError(f"the bias of a classifier must be true or false, got {self.bias!r:.60}")
        if type(self.pad_id) is not int or self.pad_id < 0:
            raise InputError(f"the padding of a classifier must be the id of a token, got {self.pad_id!r:.60}")
        if self.position == "last" and (type(self.length) is not int or self.length < 1):
            raise InputError(
                "a classifier with position 'last' needs a length, the number of tokens that texts are padded to; "
                f"got {self.length!r:.60}"
            )
        if self.position != "last" and self.length is not None:
            raise InputError(
                f"a classifier with position {self.position!r} has no length, because its padding does not matter; "
                f"got {self.length!r:.60}"
            )

    def check(self, config: GPTConfig) -> None:
        """Check that a model can have the head.

        Args:
            config: Configuration of the model.

        Raises:
            InputError: If the padding or the length does not fit the model.
        """
        if self.pad_id >= config.n_vocab:
            raise InputError(
                f"the classifier's pad_id is {self.pad_id}, outside the model's vocabulary 0..{config.n_vocab - 1}"
            )
        if self.length is not None and self.length > config.n_ctx:
            context = f"the model's context, n_ctx={config.n_ctx}"
            raise InputError(f"the classifier pads texts to {self.length} tokens, more than {context}")

    def check_targets(self, config: GPTConfig, targets: np.ndarray) -> None:
        """Check the targets of a loss.

        Args:
            config: Configuration of the model; it is not used.
            targets: Integers of any shape: the numbers of labels, or -1 or -100 where none counts.

        Raises:
            InputError: For a target that is neither ignored nor the number of a label.
        """
        wrong = targets[is_counted(targets) & ((targets < 0) | (targets >= len(self.labels)))]
        if len(wrong):
            raise InputError(
                f"target {int(wrong[0])} is not the number of a label (0..{len(self.labels) - 1}); "
                f"mark rows to leave out with {IGNORE_INDEX}"
            )


def head_rows(classifier: ClassifierConfig) -> list[Row]:
    """The table of a head's parameters."""

    def row(huggingface: str, flax: str, axes: str, flax_axes: str, init: str) -> Row:
        patterns = {"huggingface": axes, "torch": axes, "flax": flax_axes}
        return Row(None, huggingface, huggingface, flax, patterns, init, sizes={"Y": len(classifier.labels)})

    weight = row(f"{HEAD}.weight", f"{HEAD}.kernel", "Y D", "D Y", "normal")
    return [weight, row(f"{HEAD}.bias", f"{HEAD}.bias", "Y", "Y", "zeros")][: 1 + classifier.bias]


def backbone(config: GPTConfig) -> GPTConfig:
    """The configuration of a classifier's model, which has no head over tokens."""
    return dataclasses.replace(config, tied_head=True)


def initial_head(config: GPTConfig, classifier: ClassifierConfig, seed: int) -> dict[str, np.ndarray]:
    """Draw the initial values of a head, in the huggingface format.

    The matrix is normal with standard deviation 0.02, as GPT-2's matrices are, and the bias is zero. The numbers depend
    only on the seed and the shape.
    """
    arrays = {}
    for name, shape in shapes(config, "huggingface", head_rows(classifier)).items():
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, zlib.crc32(name.encode())])))
        drawn = generator.standard_normal(shape, np.float32) * np.float32(0.02)
        arrays[name] = drawn if len(shape) == 2 else np.zeros(shape, np.float32)
    return arrays


def refuse_classifier(folder: Path) -> None:
    """Raise InputError if a folder, in which the weights of a language model are wanted, holds a classifier."""
    if (folder / CLASSIFIER_FILE).is_file():
        raise InputError(
            f"{folder} holds a classifier, which answers with labels and not with text; label texts with "
            "scripts/finetune.py --run RUN --predict FILE --out FILE"
        )


def config_entries(classifier: ClassifierConfig) -> dict[str, Any]:
    """Entries of transformers' config.json for a classifier; the architecture only if transformers has it."""
    numbered = dict(enumerate(classifier.labels))
    return {
        "architectures": [] if differences(classifier) else ["GPT2ForSequenceClassification"],
        "id2label": {str(number): label for number, label in numbered.items()},
        "label2id": {label: number for number, label in numbered.items()},
        "pad_token_id": classifier.pad_id,
    }


def differences(classifier: ClassifierConfig) -> str:
    """Say what transformers' GPT2ForSequenceClassification cannot hold; an empty text if it holds everything."""
    parts = []
    if classifier.bias:
        parts.append(f"its head has a bias ({HEAD}.bias)")
    if classifier.position == "last":
        parts.append("it reads the last position of the padding")
    return " and ".join(parts)
