"""The continuations that a client requests, and how their tokens reach it."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Literal, NamedTuple

from parity.data.tokenizer import Tokenizer
from parity.sampling import PromptOptions
from parity.serving.text import TextStream, Token

FinishReason = Literal["stop", "length"]
"""Why a continuation ended: with a stop text or the end-of-text token, or because it has max_new_tokens."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A continuation that a client requests."""

    prompt: Sequence[int]
    """Token ids, at least one."""
    max_new_tokens: int
    """At least 1. With the prompt, at most n_ctx + 1 tokens, because the last one does not enter the model."""
    options: PromptOptions = dataclasses.field(default_factory=PromptOptions)
    """The options of generate(). `row` is 0 by default; rows 0, 1, 2, ... are the samples that generate() makes."""
    stop: Sequence[str] = ()
    """Texts that end the continuation; none of them is a part of it."""


class Progress(NamedTuple):
    """What a continuation has gained."""

    row: int
    """Index among the rows of the request."""
    text: str
    """New text, of whole characters."""
    tokens: Sequence[Token]
    """The new tokens. The last one may be the end-of-text token, of which the text has nothing."""
    finish_reason: FinishReason | None
    """None if more follows."""


class Generation:
    """The continuations of one request, for the asyncio event loop in which it was made.

    Iterate over it to receive the Progress of its rows until all of them are finished:
    `async for progress in generation`. An error of the engine is raised there.
    """

    def __init__(self, rows: Sequence[Row], n_top: int, on_cancel: Callable[["Generation"], None]):
        self.rows = rows
        self.n_top = n_top
        self.is_cancelled = False
        self._on_cancel = on_cancel
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[list[Progress] | BaseException] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[Progress]:
        n_running = len(self.rows)
        try:
            while n_running:
                events = await self._events.get()
                if isinstance(events, BaseException):
                    raise events
                for event in events:
                    n_running -= event.finish_reason is not None
                    yield event
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Stop decoding; the places of the rows are free within a few tokens."""
        self.is_cancelled = True
        self._on_cancel(self)

    def deliver(self, events: list[Progress] | BaseException) -> None:
        """Called by the engine, on its thread."""
        with contextlib.suppress(RuntimeError):  # the event loop is closed, so nobody waits
            self._loop.call_soon_threadsafe(self._events.put_nowait, events)


class WaitingRow:
    """A row of a request in the engine, with the tokens that it has so far."""

    def __init__(self, generation: Generation, index: int, tokenizer: Tokenizer):
        self.generation = generation
        self.index = index
        self.row = generation.rows[index]
        self.new_ids: list[int] = []
        self.is_finished = False
        self._text = TextStream(tokenizer, self.row.stop)

    @property
    def is_running(self) -> bool:
        return not self.is_finished and not self.generation.is_cancelled

    @property
    def ids(self) -> list[int]:
        """The prompt and the new tokens."""
        return [*self.row.prompt, *self.new_ids]

    @property
    def n_remaining(self) -> int:
        return self.row.max_new_tokens - len(self.new_ids)

    def add(
        self, ids: Sequence[int], logprobs: Sequence[float], tops: Sequence[Sequence[tuple[int, float]]]
    ) -> Progress | None:
        """Add new tokens, until one of them ends the row, and return what a client should receive now."""
        reason: FinishReason | None = None
        for id, logprob, top in zip(ids, logprobs, tops, strict=True):
            self.new_ids.append(id)
            is_end = id == self.row.options.get("eos_id")
            self._text.add(id, logprob, top, has_text=not is_end)
            reason = "stop" if is_end or self._text.is_stopped else None if self.n_remaining else "length"
            if reason:
                break
        if reason:
            self._text.end()
            self.is_finished = True
        text, tokens = self._text.release(self.is_finished)
        return Progress(self.index, text, tokens, reason) if text or tokens or reason else None
