"""Generation in PyTorch: a loop over a key/value cache. parity/sampling.py has the options and the rules."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Unpack, overload

import numpy as np
import torch
from torch import Tensor

from gpt_torch.model import GPTModel
from gpt_torch.modes import eval_mode, require_values, unwrap
from gpt_torch.sampling import choose
from parity.generation import Chunk, Request, RowInputs, check_finite, pick_prompts, prepare, running_tokens
from parity.sampling import GenerateOptions, RowOptions, integer, seen_tokens


@overload
def generate(
    model: GPTModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 50,
    *notebook_options: Any,
    return_logprobs: Literal[False] = False,
    **options: Unpack[GenerateOptions],
) -> list[list[int]]: ...


@overload
def generate(
    model: GPTModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 50,
    *notebook_options: Any,
    return_logprobs: Literal[True],
    **options: Unpack[GenerateOptions],
) -> tuple[list[list[int]], list[list[float]]]: ...


@overload
def generate(
    model: GPTModel,
    prompts: Tensor | None = None,
    max_new_tokens: int = 50,
    *notebook_options: Any,
    idx: Tensor | None = None,
    **options: Unpack[GenerateOptions],
) -> Tensor: ...


def generate(
    model: GPTModel,
    prompts: Sequence[Sequence[int]] | Tensor | None = None,
    max_new_tokens: int = 50,
    *notebook_options: Any,
    idx: Tensor | None = None,
    return_logprobs: bool = False,
    **options: Unpack[GenerateOptions],
) -> Any:
    """Continue each prompt with generated tokens.

    The same weights, options and seed give the same tokens as gpt_jax.generate.

    Args:
        model: A GPTModel, which torch.compile or DataParallel may have wrapped. It runs in eval mode, and the mode of
            each of its modules is restored after each token.
        prompts: A list of prompts, each a list of token ids; their lengths may differ. Or, as in the notebook, an
            array of integer ids [B, T]: decoding is then greedy unless `temperature` says otherwise, and rows are
            returned as an array.
        max_new_tokens: Maximum number of new tokens per prompt.
        notebook_options: `context_size`, `temperature`, `top_k` and `eos_id` may be given by position, in this order.
        idx: The notebook's name for `prompts`, an array of integer ids [B, T].
        return_logprobs: Whether to return the log-probabilities of the new tokens as well. They are those of the model
            itself, in nats, before the temperature and all filters. Requires prompts as lists.
        options: See parity.sampling.GenerateOptions for each option, its range and its default.

    Returns:
        One row per prompt and sample: its ids and the new ids, which end with `eos_id` or a stop sequence if one was
        generated. With return_logprobs, a pair: the rows, and for each row the list of its new tokens'
        log-probabilities. For an array of prompts, an array [B, T + new] of its dtype, where rows end before `eos_id`
        and shorter rows are padded with it.

    Raises:
        InputError: For an empty prompt, an unknown option, ids and options out of range, and logits that are not
            finite; the message names which.
    """
    ids = pick_prompts(prompts, idx)
    request = prepare(
        unwrap(model).config,
        ids,
        max_new_tokens,
        options,
        notebook_options,
        as_array=isinstance(ids, Tensor),
        return_logprobs=return_logprobs,
    )
    result = request.result(list(run(model, request)))
    return torch.from_numpy(result).to(ids) if isinstance(ids, Tensor) else result


def generate_text_simple(model: GPTModel, idx: Tensor, max_new_tokens: int, context_size: int) -> Tensor:
    """Continue token ids greedily; the notebook's function of this name (Raschka's LLMs-from-scratch, chapter 4).

    Args:
        model: A GPTModel.
        idx: Integer ids [B, T].
        max_new_tokens: Number of new tokens per row.
        context_size: Largest number of tokens that the model attends to, in 1..n_ctx; earlier ones are left out.

    Returns:
        Ids [B, T + max_new_tokens] of the dtype of `idx`: the given ones, and in each step the most likely one.

    Raises:
        InputError: For an id outside the vocabulary, options out of range, and logits that are not finite.
    """
    return generate(model, idx, max_new_tokens, context_size)


def stream(
    model: GPTModel,
    prompts: Sequence[Sequence[int]] | Tensor,
    max_new_tokens: int = 50,
    *,
    every: int = 1,
    **options: Unpack[GenerateOptions],
) -> Iterator[list[int | None]]:
    """Yield the tokens of generate() as they are generated.

    Args:
        model: A GPTModel; it runs in eval mode.
        prompts: A list of prompts, each a list of token ids, or an array of integer ids [B, T].
        max_new_tokens: Maximum number of new tokens per prompt.
        every: Number of tokens per call of gpt_jax's compiled loop; it has no effect here.
        options: See parity.sampling.GenerateOptions for each option, its range and its default.

    Yields:
        For each step a list with the new token of each row, or None for a row that has ended.

    Raises:
        InputError: For the same reasons as in generate(). Bad prompts and options raise in the call itself, before the
            first token.
    """
    request = prepare(unwrap(model).config, prompts, max_new_tokens, options, as_array=isinstance(prompts, Tensor))
    integer({"every": every}, "every", 1, 1, 2**31 - 1)
    return _stream(model, request)  # a separate generator, so that bad options raise here


def _stream(model: GPTModel, request: Request) -> Iterator[list[int | None]]:
    for number, chunk in enumerate(run(model, request)):
        yield running_tokens(chunk.tokens[:, 0], chunk.lengths, number)


@torch.inference_mode()
def run(model: GPTModel, request: Request) -> Iterator[Chunk]:
    """Yield one new token of each row at a time, until every row has ended."""
    model = unwrap(model)
    require_values(model)

    def decode(*args: Any) -> Tensor:
        with eval_mode(model):  # generation has no dropout
            return model.decode(*args)

    device = model.tok_emb.weight.device
    inputs = _to_device(request.inputs, device)
    text = torch.from_numpy(request.tokens).to(device)  # [B, P], and new tokens
    B, P = text.shape
    C = request.context_size
    n_kept = max(P, C)  # number of tokens of the text to keep; stop sequences are not longer than P
    noise = inputs.uniforms  # [B, segment]
    seen = None
    if request.active.repetition_penalty:
        seen = torch.from_numpy(seen_tokens(request.prompts, model.config.n_vocab)).to(device)  # [B, V]
    lengths = torch.zeros(B, dtype=torch.int32, device=device)
    ended = inputs.max_new_per_row == 0
    if ended.all():
        return
    cache = model.new_cache(B, request.cache_length)
    logits = decode(text, cache, 0, inputs.pad_lengths)  # [B, V]
    for number in range(request.max_new_tokens):
        finite = logits.amax(dim=-1).isfinite() | ended
        check_finite(-1 if finite.all() else number)
        if number and number % request.segment == 0:
            noise = torch.from_numpy(request.uniforms(number)).to(device)
        u = noise[:, number % request.segment]  # [B]
        token = choose(logits, seen, u, inputs.options, request.active)  # [B]
        logprob = logits.new_zeros((B, 1))
        top: list[np.ndarray] = []
        if request.return_logprobs:
            logprobs = logits.log_softmax(dim=-1)  # [B, V]
            logprob = logprobs.gather(-1, token[:, None])  # [B, 1]
            if request.n_top:
                top = _most_likely(logprobs, request.n_top)
        lengths = lengths + (~ended).int()
        text = torch.cat([text, token[:, None].int()], dim=1)[:, -n_kept:]
        if seen is not None:
            seen.scatter_(1, token[:, None], True)
        ended = ended | (lengths >= inputs.max_new_per_row) | _stopped(text, inputs, number + 1)
        yield Chunk(token[:, None].cpu().numpy(), logprob.double().cpu().numpy(), lengths.cpu().numpy(), *top)
        if ended.all():
            return
        if number < request.n_cached_steps:
            logits = decode(token[:, None], cache, P + number, inputs.pad_lengths)
        else:  # the context is full: recompute the last C tokens
            n_cropped = P + number + 1 - C
            pad_lengths = (inputs.pad_lengths - n_cropped).clamp(min=0)
            logits = decode(text[:, -C:], model.new_cache(B, C), 0, pad_lengths)


def _most_likely(logprobs: Tensor, count: int) -> list[np.ndarray]:
    """logprobs [B, V] -> the most likely tokens and their log-probabilities, each [B, 1, count]."""
    ordered = logprobs.sort(dim=-1, descending=True, stable=True)  # not topk(), which returns any of several equal ones
    return [array[:, None, :count].cpu().numpy() for array in (ordered.indices, ordered.values.float())]


def _to_device(inputs: RowInputs, device: torch.device) -> RowInputs:
    def convert(array: np.ndarray) -> Tensor:
        x = torch.from_numpy(array)
        if device.type == "mps" and x.dtype == torch.float64:  # which mps does not have
            x = x.float()
        return x.to(device)

    arrays = {name: convert(array) for name, array in inputs._asdict().items() if name != "options"}
    return RowInputs(**arrays, options=RowOptions(*map(convert, inputs.options)))


def _stopped(text: Tensor, inputs: RowInputs, n_new: int) -> Tensor:
    """bool [B], true where the last of the `n_new` new tokens ends a stop sequence of the row."""
    tail = text[:, None, -inputs.stops.shape[2] :]  # [B, 1, W]
    matches = ((tail == inputs.stops) | (inputs.stops < 0)).all(dim=-1)  # [B, stops]
    return (matches & (inputs.stop_lengths <= n_new)).any(dim=-1)
