"""Tokens and distributions as JSON for the page: whole characters, most likely tokens, arrays as base64."""

import base64
import codecs
from collections.abc import Sequence
from typing import Any

import numpy as np

from parity.data.tokenizer import END_OF_TEXT, Tokenizer

N_TOP = 10
"""Number of most likely tokens that the page shows."""


class TokenTexts:
    """Turns ids into entries {id, text, shown?} one by one.

    `text` has the characters that the token completes, so the texts of all tokens together are the whole text; the
    token of an incomplete character has none. `shown` is what stands for a token whose own bytes are no text.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, id: int) -> dict[str, Any]:
        """Return the entry of the next token."""
        shown = show_token(self._tokenizer, id)
        if id >= self._tokenizer.n_vocab or id == self._tokenizer.eos_id:
            return {"id": id, "text": "", "shown": shown}
        text = self._decoder.decode(self._tokenizer.token_bytes(id))
        return {"id": id, "text": text} | ({} if text == shown else {"shown": shown})

    def rest(self) -> str:
        """Return what stands for an incomplete character at the end: U+FFFD, or nothing."""
        return self._decoder.decode(b"", final=True)


def show_token(tokenizer: Tokenizer, id: int) -> str:
    """Return the text of one token; bytes that are no text alone are escaped, as in \\xe2."""
    if id >= tokenizer.n_vocab:
        return f"<{id}>"
    if id == tokenizer.eos_id:
        return END_OF_TEXT
    raw = tokenizer.token_bytes(id)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in raw)


def token_entries(tokenizer: Tokenizer, ids: Sequence[int]) -> list[dict[str, Any]]:
    """Return the entries of TokenTexts for a whole text."""
    texts = TokenTexts(tokenizer)
    entries = [texts.add(id) for id in ids]
    if entries:
        entries[-1]["text"] += texts.rest()
    return entries


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities in float64 along the last axis."""
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def most_likely(logprobs: np.ndarray, tokenizer: Tokenizer, count: int = N_TOP) -> list[dict[str, Any]]:
    """Return the most likely tokens of one distribution [V] as {id, shown, logprob}; ties go to the lower id."""
    count = min(count, len(logprobs))
    smallest = np.partition(logprobs, -count)[-count]
    candidates = np.flatnonzero(logprobs >= smallest)
    ordered = candidates[np.argsort(-logprobs[candidates], kind="stable")][:count]
    return [
        {"id": int(id), "shown": show_token(tokenizer, int(id)), "logprob": rounded(logprobs[id])} for id in ordered
    ]


def judged(logits: np.ndarray, id: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """Describe a token under the distribution that logits [V] give: {logprob, rank, entropy, top}, in nats."""
    logprobs = log_softmax(logits)
    return {
        "logprob": rounded(logprobs[id]),
        "rank": int((logits > logits[id]).sum()) + 1,
        "entropy": rounded(max(0.0, -(np.exp(logprobs) * logprobs).sum())),
        "top": most_likely(logprobs, tokenizer),
    }


def rounded(value: Any) -> float:
    """Return a number with six significant digits, for JSON."""
    return float(f"{float(value):.6g}")


def packed(array: np.ndarray, dtype: str) -> dict[str, Any]:
    """Return an array as {shape, data}, little-endian in base64."""
    array = np.ascontiguousarray(array, np.dtype(dtype).newbyteorder("<"))
    return {"shape": list(array.shape), "data": base64.b64encode(array.tobytes()).decode("ascii")}
