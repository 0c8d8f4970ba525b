"""How a conversation becomes text: the one function behind training, generation, evaluation and samples."""

from collections.abc import Sequence
from typing import NamedTuple

from parity.errors import check_choice
from parity.tuning.records import Conversation

# The sentences that precede the instruction in the form of Stanford Alpaca's records without input.
_ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
PREAMBLES = {"alpaca": _ALPACA, "plain": ""}
"""{template: text before the first turn, which a system message replaces}."""
_INSTRUCTION, _INPUT, _RESPONSE = "### Instruction:\n", "### Input:\n", "### Response:\n"


class Segment(NamedTuple):
    """One turn as text. An end-of-text token follows the response."""

    prompt: str
    """Up to and including the newline before the response, where the model's response begins."""
    response: str


def render(conversation: Conversation, template: str = "plain") -> Sequence[Segment]:
    """Return the segments of a conversation.

    Each turn has the headings of Alpaca: the instruction, the input if there is one, and the response, with a blank
    line between them. GPT-2 has no special tokens for roles, so they are text.

    Args:
        conversation: The conversation; the response of its last turn may be empty.
        template: "alpaca", which begins with two sentences about the task, or "plain", which does not.
    """
    check_choice("template", template, list(PREAMBLES))
    preamble = conversation.system or PREAMBLES[template]
    segments = []
    for turn in conversation.turns:
        parts = [preamble, _INSTRUCTION + turn.instruction, _INPUT + turn.input if turn.input else "", _RESPONSE]
        segments.append(Segment("\n\n".join(part for part in parts if part), turn.response))
        preamble = ""
    return segments
