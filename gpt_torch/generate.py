"""Generation in PyTorch: a cached loop, the rules of parity/sampling.py."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gpt_torch.model import GPTModel
from parity.sampling import Request, Sampling, check_finite, prepare


def generate(
    model: GPTModel,
    prompts: Sequence[Sequence[int]] | Tensor | None = None,
    max_new_tokens: int = 50,
    context_size: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    eos_id: int | None = None,
    *,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: Sequence[Sequence[int]] = (),
    samples: int = 1,
    seed: int = 0,
    first_row: int = 0,
    overflow: Literal["crop", "stop"] = "crop",
    return_logprobs: bool = False,
    idx: Tensor | None = None,
) -> Any:
    """Continue each prompt; rows of token ids, prompt included, cut after `eos_id` or a `stop` sequence.

    The same weights, options and seed give the same tokens as gpt_jax.generate. `temperature=0` is
    greedy, 1.0 the default. `samples` rows for each prompt, next to each other. `return_logprobs`:
    (rows, for each row the log-probabilities in nats of its new tokens, from the logits as the model
    gives them). The other options: parity/sampling.py. Raises InputError for empty prompts, ids and
    options out of range, and logits that are not finite.

    As in the notebook, ids [B, T] in an array (or as `idx`) give ids [B, T + new], greedy by default;
    a row that met `eos_id` ends before it, and is filled up with it if others are longer.
    """
    ids = prompts if idx is None else idx
    if temperature is None:
        temperature = 0.0 if isinstance(ids, Tensor) else 1.0
    request = prepare(
        model.config,
        ids.tolist() if isinstance(ids, Tensor) else ids or [],
        max_new_tokens,
        context_size=context_size,
        overflow=overflow,
        eos_id=eos_id,
        stop=stop,
        samples=samples,
        seed=seed,
        first_row=first_row,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    generated, logprobs, lengths = _new_arrays(request)
    for step, (token, logprob, length) in enumerate(_loop(model, request)):
        generated[:, step], logprobs[:, step], lengths = token, logprob, length
    rows = request.rows(generated, lengths)
    if isinstance(ids, Tensor):
        return torch.from_numpy(request.rectangle(rows, eos_id)).to(ids)
    if return_logprobs:
        return rows, [row[:length].tolist() for row, length in zip(logprobs, lengths, strict=True)]
    return rows


def generate_text_simple(model: GPTModel, idx: Tensor, max_new_tokens: int, context_size: int) -> Tensor:
    """The notebook's greedy generation: ids [B, T] -> [B, T + max_new_tokens]."""
    return generate(model, idx, max_new_tokens, context_size)


def stream(
    model: GPTModel, prompts: Sequence[Sequence[int]], max_new_tokens: int = 50, **options: Any
) -> Iterator[list[int | None]]:
    """The tokens of generate() with the same options as they come: a step's tokens, None for a row that ended."""
    request = prepare(model.config, prompts, max_new_tokens, **options)

    def steps() -> Iterator[list[int | None]]:
        for step, (token, _, lengths) in enumerate(_loop(model, request)):
            yield [int(t) if length > step else None for t, length in zip(token, lengths, strict=True)]

    return steps()  # so that bad options are told of at once


def _new_arrays(request: Request) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Empty tokens int32 [B, new] and log-probabilities float64 [B, new], lengths int32 [B]."""
    shape = request.uniforms.shape
    return np.zeros(shape, np.int32), np.zeros(shape), np.zeros(shape[0], np.int32)


@torch.inference_mode()
def _loop(model: GPTModel, request: Request) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each step (tokens [B], their log-probabilities [B], lengths [B] so far), until every row has ended."""
    was_training = model.training
    model.eval()  # dropout has no place here
    try:
        device = model.tok_emb.weight.device
        text, first, uniforms, limits, stops = (
            torch.from_numpy(array).to(device)
            for array in (request.tokens, request.first, request.uniforms, request.limits, request.stops)
        )
        B, P = text.shape
        C = request.context_size
        seen = None
        if request.sampling.repetition_penalty is not None:
            padding = torch.arange(P, device=device) < first[:, None]  # [B, P]
            seen = torch.zeros((B, model.config.n_vocab), dtype=torch.int32, device=device)
            seen = seen.scatter_add(1, text.long(), (~padding).int()) > 0  # [B, V]
        lengths = torch.zeros(B, dtype=torch.int32, device=device)
        ended = limits == 0
        if ended.all():
            return
        cache = model.new_cache(B, request.cache_length)
        logits = model.decode(text, cache, 0, first)
        for step in range(request.max_new_tokens):
            finite = logits.amax(dim=-1).isfinite() | ended
            check_finite(-1 if finite.all() else step)
            token = choose(logits, seen, uniforms[:, step], request.sampling)  # [B]
            logprob = logits.log_softmax(dim=-1).gather(-1, token[:, None])[:, 0]  # [B]
            lengths = lengths + (~ended).int()
            text = torch.cat([text, token[:, None].int()], dim=1)  # [B, P + step + 1]
            if seen is not None:
                seen.scatter_(1, token[:, None], True)
            ended = ended | (lengths >= limits) | _stopped(text, stops, request.stop_lengths, step)
            yield token.cpu().numpy(), logprob.double().cpu().numpy(), lengths.cpu().numpy()
            if ended.all():
                return
            if step < request.cached_tokens:
                logits = model.decode(token[:, None], cache, P + step, first)
            else:  # the last C tokens anew, as in the notebook
                cropped = P + step + 1 - C
                window_first = (first - cropped).clamp(min=0)
                logits = model.decode(text[:, cropped:], model.new_cache(B, C), 0, window_first)
    finally:
        model.train(was_training)


def _stopped(text: Tensor, stops: Tensor, stop_lengths: np.ndarray, step: int) -> Tensor:
    """[B], true where the new tokens end with one of the stops."""
    stops = stops[torch.from_numpy(stop_lengths <= step + 1)]
    tail = text[:, None, -stops.shape[1] :]  # [B, 1, W]
    return ((tail == stops) | (stops < 0)).all(dim=-1).any(dim=-1)


def choose(logits: Tensor, seen: Tensor | None, u: Tensor, sampling: Sampling) -> Tensor:
    """logits [B, V], seen bool [B, V], u [B] -> token ids [B], by the rules of parity/sampling.py."""
    logits = penalised(logits, seen, sampling)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    probs = kept(logits, sampling)
    cdf = probs.cumsum(dim=-1)
    beyond = (cdf > u[:, None] * cdf[:, -1:]) & (probs > 0)
    last_kept = probs.shape[-1] - 1 - (probs > 0).flip(-1).int().argmax(dim=-1)
    return torch.where(beyond.any(dim=-1), beyond.int().argmax(dim=-1), last_kept)


def penalised(logits: Tensor, seen: Tensor | None, sampling: Sampling) -> Tensor:
    if seen is None or sampling.repetition_penalty is None:
        return logits
    lowered = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
    return torch.where(seen, lowered, logits)


def kept(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities [B, V] before the filters, zero for tokens that a filter dropped."""
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        smallest = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    probs = logits.softmax(dim=-1)  # [B, V]
    largest = probs.amax(dim=-1, keepdim=True)
    if sampling.top_p is not None:
        ordered = probs.sort(dim=-1, descending=True).values
        mass_before = ordered.cumsum(dim=-1) - ordered
        count = (mass_before < sampling.top_p).sum(dim=-1, keepdim=True)  # at least 1: nothing is before the first
        probs = probs.masked_fill(probs < ordered.gather(-1, count - 1), 0.0)
    if sampling.min_p is not None:
        probs = probs.masked_fill(probs < sampling.min_p * largest, 0.0)
    return probs
