"""Texts that a model generates until a stop string, in either backend.

The stop strings of generate() are sequences of tokens. Here they are texts: however the tokens divide the text, it ends
before the first stop string.
"""

import codecs
from collections.abc import Mapping, Sequence
from typing import Any

from parity.data.tokenizer import Tokenizer

_STEPS_PER_CALL = 8  # of JAX's compiled loop, between looks at the text


class _Text:
    """The text of one row's new tokens, until it contains a stop string."""

    def __init__(self, tokenizer: Tokenizer, until: Sequence[str]):
        self.tokenizer = tokenizer
        self.until = until
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.text = ""
        self.has_ended = False

    def append(self, token: int | None) -> None:
        """Add a token. None, for a row that has ended, and the end-of-text token end the text."""
        if self.has_ended or token is None or token == self.tokenizer.eos_id:
            self.has_ended = True
            return
        if token < self.tokenizer.n_vocab:  # a padded vocabulary has ids without text
            self.text += self.decoder.decode(self.tokenizer.token_bytes(token))
        self.has_ended = any(stop in self.text for stop in self.until)

    def result(self) -> str:
        """Return the text before the first stop string."""
        text = self.text + self.decoder.decode(b"", final=True)
        for stop in self.until:
            text = text.partition(stop)[0]
        return text


def continue_texts(
    backend: Any,
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    until: Sequence[str],
    rows: Sequence[str],
    options: Mapping[str, Any],
) -> list[str]:
    """Continue prompts until a stop string, the end-of-text token or a number of tokens.

    Args:
        backend: The package gpt_torch or gpt_jax.
        model: A model that the backend's stream() accepts.
        tokenizer: The model's tokenizer.
        prompts: Token ids, at least one per prompt; with the new tokens they must fit into the context.
        max_new_tokens: Largest number of new tokens per prompt.
        until: Stop strings. Empty ones are ignored.
        rows: For each prompt the name of its random numbers; see parity.sampling.PromptOptions.row.
        options: Options of stream() that all prompts share.

    Returns:
        The new text of each prompt, without the stop string. Bytes that are no whole character become U+FFFD.
    """
    texts = [_Text(tokenizer, [stop for stop in until if stop]) for _ in prompts]
    every = {"every": _STEPS_PER_CALL} if hasattr(backend, "for_decoding") else {}
    per_prompt = [{"row": row} for row in rows]
    steps = backend.stream(
        model, prompts, max_new_tokens, eos_id=tokenizer.eos_id, per_prompt=per_prompt, **options, **every
    )
    for tokens in steps:
        for text, token in zip(texts, tokens, strict=True):
            text.append(token)
        if all(text.has_ended for text in texts):
            break
    return [text.result() for text in texts]
