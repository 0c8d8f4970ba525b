"""What the server needs of gpt_torch; gpt_jax/serving.py has the same names."""

from collections.abc import Iterator

from gpt_torch.generate import run
from gpt_torch.model import GPTModel
from parity.generation import Chunk, Request


def for_serving(model: GPTModel) -> GPTModel:
    """Return the model with which `decode` is called."""
    return model


def batch_size(n_rows: int, largest: int) -> int:
    """Return the number of rows of the batch that decodes `n_rows` rows."""
    return n_rows


def decode(model: GPTModel, request: Request) -> Iterator[Chunk]:
    """Yield new tokens, a few at a time, until every row has ended."""
    return run(model, request)


def shapes(largest_batch: int, n_ctx: int) -> list[tuple[int, int]]:
    """Return (rows, length of the prompts) of batches that are decoded once at the start: there is no program to
    compile, but the first products of a process are slow.
    """
    return [(1, 1)]
