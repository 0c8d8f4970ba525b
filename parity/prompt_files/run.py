"""Generate the continuations of many prompts in batches, so that no result depends on how the work was divided.

The prompts are taken in blocks of a few batches, whose size follows from the number of all prompts and the size of a
batch. In a block, prompts of similar length share a batch; a batch with fewer prompts is filled up, so that all have
the same number of rows, and few programs are compiled. A part of the work consists of whole blocks, and an interrupted
block is computed again: each prompt is always computed with the same others, to the same bits.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from parity.data.tokenizer import Tokenizer, stream_text
from parity.errors import InputError
from parity.parts import Part
from parity.prompt_files.prompts import BadLine, Prompt

_MOST_BATCHES = 4
"""Of a block; with more, the lengths in a batch would differ less, but an interruption would cost more."""
_FEWEST_BLOCKS = 16
"""Of a file that has as many batches, so that its parts are of similar size."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How many prompts are computed together."""

    n_prompts: int
    batch_size: int
    """Number of prompts per batch."""
    block_size: int
    """Number of prompts per block."""

    @classmethod
    def of(cls, n_prompts: int, n_rows: int, samples: int) -> "Plan":
        """Return the plan for batches of at most n_rows continuations, `samples` of each prompt.

        Raises:
            InputError: If n_rows is below 1.
        """
        if n_rows < 1:
            raise InputError(f"--batch-size {n_rows}: at least one continuation per batch is needed")
        batch_size = min(n_prompts, max(1, n_rows // samples))
        n_batches = -(-n_prompts // batch_size)
        return cls(n_prompts, batch_size, batch_size * max(1, min(_MOST_BATCHES, n_batches // _FEWEST_BLOCKS)))

    def prompts_of(self, part: Part) -> range:
        """Return the indices of the prompts of a part."""
        blocks = part.of(-(-self.n_prompts // self.block_size))
        start, stop = (min(self.n_prompts, block * self.block_size) for block in (blocks.start, blocks.stop))
        return range(start, stop)


def continuations(
    generate: Callable[..., list[list[int]]],
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt | BadLine],
    plan: Plan,
    n_done: int,
    max_new_tokens: int,
    options: Mapping[str, Any],
    progress: Callable[[int, int], None] = lambda n_prompts, n_tokens: None,
) -> Iterator[list[dict[str, Any]]]:
    """Yield the records of the prompts, a block or what is missing of it at a time.

    The random numbers of a prompt depend on its seed and its id alone: as the option `row`, it has its id as a text.

    Args:
        generate: The function of a backend, with the model bound to it.
        tokenizer: Decodes the tokens.
        prompts: The prompts of a part.
        plan: How they are put together.
        n_done: How many of the records are there already.
        max_new_tokens: Largest number of new tokens per continuation.
        options: See parity.sampling.GenerateOptions.
        progress: Called after each batch with the numbers of prompts and of new tokens that were computed.

    Raises:
        InputError: If the model's logits are not finite.
    """
    if n_done == len(prompts):
        return
    finish = functools.partial(_record, tokenizer, options)
    for start in range(n_done - n_done % plan.block_size, len(prompts), plan.block_size):
        block = prompts[start : start + plan.block_size]
        bad = [(i, line) for i, line in enumerate(block) if isinstance(line, BadLine)]
        records: dict[int, dict[str, Any]] = {i: {"id": line.id, "error": line.reason} for i, line in bad}
        good = [(i, line) for i, line in enumerate(block) if isinstance(line, Prompt)]
        good.sort(key=lambda entry: len(entry[1].tokens))  # stable, so a function of the block
        for first in range(0, len(good), plan.batch_size):
            chosen = good[first : first + plan.batch_size]
            rows = _generate(generate, [prompt for _, prompt in chosen], plan.batch_size, max_new_tokens, options)
            for (i, prompt), own in zip(chosen, rows, strict=True):
                records[i] = finish(prompt, own)
            progress(len(chosen), sum(len(row) for own in rows for row in own))
        progress(len(bad), 0)
        yield [records[i] for i in range(max(0, n_done - start), len(block))]


def _generate(
    generate: Callable[..., list[list[int]]],
    prompts: Sequence[Prompt],
    batch_size: int,
    max_new_tokens: int,
    options: Mapping[str, Any],
) -> list[list[list[int]]]:
    """Return the new tokens of each sample of each prompt."""
    n_empty = batch_size - len(prompts)
    tokens = [prompt.tokens.tolist() for prompt in prompts] + [[0]] * n_empty
    own: list[dict[str, Any]] = [{"row": str(p.id)} | ({} if p.seed is None else {"seed": p.seed}) for p in prompts]
    rows = generate(tokens, max_new_tokens, per_prompt=own + [{"max_new_tokens": 1}] * n_empty, **options)
    samples = len(rows) // batch_size
    return [
        [row[len(prompt.tokens) :] for row in rows[i * samples : (i + 1) * samples]] for i, prompt in enumerate(prompts)
    ]


def _record(
    tokenizer: Tokenizer, options: Mapping[str, Any], prompt: Prompt, rows: Sequence[list[int]]
) -> dict[str, Any]:
    return {"id": prompt.id, "continuations": [_continuation(tokenizer, options, row) for row in rows]}


def _continuation(tokenizer: Tokenizer, options: Mapping[str, Any], tokens: list[int]) -> dict[str, Any]:
    ends = [*(options.get("stop") or ()), [options.get("eos_id")]]
    is_stopped = any(tokens[-len(end) :] == end for end in ends)
    text = "".join(stream_text(tokenizer, (token for token in tokens if token != tokenizer.eos_id)))
    return {"text": text, "tokens": tokens, "finish_reason": "stop" if is_stopped else "length"}
