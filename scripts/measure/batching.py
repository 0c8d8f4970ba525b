"""The benchmark of batches of examples: padded to buckets, padded to the longest example, or packed into rows."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from measure import peers
from measure.args import Args
from measure.report import Measurement
from measure.timing import Workload, interleave
from parity.config import GPTConfig
from parity.training.settings import TrainSettings, recipe
from parity.tuning.encoding import Example
from parity.tuning.examples import POOL, Examples
from parity.tuning.packing import Packed

BATCH_SIZE = 8
# Of the 935 examples for training of the book's instruction set, in GPT-2's tokens with the template "alpaca": the
# shortest length, that of every next 5 %, and the longest.
LENGTHS = (40, 45, 47, 48, 50, 51, 51, 52, 53, 54, 56, 56, 57, 58, 60, 61, 62, 64, 67, 71, 91)
ROW = 256
"""Number of positions of a row that holds several examples."""


def batching(args: Args) -> list[Measurement]:
    """Measure the training steps of gpt_jax on the same examples, batched in three ways."""
    config = GPTConfig(n_vocab=50304, n_ctx=ROW, n_embd=384, n_head=6, n_layer=6)
    if args.preset is not None or args.gpu:
        config = dataclasses.replace(recipe(args.preset or args.size).model, n_ctx=ROW)
    settings = TrainSettings(batch_size=BATCH_SIZE, accumulate=1, dtype="bfloat16" if args.gpu else "float32")
    specs = {name: args.spec(steps, config, settings, name) for name in ("buckets", "longest", "packed")}
    titles = {"buckets": "buckets", "longest": "padded to the longest", "packed": f"packed into rows of {ROW}"}
    timings, _ = interleave({titles[name]: spec for name, spec in specs.items()}, args.rounds, args.calls)
    examples = examples_of(config)
    n_tokens = sum(len(example.inputs) for example in examples)
    positions = {titles[name]: sum(batch[0].size for batch in batches(examples, config, name)) for name in specs}
    note = "Positions computed: " + "; ".join(
        f"{name} {count:,} ({1 - n_tokens / count:.1%} padding)" for name, count in positions.items()
    )
    title = f"{len(examples)} examples with the lengths of the book's, {n_tokens:,} tokens, {settings.dtype}"
    return [Measurement(title, "epoch", n_tokens, "tokens", timings, [note])]


def examples_of(config: GPTConfig) -> list[Example]:
    """Return as many examples as a pool of batches has, whose lengths have the distribution of LENGTHS."""
    generator = np.random.default_rng(0)
    places = np.linspace(0, len(LENGTHS) - 1, POOL * BATCH_SIZE)
    lengths = np.interp(places, range(len(LENGTHS)), LENGTHS).round().astype(int)
    ids = (generator.integers(0, config.n_vocab, length + 1, dtype=np.int32) for length in lengths)
    return [Example(tokens[:-1], tokens[1:]) for tokens in ids]


def batches(examples: Sequence[Example], config: GPTConfig, way: str) -> list[tuple[np.ndarray, ...]]:
    """Return the batches of an epoch: "buckets", "longest" or "packed"."""
    if way == "packed":
        packed = Packed(examples, config.n_ctx, 0)
        size = max(1, BATCH_SIZE * max(LENGTHS) // config.n_ctx)
        return list(packed.in_order(size))
    dataset = Examples(examples, config.n_ctx, 0)
    padded = [dataset.batch(0, step, BATCH_SIZE) for step in range(POOL)]
    if way == "longest":
        T = max(inputs.shape[1] for inputs, _ in padded)
        ends = [((0, 0), (0, T - inputs.shape[1])) for inputs, _ in padded]
        padded = [
            (np.pad(inputs, end), np.pad(targets, end, constant_values=-1))
            for (inputs, targets), end in zip(padded, ends, strict=True)
        ]
    return padded


def steps(config: GPTConfig, settings: TrainSettings, way: str) -> Workload:
    """The optimizer steps of an epoch in gpt_jax."""
    import jax

    from gpt_jax.packing import PACKED
    from gpt_jax.train import Trainer

    trainer = Trainer(config, settings, objective=PACKED if way == "packed" else None)
    given = batches(examples_of(config), config, way)

    def epoch() -> None:
        losses: list[Any] = [trainer.train_step(trainer.to_device(*(a[None] for a in b)), 1e-4, 0) for b in given]
        jax.block_until_ready(losses)

    return peers.in_jax(epoch)
