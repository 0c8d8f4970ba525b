"""Several examples in one row: the same losses and steps as one example per row, in both backends."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from support.models import TINY

import gpt_jax.packing
import gpt_torch.packing
from gpt_jax.train import Trainer as JaxTrainer
from gpt_torch.train import Trainer as TorchTrainer
from parity.comparison.compare import compare
from parity.config import IGNORE_INDEX
from parity.data.tokenizer import ByteTokenizer
from parity.errors import InputError
from parity.training.settings import recipe
from parity.tuning import embedded, template
from parity.tuning.encoding import Example, encode_example
from parity.tuning.examples import Examples
from parity.tuning.packing import PADDING, Packed, best_fit
from parity.tuning.records import Conversation, Turn
from parity.weights.adapters import LoraConfig

BYTES = ByteTokenizer()
CONFIG = dataclasses.replace(TINY, n_vocab=257, n_ctx=112)
SETTINGS = dataclasses.replace(
    recipe("tiny").settings, steps=20, batch_size=4, accumulate=2, dtype="float64", weight_decay=0.3
)
TRAINERS = {"jax": (JaxTrainer, gpt_jax), "torch": (TorchTrainer, gpt_torch)}


@pytest.fixture(scope="module")
def examples():
    records = [r for r in embedded.instructions()[:40] if len(r["instruction"]) < 24]
    conversations = (Conversation((Turn(r["instruction"], r["input"], r["output"]),), "", "") for r in records)
    short = [Example(np.arange(n, dtype=np.int32), np.arange(1, n + 1, dtype=np.int32)) for n in (9, 14, 20, 3)]
    return [*short, *(encode_example(template.render(c), BYTES) for c in conversations)]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def micro_batches(batch, A=2):
    return tuple(array.reshape(A, -1, *array.shape[1:]) for array in batch)


# Rows


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        ([5, 5, 5], [[0, 1], [2]]),
        ([2, 9, 1, 8, 3], [[0, 3], [1, 2], [4]]),
        ([10], [[0]]),
        ([4, 3, 3, 6, 4], [[0, 3], [1, 2, 4]]),
    ],
)
def test_each_example_goes_into_the_fullest_row_with_room(lengths, rows):
    assert best_fit(lengths, 10) == rows


def test_the_rows_of_many_examples():
    lengths = np.random.default_rng(0).integers(1, 100, 3000).tolist()
    rows = best_fit(lengths, 128)
    assert sorted(index for row in rows for index in row) == list(range(3000))
    sizes = [sum(lengths[index] for index in row) for row in rows]
    assert max(sizes) <= 128
    assert sum(sizes) / (128 * len(rows)) > 0.99


def test_batches_hold_every_example_once_per_epoch(examples):
    packed = Packed(examples, CONFIG.n_ctx, BYTES.eos_id)
    assert len(packed) < len(examples)
    assert packed.n_targets == Examples(examples, CONFIG.n_ctx, 0).n_targets
    seen = [index for step in range(len(packed)) for index in packed.batch_windows(3, step, 4)]
    assert sorted(seen) == sorted(4 * list(range(len(examples))))
    inputs, targets, segments = packed.batch(3, 1, 4)
    assert inputs.shape == targets.shape == segments.shape == (4, CONFIG.n_ctx)
    for row, indices in enumerate(packed.rows[n] for n in packed._numbers(3, 1, 4)):
        for segment, index in enumerate(indices, 1):
            here = segments[row] == segment
            np.testing.assert_array_equal(inputs[row, here], examples[index].inputs)
            np.testing.assert_array_equal(targets[row, here], examples[index].targets)
        assert (targets[row, segments[row] == PADDING] == IGNORE_INDEX).all()
    part = packed.batch(3, 1, 4, [1, 3])
    for got, want in zip(part, (inputs, targets, segments), strict=True):
        np.testing.assert_array_equal(got, want[[1, 3]])


def test_in_order_covers_every_target(examples):
    packed = Packed(examples, CONFIG.n_ctx, BYTES.eos_id)
    batches = list(packed.in_order(4))
    assert {batch[0].shape for batch in batches} == {(4, CONFIG.n_ctx)}
    assert sum(int((batch[1] != IGNORE_INDEX).sum()) for batch in batches) == packed.n_targets
    halves = [list(packed.in_order(4, part)) for part in (slice(0, 2), slice(2, 4))]
    for batch, *parts in zip(batches, *halves, strict=True):
        for whole, *pieces in zip(batch, *parts, strict=True):
            np.testing.assert_array_equal(np.concatenate(pieces), whole)


# Equality with one example per row


def steps(name, packing, examples, count=2, config=CONFIG, lora=None, settings=SETTINGS, init_from=None):
    """Train on the rows of a packed dataset, or on the same examples in rows of their own; return metrics and state."""
    make, package = TRAINERS[name]
    packed, padded = Packed(examples, config.n_ctx, BYTES.eos_id), Examples(examples, config.n_ctx, BYTES.eos_id)
    objective = package.packing.PACKED if packing else None
    trainer = make(config, settings, init_from, lora=lora, objective=objective)
    metrics = []
    for step in range(count):
        batch = packed.batch(0, step, 4)
        if not packing:
            chosen = [padded.examples[index] for index in packed.batch_windows(0, step, 4)]
            chosen += [None] * (len(chosen) % 2)
            batch = padded._stack(chosen, range(len(chosen)))
        result = trainer.train_step(trainer.to_device(*micro_batches(batch)), 1e-2, step)
        metrics.append([float(result[key]) for key in ("loss", "grad_norm")])
    evaluated = sum(
        float(trainer.evaluate_batch(trainer.to_device(*batch)))
        for batch in (packed if packing else padded).in_order(4)
    )
    model = trainer.model if lora is None else package.lora.merge(trainer.model)
    return np.array([*metrics, [evaluated, evaluated]]), package.export_weights(model)


def assert_equal(got, want):
    result = compare("losses and norms", got[0], want[0], 0, 1e-11)
    assert result.ok, str(result)
    for name, array in want[1].items():
        result = compare(name, got[1][name], array, 1e-9)
        assert result.ok, str(result)


@pytest.mark.parametrize("name", TRAINERS)
def test_packed_rows_make_the_same_steps(examples, name):
    """In float64, over steps of two micro-batches, and in the evaluation."""
    assert_equal(steps(name, True, examples), steps(name, False, examples))


def test_both_backends_make_the_same_steps(examples):
    config = dataclasses.replace(CONFIG, tied_head=False)
    got, want = (steps(name, True, examples, 20, config) for name in ("jax", "torch"))
    assert_equal(got, want)


# Errors


def positions_not_restarted(monkeypatch):
    def cummax(x, dim):
        return torch.return_types.cummax((torch.zeros_like(x), x))

    monkeypatch.setattr(torch.Tensor, "cummax", cummax)


def segments_see_each_other(monkeypatch):
    packed_loss = gpt_torch.packing.packed_loss
    hidden = gpt_torch.packing.packed_hidden

    def wrong(model, tokens, segments):
        blocks, right = model.trf_blocks, type(model.trf_blocks[0]).forward
        T = tokens.shape[1]
        causal = torch.ones(T, T, dtype=torch.bool).tril()
        monkeypatch.setattr(type(blocks[0]), "forward", lambda self, x, mask: right(self, x, causal))
        return hidden(model, tokens, segments)

    monkeypatch.setattr(gpt_torch.packing, "packed_hidden", wrong)
    assert gpt_torch.packing.packed_loss is packed_loss


def segment_one_position_late(monkeypatch):
    stack = Packed._stack

    def wrong(self, rows):
        inputs, targets, segments = stack(self, rows)
        return inputs, targets, np.roll(segments, 1, axis=1)

    monkeypatch.setattr(Packed, "_stack", wrong)


@pytest.mark.parametrize("planted", [positions_not_restarted, segments_see_each_other, segment_one_position_late])
def test_errors_in_packing_are_caught(examples, monkeypatch, planted):
    want = steps("torch", False, examples, 1)
    planted(monkeypatch)
    got = steps("torch", True, examples, 1)
    assert not compare("losses and norms", got[0], want[0], 0, 1e-6).ok


@pytest.mark.parametrize(("name", "kernel"), [("jax", "cudnn"), ("torch", "sdpa")])
def test_a_fused_kernel_is_refused(name, kernel):
    make, package = TRAINERS[name]
    ids = np.zeros((1, 1, 8), np.int32)
    trainer = make(CONFIG, SETTINGS, attention=kernel, objective=package.packing.PACKED)
    with pytest.raises(InputError, match=r"packed rows.*explicit"):
        trainer.train_step(trainer.to_device(ids, ids, ids), 1e-3, 0)


def test_adapters_and_float32(examples, tmp_path):
    gpt_torch.save_pretrained(gpt_torch.GPTModel(CONFIG, seed=0), tmp_path)
    settings = dataclasses.replace(SETTINGS, dtype="float32")
    lora = LoraConfig(2)
    got, want = (steps("jax", packing, examples, 2, lora=lora, settings=settings, init_from=str(tmp_path))
                 for packing in (True, False))  # fmt: skip
    assert compare("losses and norms", got[0], want[0], 0, 2e-6).ok
