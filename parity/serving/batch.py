"""Rows of different requests that are decoded together."""

from collections.abc import Callable, Iterator

import numpy as np

from parity.config import GPTConfig
from parity.generation import Chunk, Request, bucket, prepare
from parity.sampling import PromptOptions
from parity.serving.rows import Generation, Progress, WaitingRow

MOST_TOP = 20
"""Largest number of most likely tokens that a request may have for each token."""
_PREFILL_SPEEDUP = 5
"""How much faster a model reads a token of a prompt than it generates one in a batch, on a CPU."""


class Batch:
    """Rows that are decoded together."""

    def __init__(self, rows: list[WaitingRow]):
        self.rows = rows
        self._chunks: Iterator[Chunk] = iter(())
        self._lengths = np.zeros(len(rows), np.int32)
        self._n_idle = 0  # tokens that waiting rows would have had in free places

    @property
    def running(self) -> list[WaitingRow]:
        return [row for row in self.rows if row.is_running]

    def may_form_again(self, size: int) -> bool:
        """Whether what free places have cost outweighs reading the texts again, in a batch of `size` rows."""
        longest = max(len(row.row.prompt) + len(row.new_ids) for row in self.running)
        return self._n_idle > 0 and self._n_idle * _PREFILL_SPEEDUP >= size * bucket(longest)

    def start(self, config: GPTConfig, decode: Callable[[Request], Iterator[Chunk]], size: int) -> None:
        """Begin to decode.

        Args:
            config: The model's configuration.
            decode: Decodes a request with the model.
            size: Number of rows of the batch; those beyond the rows that clients requested end with their first token.
        """
        n_padding = size - len(self.rows)
        own = [PromptOptions(row=0) | row.row.options | {"max_new_tokens": row.n_remaining} for row in self.rows]
        request = prepare(
            config,
            [row.ids for row in self.rows] + [self.rows[0].ids] * n_padding,
            1,
            {"per_prompt": own + [PromptOptions(temperature=0, max_new_tokens=1)] * n_padding},
            return_logprobs=True,
            n_top=MOST_TOP if any(row.generation.n_top for row in self.rows) else 0,
        )
        self._chunks = decode(request)

    def step(self, n_idle: int = 0) -> None:
        """Decode a few tokens of each row, and deliver them.

        Args:
            n_idle: Number of rows that wait and for which there would be a place.
        """
        chunk = next(self._chunks)
        delivered: dict[Generation, list[Progress]] = {}
        for number, (row, length) in enumerate(zip(self.rows, chunk.lengths.tolist(), strict=False)):
            new = length - int(self._lengths[number])
            if new and row.is_running:
                event = row.add(
                    chunk.tokens[number, :new].tolist(),
                    chunk.logprobs[number, :new].tolist(),
                    _tops(chunk, number, new, row.generation.n_top),
                )
                if event is not None:
                    delivered.setdefault(row.generation, []).append(event)
        self._lengths = chunk.lengths
        self._n_idle += n_idle * chunk.tokens.shape[1]
        for generation, events in delivered.items():
            generation.deliver(events)


def _tops(chunk: Chunk, row: int, new: int, n_top: int) -> list[list[tuple[int, float]]]:
    if chunk.top_ids is None or chunk.top_logprobs is None or not n_top:
        return [[] for _ in range(new)]
    ids, logprobs = chunk.top_ids[row, :new, :n_top].tolist(), chunk.top_logprobs[row, :new, :n_top].tolist()
    return [list(zip(*pair, strict=True)) for pair in zip(ids, logprobs, strict=True)]
