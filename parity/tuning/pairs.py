"""Pairs of a preferred and a rejected response to the same instruction: records, token ids and batches."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from parity.config import IGNORE_INDEX
from parity.data.tokenizer import Tokenizer
from parity.errors import InputError
from parity.tuning.encoding import Example, encode_example, encode_prompt
from parity.tuning.examples import Rows
from parity.tuning.records import Conversation, Record, Turn, conversation, text_field
from parity.tuning.template import render

FORMS = (
    'instructions {"instruction", "input", "chosen", "rejected"}, prompts {"prompt", "chosen", "rejected"} and '
    'chats, where "chosen" and "rejected" are lists of {"role", "content"} that differ in the last message'
)
"""The forms of a record that holds a preference, for messages."""


class Preference(NamedTuple):
    """Two conversations that differ in the last response."""

    chosen: Conversation
    rejected: Conversation


def preference(record: Record) -> Preference:
    """Return the preference of a record in one of the FORMS.

    Raises:
        InputError: If the record has another form, a text is empty or missing, or the conversations differ before the
            last response; the message says where.
    """
    fields = record.fields
    if isinstance(fields.get("chosen"), list) or isinstance(fields.get("rejected"), list):
        chosen, rejected = (_chat(record, name) for name in Preference._fields)
        if _before_response(chosen) != _before_response(rejected):
            raise InputError(
                f"{record.origin}: the messages of 'chosen' and 'rejected' differ before the last one; both must "
                "answer the same conversation"
            )
        return Preference(chosen, rejected)
    name = next((name for name in ("instruction", "prompt") if name in fields), None)
    if name is None or not {"chosen", "rejected"} & fields.keys():
        names = ", ".join(map(repr, sorted(map(str, fields))))
        raise InputError(f"{record.origin}: the fields {names:.300} are none of the known forms: {FORMS}")
    instruction, context = text_field(record, name), text_field(record, "input", required=False)
    responses = (text_field(record, field) for field in Preference._fields)
    return Preference(
        *(Conversation((Turn(instruction, context, response),), "", record.origin) for response in responses)
    )


def _chat(record: Record, name: str) -> Conversation:
    """Return the conversation of a list of messages, after those in "prompt" if that is a list too."""
    messages = record.fields.get(name)
    if not isinstance(messages, list):
        raise InputError(f"{record.origin}: the field {name!r} must be a list of messages like the other response")
    before = record.fields.get("prompt")
    entry = {"messages": [*(before if isinstance(before, list) else []), *messages]}
    return conversation(Record(entry, f"{record.origin}, {name}"))._replace(origin=record.origin)


def _before_response(conversation: Conversation) -> tuple[Any, ...]:
    *earlier, last = conversation.turns
    return conversation.system, tuple(earlier), last.instruction, last.input


class Pair(NamedTuple):
    """The texts of a preference; the last response of each is scored."""

    chosen: Example
    rejected: Example
    reference: tuple[float, float] = (np.nan, np.nan)
    """The log-probabilities that the reference gives to the two responses."""

    @property
    def length(self) -> int:
        """Number of positions of the longer text."""
        return max(self.chosen.length, self.rejected.length)

    @property
    def n_targets(self) -> int:
        """1, because the loss has one term per pair; 0 if one of the responses is cut off."""
        return int(bool(self.chosen.n_targets and self.rejected.n_targets))

    def cut(self, length: int) -> Self:
        """Return the first `length` positions of both texts."""
        return self._replace(chosen=self.chosen.cut(length), rejected=self.rejected.cut(length))


def encode_pair(pair: Preference, tokenizer: Tokenizer, template: str = "plain") -> Pair:
    """Return the token ids of a preference. The last response and the end-of-text token after it are scored."""
    chosen, rejected = (_encode(conversation, tokenizer, template) for conversation in pair)
    return Pair(chosen, rejected)


def _encode(conversation: Conversation, tokenizer: Tokenizer, template: str) -> Example:
    segments = render(conversation, template)
    example = encode_example(segments, tokenizer, "response", conversation.origin)
    n_prompt = len(encode_prompt(segments, tokenizer, conversation.origin))
    example.targets[: n_prompt - 1] = IGNORE_INDEX  # earlier responses are the same in both conversations
    return example


class Pairs(Rows[Pair]):
    """A dataset of pairs; the batches are (inputs int32 [B, 2T], targets int32 [B, 2T], reference float64 [B, 2])."""

    @property
    def reference(self) -> np.ndarray:
        """The log-probabilities that the reference gives to the responses, float64 [len(self), 2]."""
        return np.array([pair.reference for pair in self.examples], np.float64).reshape(-1, 2)

    def set_reference(self, logprobs: np.ndarray) -> None:
        """Give each pair the log-probabilities [len(self), 2] of the reference."""
        self.examples = [
            pair._replace(reference=(float(chosen), float(rejected)))
            for pair, (chosen, rejected) in zip(self.examples, logprobs, strict=True)
        ]

    def arrays(self, rows: Sequence[Pair | None], T: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        texts = [text for row in rows for text in ((None, None) if row is None else row[:2])]
        inputs, targets = (ids.reshape(len(rows), 2 * T) for ids in self.pad(texts, T))
        reference = [(0.0, 0.0) if row is None else row.reference for row in rows]
        return inputs, targets, np.array(reference, np.float64).reshape(-1, 2)
