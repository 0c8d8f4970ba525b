"""Conversations as token ids with the targets of the loss."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Self

import numpy as np

from parity.config import IGNORE_INDEX
from parity.data.tokenizer import Tokenizer
from parity.errors import InputError
from parity.tuning.template import Segment

LossOn = Literal["response", "all"]


class Example(NamedTuple):
    """Inputs and targets of one row, both int32 [T]; the target is IGNORE_INDEX where nothing is scored."""

    inputs: np.ndarray
    targets: np.ndarray

    @property
    def length(self) -> int:
        """Number of positions."""
        return len(self.inputs)

    @property
    def n_targets(self) -> int:
        """Number of scored positions."""
        return int((self.targets != IGNORE_INDEX).sum())

    def cut(self, length: int) -> Self:
        """Return the first `length` positions."""
        return self._replace(inputs=self.inputs[:length], targets=self.targets[:length])


def encode_segments(segments: Sequence[Segment], tokenizer: Tokenizer, origin: str = "") -> list[tuple[list[int], int]]:
    """Encode each segment's prompt and response jointly.

    Args:
        segments: The turns of a conversation.
        tokenizer: The tokenizer; the characters of its special token are encoded as text.
        origin: Where the conversation is from, for messages.

    Returns:
        For each segment its ids, without an end-of-text token, and how many of them are the prompt's.

    Raises:
        InputError: If a token contains the end of the prompt and the beginning of the response, so that the model
            could not be asked for the response.
    """
    encoded = []
    for prompt, response in segments:
        ids, prompt_ids = tokenizer.encode(prompt + response), tokenizer.encode(prompt)
        if ids[: len(prompt_ids)] != prompt_ids:
            raise InputError(f"{origin}: a token crosses from the prompt into the response {response[:40]!r}")
        encoded.append((ids, len(prompt_ids)))
    return encoded


def encode_example(
    segments: Sequence[Segment], tokenizer: Tokenizer, loss_on: LossOn = "response", origin: str = ""
) -> Example:
    """Return the inputs and targets of a conversation.

    Every response, with the end-of-text token after it, is scored; so is each prompt if `loss_on` is "all".
    """
    ids: list[int] = []
    scored: list[bool] = []
    for segment_ids, n_prompt in encode_segments(segments, tokenizer, origin):
        ids += [*segment_ids, tokenizer.eos_id]
        scored += [loss_on == "all"] * n_prompt + [True] * (len(segment_ids) - n_prompt + 1)
    tokens = np.array(ids, np.int32)
    return Example(tokens[:-1], np.where(scored[1:], tokens[1:], np.int32(IGNORE_INDEX)))


def encode_prompt(segments: Sequence[Segment], tokenizer: Tokenizer, origin: str = "") -> list[int]:
    """Return the ids after which the model writes the response of the last segment."""
    *earlier, last = encode_segments(segments, tokenizer, origin)
    ids = [id for segment_ids, _ in earlier for id in (*segment_ids, tokenizer.eos_id)]
    return ids + last[0][: last[1]]
