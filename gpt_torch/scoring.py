"""Log-probabilities of given tokens in PyTorch; gpt_jax/scoring.py has the same functions."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, distributed

from gpt_torch.model import GPTModel, head_logits
from gpt_torch.modes import check_ids, eval_mode, unwrap
from parity.errors import InputError
from parity.evaluation.batches import Layout, TokenLogprobs, check_scoring, chunk_sizes

_LARGEST_CHUNK = {"cpu": 2**25}
"""Largest number of logits that exist at a time, by device type; other devices use _LARGEST_CHUNK_OF_ACCELERATORS."""
_LARGEST_CHUNK_OF_ACCELERATORS = 2**29


def token_logprobs(
    model: GPTModel, tokens: Tensor, first: int | None = None, last: int | None = None, top: int = 0
) -> TokenLogprobs:
    """Return the log-probabilities that the model gives to tokens of a text, each after the tokens before it.

    The vocabulary is projected at the scored positions only, and never all of [B, T, V] is in memory. The result has
    no gradient, and dropout is off.

    Args:
        model: The model.
        tokens: Integer ids [B, T], where T is at most n_ctx + 1, because the last token of a row is only scored.
        first: The first position that is scored; by default 0. Position i scores tokens[:, i + 1].
        last: The position after the last one that is scored; by default T - 1, which scores all tokens but the first.
        top: Number of the most likely tokens to return for each position.

    Returns:
        A named tuple of tensors on the model's device, each [B, last - first]: `logprobs`, the log-probabilities of the
        tokens in nats, float32 (float64 if the parameters are); `is_greedy`, whether the token is the most likely one,
        bool; `margins`, its logit minus the largest logit of any other token; and `top_ids` and `top_logprobs`, the
        most likely tokens in descending order and their log-probabilities, [B, last - first, top].

    Raises:
        InputError: If T exceeds n_ctx + 1, an id is outside the vocabulary, or first, last or top is out of range.
    """
    config, weight = unwrap(model).config, unwrap(model).tok_emb.weight
    tokens = torch.as_tensor(tokens, device=weight.device)
    positions = check_scoring(config, tuple(tokens.shape), first, last, top)
    B, K = len(tokens), len(positions)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    check_ids(targets, config)
    x = _hidden(model, inputs)[:, positions.start : positions.stop]  # [B, K, D]
    flat = _flat_logprobs(model, x.flatten(0, 1), targets[:, positions.start : positions.stop].flatten(), top)
    return TokenLogprobs(*(array.unflatten(0, (B, K)) for array in flat))


class BatchScorer:
    """Scores the batches of parity.evaluation.scorer.Scorer. If torchrun started several processes, each of them
    computes whole batches, so that the results are those of one process, and all of them get all results.

    Args:
        model: The model, the same in all processes.
        mesh: Must be None; gpt_jax has meshes of devices.

    Raises:
        InputError: For a mesh.
    """

    def __init__(self, model: GPTModel, mesh: None = None):
        if mesh is not None:
            raise InputError("--mesh is for --backend jax; to use several devices in torch, start it with torchrun")
        self.model = model
        self.config = unwrap(model).config
        is_shared = distributed.is_available() and distributed.is_initialized()
        self.n_batches = distributed.get_world_size() if is_shared else 1
        """Number of batches that are computed at the same time."""
        self.n_shards = 1
        """The number of rows of a batch must be a multiple of this."""
        self.can_share = unwrap(model).attention == "explicit"
        """Whether several continuations of a context can be in one row; the fused kernel has no such mask."""
        self._device = unwrap(model).tok_emb.weight.device
        self.tokens_per_batch = 2**10 if self._device.type == "cpu" else 2**15
        """Number of tokens per batch, with padding, with which this device is fast."""

    def __call__(self, layouts: Sequence[Layout], top: int = 0) -> list[TokenLogprobs]:
        """Score the positions of batches; all processes must call this with the same arguments.

        Args:
            layouts: The batches, at least one and at most n_batches.
            top: See token_logprobs().

        Returns:
            For each batch NumPy arrays [R].
        """
        if self.n_batches == 1:
            return [TokenLogprobs(*(array.cpu().numpy() for array in self._score(layout, top))) for layout in layouts]
        # A process for which there is no batch computes the last one as well.
        batches = [layouts[min(rank, len(layouts) - 1)] for rank in range(self.n_batches)]
        own = self._score(batches[distributed.get_rank()], top)
        counts = [len(batch.rows) for batch in batches]
        gathered = zip(*(_gather(array, counts) for array in own), strict=True)  # of each process
        return [TokenLogprobs(*arrays) for arrays in gathered][: len(layouts)]

    def _score(self, layout: Layout, top: int) -> TokenLogprobs:
        """Score a batch in this process."""
        tokens, positions, segments, rows, columns, targets = (
            torch.as_tensor(array, device=self._device)
            for array in (layout.tokens, layout.positions, layout.segments, layout.rows, layout.columns, layout.targets)
        )
        x = _hidden(self.model, tokens, *((positions, segments) if layout.is_shared else ()))  # [B, T, D]
        return _flat_logprobs(self.model, x[rows, columns], targets, top)


def _gather(array: Tensor, counts: Sequence[int]) -> list[np.ndarray]:
    """Return the array [R, ...] of each process, which have `counts` elements."""
    padded = array.new_zeros((max(counts), *array.shape[1:]))
    padded[: len(array)] = array
    parts = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(parts, padded)
    return [part[:count].cpu().numpy() for part, count in zip(parts, counts, strict=True)]


@torch.no_grad()
def _hidden(model: GPTModel, tokens: Tensor, positions: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
    """Return the input of the output head [B, T, D], for rows that share contexts if there are segments; see Layout."""
    gpt: GPTModel = unwrap(model)
    with eval_mode(gpt):
        if positions is None or segments is None:
            return gpt.hidden(tokens)
        check_ids(tokens, gpt.config)
        slots = torch.arange(tokens.shape[1], device=tokens.device)  # [T]
        queries, keys = segments[:, :, None], segments[:, None, :]
        mask = (slots <= slots[:, None]) & ((keys == 0) | (keys == queries))  # [B, T, S]
        x = gpt.tok_emb(tokens) + gpt.pos_emb(positions)  # [B, T, D]
        for block in gpt.trf_blocks:
            x = block(x, mask[:, None])  # [B, T, D]
        return gpt.final_norm(x)  # [B, T, D]


@torch.no_grad()
def _flat_logprobs(model: GPTModel, x: Tensor, targets: Tensor, top: int) -> TokenLogprobs:
    """x [R, D], targets [R] -> tensors [R], one chunk after another"""
    gpt: GPTModel = unwrap(model)
    largest = _LARGEST_CHUNK.get(x.device.type, _LARGEST_CHUNK_OF_ACCELERATORS)
    sizes = chunk_sizes(len(x), gpt.config.n_vocab, largest)
    sizes[-1] = len(x) - sum(sizes[:-1])
    chunks = zip(x.split(sizes), targets.long().split(sizes), strict=True)
    parts = [_chunk_logprobs(gpt, x, targets, top) for x, targets in chunks]
    return TokenLogprobs(*(torch.cat(arrays) for arrays in zip(*parts, strict=True)))


def _chunk_logprobs(model: GPTModel, x: Tensor, targets: Tensor, top: int) -> TokenLogprobs:
    """x [R, D], targets [R] -> tensors [R]"""
    logits = head_logits(model, x)  # [R, V]
    logits = logits - logits.amax(dim=-1, keepdim=True)  # small numbers, so that float32 loses less
    log_total = logits.exp().sum(dim=-1, keepdim=True).log()  # [R, 1]
    target_logits = logits.gather(-1, targets[:, None])  # [R, 1]
    others = logits.scatter(-1, targets[:, None], -torch.inf).amax(dim=-1, keepdim=True)  # [R, 1]
    if top:  # not topk(), which returns any of several equal elements
        ordered = logits.sort(dim=-1, descending=True, stable=True)
        top_logits, top_ids = ordered.values[:, :top], ordered.indices[:, :top]
    else:
        top_logits, top_ids = logits[:, :0], targets[:, None][:, :0]
    return TokenLogprobs(
        logprobs=(target_logits - log_total)[:, 0],
        is_greedy=logits.argmax(dim=-1) == targets,
        margins=(target_logits - others)[:, 0],
        top_ids=top_ids,
        top_logprobs=top_logits - log_total,
    )
