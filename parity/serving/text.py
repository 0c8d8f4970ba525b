"""The text of a continuation while its tokens arrive: whole characters only, up to the first stop text."""

import codecs
from collections.abc import Sequence
from typing import NamedTuple

from parity.data.tokenizer import Tokenizer


class Token(NamedTuple):
    """A new token of a continuation."""

    id: int
    logprob: float
    """Log-probability under the model itself, in nats, before the temperature and all filters."""
    top: Sequence[tuple[int, float]]
    """The most likely tokens and their log-probabilities in descending order, as many as were requested."""
    offset: int
    """Number of characters of the continuation before this token."""


class TextStream:
    """Decodes the tokens of a continuation, and withholds what may still become a part of a stop text.

    Without a stop text, the text is that of parity.data.tokenizer.stream_text.

    Args:
        tokenizer: The tokenizer of the model.
        stop: Texts that end the continuation; none of them is a part of it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._withheld = ""
        self._n_released = 0
        self._tokens: list[Token] = []
        self.is_stopped = False
        """Whether a stop text occurred. Nothing follows it."""

    def add(self, id: int, logprob: float, top: Sequence[tuple[int, float]], *, has_text: bool = True) -> None:
        """Add the next token, whose text counts if it has one; call `release` for what is certain now."""
        self._tokens.append(Token(id, logprob, top, self._n_released + len(self._withheld)))
        if has_text and id < self._tokenizer.n_vocab:  # models with a padded vocabulary generate tokens without a text
            self._append(self._decoder.decode(self._tokenizer.token_bytes(id)))

    def end(self) -> None:
        """Add what the model's last tokens left incomplete, as U+FFFD."""
        self._append(self._decoder.decode(b"", final=True))

    def release(self, is_finished: bool) -> tuple[str, list[Token]]:
        """Return the text and the tokens that are certain and were not returned before.

        Args:
            is_finished: Whether no token follows, so that everything is certain.
        """
        n_certain = len(self._withheld) - (0 if is_finished else self._longest_beginning())
        text, self._withheld = self._withheld[:n_certain], self._withheld[n_certain:]
        self._n_released += len(text)
        if is_finished and not self.is_stopped:
            tokens, self._tokens = self._tokens, []
        else:
            tokens = [token for token in self._tokens if token.offset < self._n_released]
            self._tokens = self._tokens[len(tokens) :]
        return text, tokens

    def _append(self, text: str) -> None:
        if self.is_stopped:
            return
        self._withheld += text
        ends = [end for stop in self._stop if (end := self._withheld.find(stop)) >= 0]
        if ends:
            self._withheld = self._withheld[: min(ends)]
            self.is_stopped = True

    def _longest_beginning(self) -> int:
        """The number of characters at the end with which a stop text may begin."""
        if self.is_stopped:
            return 0
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for count in range(min(longest, len(self._withheld)), 0, -1):
            if any(stop.startswith(self._withheld[-count:]) for stop in self._stop):
                return count
        return 0
