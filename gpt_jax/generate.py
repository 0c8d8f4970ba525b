"""Generation in JAX; gpt_jax/generation_loop.py is its loop. parity/sampling.py has the options and the rules."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Unpack, overload

import jax.numpy as jnp
from jax import Array

from gpt_jax.decoding import DecodingModel
from gpt_jax.generation_loop import run
from gpt_jax.model import GPTModel
from gpt_jax.weights import config_of
from parity.generation import Request, pick_prompts, prepare, running_tokens
from parity.sampling import GenerateOptions, integer


@overload
def generate(
    model: GPTModel | DecodingModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 50,
    *notebook_options: Any,
    return_logprobs: Literal[False] = False,
    **options: Unpack[GenerateOptions],
) -> list[list[int]]: ...


@overload
def generate(
    model: GPTModel | DecodingModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 50,
    *notebook_options: Any,
    return_logprobs: Literal[True],
    **options: Unpack[GenerateOptions],
) -> tuple[list[list[int]], list[list[float]]]: ...


@overload
def generate(
    model: GPTModel | DecodingModel,
    prompts: Array | None = None,
    max_new_tokens: int = 50,
    *notebook_options: Any,
    idx: Array | None = None,
    **options: Unpack[GenerateOptions],
) -> Array: ...


def generate(
    model: GPTModel | DecodingModel,
    prompts: Sequence[Sequence[int]] | Array | None = None,
    max_new_tokens: int = 50,
    *notebook_options: Any,
    idx: Array | None = None,
    return_logprobs: bool = False,
    **options: Unpack[GenerateOptions],
) -> Any:
    """Continue each prompt with generated tokens.

    The same weights, options and seed give the same tokens as gpt_torch.generate.

    Args:
        model: A GPTModel, or the result of for_decoding(), which is faster if you generate often.
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
            finite; the message names which. Also for a model with adapters in 16 bits: merge() it before cast().
    """
    ids = pick_prompts(prompts, idx)
    request = prepare(
        config_of(model),
        ids,
        max_new_tokens,
        options,
        notebook_options,
        as_array=isinstance(ids, Array),
        return_logprobs=return_logprobs,
    )
    result = request.result(list(run(model, request, steps_per_call=request.max_new_tokens)))
    return jnp.asarray(result, ids.dtype) if isinstance(ids, Array) else result


def generate_text_simple(model: GPTModel | DecodingModel, idx: Array, max_new_tokens: int, context_size: int) -> Array:
    """Continue token ids greedily; the notebook's function of this name (Raschka's LLMs-from-scratch, chapter 4).

    Args:
        model: A GPTModel, or the result of for_decoding().
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
    model: GPTModel | DecodingModel,
    prompts: Sequence[Sequence[int]] | Array,
    max_new_tokens: int = 50,
    *,
    every: int = 1,
    **options: Unpack[GenerateOptions],
) -> Iterator[list[int | None]]:
    """Yield the tokens of generate() as they are generated.

    Args:
        model: A GPTModel, or the result of for_decoding().
        prompts: A list of prompts, each a list of token ids, or an array of integer ids [B, T].
        max_new_tokens: Maximum number of new tokens per prompt.
        every: Number of tokens per call of the compiled loop; they are yielded together.
        options: See parity.sampling.GenerateOptions for each option, its range and its default.

    Yields:
        For each step a list with the new token of each row, or None for a row that has ended.

    Raises:
        InputError: For the same reasons as in generate(). Bad prompts and options raise in the call itself, before the
            first token.
    """
    request = prepare(config_of(model), prompts, max_new_tokens, options, as_array=isinstance(prompts, Array))
    steps_per_call = integer({"every": every}, "every", 1, 1, 2**31 - 1)
    return _stream(model, request, steps_per_call)  # a separate generator, so that bad options raise here


def _stream(model: GPTModel | DecodingModel, request: Request, steps_per_call: int) -> Iterator[list[int | None]]:
    number = 0
    for chunk in run(model, request, steps_per_call):
        for tokens in chunk.tokens.T:
            yield running_tokens(tokens, chunk.lengths, number)
            number += 1
