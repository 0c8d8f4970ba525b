"""The scorer: log-probabilities of continuations after their contexts, in batches of similar length."""

from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from parity.errors import InputError
from parity.evaluation.batches import Batch, TokenLogprobs, group_sequences, lay_out, plan_batches

Progress = Callable[[int, int], None]
"""Called after each batch with the number of tokens that were computed so far, and with their number at the end, both
with padding. The time for a token is about the same in all batches."""


class Request(NamedTuple):
    """A continuation that is scored after a context."""

    context: Sequence[int] | np.ndarray
    """Token ids, at least one. For a text without a context put the end-of-text token here."""
    continuation: Sequence[int] | np.ndarray
    """Token ids, at least one and at most n_ctx."""


class Score(NamedTuple):
    """The result of a request."""

    logprob: float
    """Log-probability of the continuation in nats: the sum of token_logprobs, in float64."""
    is_greedy: bool
    """Whether each token is the most likely one. Among equal logits the first id is the most likely."""
    token_logprobs: np.ndarray
    """Log-probability of each token of the continuation, float32 [n] (float64 if the parameters are)."""
    n_truncated: int
    """Number of tokens that were cut from the left of the context."""
    margin: float
    """The smallest margin of a token: its logit minus the largest logit of any other token. Backends can disagree on
    `is_greedy` only where rounding can change the sign of this."""
    top_ids: np.ndarray
    """Ids of the `top` most likely tokens at the position of each token of the continuation, int [n, top], in
    descending order; the first id first among equal logits."""
    top_logprobs: np.ndarray
    """Their log-probabilities, float [n, top]."""


class Scorer:
    """Scores requests with a model.

    Args:
        backend: The package gpt_torch or gpt_jax.
        model: A GPTModel of the backend.
        batch_size: Number of rows per batch, where a row has one context with its continuations. By default, as many as
            together have a number of tokens with which the device is fast.
        mesh: Devices that share each batch (gpt_jax only); see gpt_jax.sharding.make_mesh. If torchrun started several
            processes, they share the batches without a mesh.

    Raises:
        InputError: For a batch_size below 1, and for a mesh that the backend does not support.
    """

    def __init__(self, backend: Any, model: Any, batch_size: int | None = None, mesh: Any = None):
        if batch_size is not None and batch_size < 1:
            raise InputError(f"--batch-size {batch_size}: at least one row per batch is needed")
        self._batch_size = batch_size
        self._score_batches = backend.scoring.BatchScorer(model, mesh)
        self.config = self._score_batches.config

    def score(
        self,
        requests: Sequence[Request],
        progress: Progress | None = None,
        skip: Container[int] = (),
        top: int = 0,
    ) -> Iterator[tuple[int, Score]]:
        """Score each request.

        Args:
            requests: The requests, in any order.
            progress: Called after each batch.
            skip: Indices of requests whose scores are known already. The batches, and so the results, are those of a
                call without it.
            top: Number of the most likely tokens to return for each position.

        Yields:
            The index of a request and its score, as soon as its batch is computed; the longest requests come first.

        Raises:
            InputError: For an empty context or continuation, a continuation longer than n_ctx, an id outside the
                vocabulary, or `top` out of range, in the call itself; and if the log-probabilities are not finite.
        """
        if not 0 <= top <= self.config.n_vocab:
            raise InputError(f"top must be between 0 and the size of the vocabulary, {self.config.n_vocab}; got {top}")
        cut = [truncate(request, self.config.n_ctx, f"request {index}") for index, request in enumerate(requests)]
        for index, (sequence, _) in enumerate(cut):
            self._check_ids(sequence, f"request {index}")
        counts = [len(request.continuation) for request in requests]
        return self._scores(cut, counts, progress, skip, top)

    def batches(self, requests: Sequence[Request]) -> list[Batch]:
        """Return the batches of score() for the same requests, in its order; see there for errors."""
        cut = [truncate(request, self.config.n_ctx, f"request {index}") for index, request in enumerate(requests)]
        return self.plan([sequence for sequence, _ in cut], [len(request.continuation) for request in requests])

    def plan(self, sequences: Sequence[np.ndarray], counts: Sequence[int]) -> list[Batch]:
        """Return the batches of sequences (see truncate()) whose last `counts[index]` tokens are scored."""
        groups = group_sequences(sequences, counts, self.config.n_ctx, self._score_batches.can_share)
        return plan_batches(groups, self.config.n_ctx, self._n_rows, self._score_batches.n_shards)

    def _n_rows(self, n_inputs: int) -> int:
        """The number of rows of a batch, given its padded length: a multiple of the number of devices."""
        n_shards = self._score_batches.n_shards
        wanted = self._batch_size or self._score_batches.tokens_per_batch // n_inputs
        return max(1, -(-wanted // n_shards)) * n_shards

    def _check_ids(self, sequence: np.ndarray, name: str) -> None:
        low, high = int(sequence.min()), int(sequence.max())
        if low < 0 or high >= self.config.n_vocab:
            raise InputError(
                f"{name}: token id {low if low < 0 else high} is outside the vocabulary 0..{self.config.n_vocab - 1}; "
                "was the text encoded for this model?"
            )

    def _scores(
        self,
        cut: Sequence[tuple[np.ndarray, int]],
        counts: Sequence[int],
        progress: Progress | None,
        skip: Container[int],
        top: int,
    ) -> Iterator[tuple[int, Score]]:
        """Yield the scores of the last `counts[index]` tokens of each sequence; `cut` is what truncate() returned."""
        sequences = [sequence for sequence, _ in cut]
        batches = self.plan(sequences, counts)
        batches = [b for b in batches if any(index not in skip for group in b.groups for index in group.indices)]
        total = sum(batch.n_rows * batch.n_inputs for batch in batches)
        done = 0
        for first in range(0, len(batches), self._score_batches.n_batches):
            together = batches[first : first + self._score_batches.n_batches]
            layouts = [lay_out(batch, sequences, counts) for batch in together]
            for layout, flat in zip(layouts, self._score_batches(layouts, top), strict=True):
                ends = np.cumsum(list(layout.counts.values()))
                parts = zip(*(np.split(array, ends[:-1]) for array in flat), strict=True)
                for index, arrays in zip(layout.counts, parts, strict=True):
                    if index not in skip:
                        yield index, _score(TokenLogprobs(*arrays), cut[index][1], f"request {index}")
            done += sum(batch.n_rows * batch.n_inputs for batch in together)
            if progress is not None:
                progress(done, total)


def _score(result: TokenLogprobs, n_truncated: int, name: str) -> Score:
    if not np.isfinite(result.logprobs).all():
        raise InputError(
            f"{name}: the model's log-probabilities are not finite; are its weights damaged, or is its dtype too "
            "narrow for them?"
        )
    return Score(
        logprob=float(result.logprobs.sum(dtype=np.float64)),
        is_greedy=bool(result.is_greedy.all()),
        token_logprobs=result.logprobs,
        n_truncated=n_truncated,
        margin=float(result.margins.min()),
        top_ids=result.top_ids,
        top_logprobs=result.top_logprobs,
    )


def truncate(request: Request, n_ctx: int, name: str = "the request") -> tuple[np.ndarray, int]:
    """Join context and continuation, and cut the context from the left, so that they fit.

    The last token of the continuation is only scored, so that n_ctx + 1 tokens fit.

    Args:
        request: The request.
        n_ctx: Largest number of tokens that enter the model.
        name: What the request is called in error messages.

    Returns:
        The remaining tokens, and the number of those that were cut.

    Raises:
        InputError: If the context or the continuation is empty, or the continuation is longer than n_ctx.
    """
    if len(request.context) == 0:
        raise InputError(f"{name} has an empty context; put the end-of-text token before the text")
    if len(request.continuation) == 0:
        raise InputError(f"{name} has an empty continuation, so there is nothing to score")
    if len(request.continuation) > n_ctx:
        raise InputError(
            f"{name} has a continuation of {len(request.continuation)} tokens, more than the model's context, "
            f"n_ctx={n_ctx}; shorten it, or divide it into windows"
        )
    tokens = np.concatenate([np.asarray(request.context, np.int64), np.asarray(request.continuation, np.int64)])
    return tokens[-(n_ctx + 1) :], max(0, len(tokens) - (n_ctx + 1))


def windows(
    tokens: Sequence[int] | np.ndarray, length: int, stride: int | None = None, is_last_full: bool = False
) -> list[Request]:
    """Divide a text that is longer than the context into windows, in which each token is scored once at most.

    Windows start at tokens 0, stride, 2 stride, ... and hold `length` tokens each, fewer at the end of the text. A
    window scores the tokens that no earlier window has scored, except its own first token, which has no context there.

    The protocols in use are: `length=n_ctx, stride=S` (Hugging Face's page on perplexity; with S = n_ctx, the tokens
    0, n_ctx, 2 n_ctx, ... are never scored); `length=n_ctx + 1, stride=n_ctx, is_last_full=True` on a text that begins
    with the end-of-text token (lm-evaluation-harness); `length=n_ctx + 1, stride=32` (Megatron-LM's overlapping
    evaluation).

    Args:
        tokens: Token ids of the whole text, at least two. The first one is never scored.
        length: Number of tokens per window, at most n_ctx + 1.
        stride: Distance between the starts of windows; by default length - 1, which scores all tokens but the first.
        is_last_full: Whether the last window starts earlier, so that it has `length` tokens too (if the text has).

    Raises:
        InputError: For fewer than two tokens, and for a length or a stride out of range.
    """
    stride = length - 1 if stride is None else stride
    if len(tokens) < 2:
        raise InputError(f"a text of {len(tokens)} tokens has no token to score after another; two are needed")
    if length < 2 or not 1 <= stride <= length:
        raise InputError(f"windows of {length} tokens with stride {stride}: the stride must be in 1..{length}")
    ids = np.asarray(tokens)
    requests = []
    scored = 0  # tokens before this one are done
    for start in range(0, len(ids), stride):
        end = min(start + length, len(ids))
        first = max(scored, start + 1)
        begin = max(0, end - length) if is_last_full else start
        if first < end:
            requests.append(Request(ids[begin:first], ids[first:end]))
        scored = end
        if end == len(ids):
            break
    return requests
