"""What the server needs of gpt_jax: batches of few shapes, so that few programs serve all requests.

gpt_torch/serving.py has the same names.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from gpt_jax.decoding import DecodingModel, for_decoding
from gpt_jax.generation_loop import run
from gpt_jax.model import GPTModel
from parity.generation import Chunk, Request, bucket
from parity.sampling import ActiveRules

STEPS_PER_CALL = 4
"""Number of tokens between two transfers to the host, at which a row may be cancelled."""
_SIZES = (1, 4, 16, 64)
"""Numbers of rows per batch, below the largest. On a CPU, a token of 4 rows takes twice as long as one of a single row,
and a token of 16 rows three times as long."""

_SMALLEST_WIDTH = 32
_WARM_UP_TOKENS = 2**11
"""Batches with more tokens are not computed at the start, where they would take longer than to compile later."""


def for_serving(model: GPTModel) -> DecodingModel:
    """Return the model with which `decode` is called."""
    return for_decoding(model)


def batch_size(n_rows: int, largest: int) -> int:
    """Return the number of rows of the batch that decodes `n_rows` rows."""
    return next(size for size in (*_SIZES, largest) if size >= n_rows and (size <= largest))


def decode(model: DecodingModel, request: Request) -> Iterator[Chunk]:
    """Yield new tokens, a few at a time, until every row has ended."""
    return run(model, _with_common_shape(request), STEPS_PER_CALL)


def shapes(largest_batch: int, n_ctx: int) -> list[tuple[int, int]]:
    """Return (rows, length of the prompts) of the batches whose programs are compiled at the start."""
    sizes = sorted({batch_size(min(size, largest_batch), largest_batch) for size in (*_SIZES, largest_batch)})
    return [(rows, width) for width in _widths(n_ctx) for rows in sizes if rows == 1 or rows * width <= _WARM_UP_TOKENS]


def _with_common_shape(request: Request) -> Request:
    """Return the same request with one of few lengths of prompts and buffers, and of few sets of rules."""
    context = request.context_size
    P = request.tokens.shape[1]
    width = next(width for width in _widths(context) if width >= P)
    padding = width - P
    filtered = any(request.active[1:])
    request = dataclasses.replace(
        request,
        tokens=np.pad(request.tokens, ((0, 0), (padding, 0))),
        active=ActiveRules(True, *(filtered for _ in request.active[1:])),
        n_cached_steps=context,  # no row generates so many, but the cache has one length
        segment=bucket(context),
    )
    inputs = request.inputs._replace(uniforms=request.uniforms(0), pad_lengths=request.inputs.pad_lengths + padding)
    return dataclasses.replace(request, inputs=inputs)


def _widths(n_ctx: int) -> list[int]:
    """Powers of two from _SMALLEST_WIDTH to the first that has room for the context."""
    widths = [_SMALLEST_WIDTH]
    while widths[-1] < n_ctx:
        widths.append(2 * widths[-1])
    return widths
