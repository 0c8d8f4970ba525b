"""Limits of generation: memory and programs follow what is generated, not what may be; and numbers at their edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support import numpy_oracle as oracle
from support.models import TINY, probing_weights

import gpt_jax
import gpt_torch
from gpt_jax.generation_loop import _cached_loop, _start
from parity import generation
from parity.errors import InputError
from parity.sampling import MOST_SAMPLES, RowOptions, check_options, row_options, uniforms

PACKAGES = (gpt_torch, gpt_jax)
PROMPTS = [[5], [90, 0, 7, 7, 31, 2, 4]]


@pytest.fixture(scope="module")
def models():
    return [package.adapter.build(TINY, probing_weights(TINY, np.float32)) for package in PACKAGES]


def test_several_segments_give_what_one_gives(models, monkeypatch):
    """A segment has room for 4,096 tokens; here one for 32, so that 100 tokens take four."""
    options = {"seed": 3, "temperature": 0.8, "repetition_penalty": 1.1}
    for package, model in zip(PACKAGES, models, strict=True):
        rows, logprobs = package.generate(model, PROMPTS, 100, return_logprobs=True, **options)
        stop = [rows[0][30:36], rows[1][105:107]]  # the first one begins in the first segment and ends in the second
        stopped = package.generate(model, PROMPTS, 100, stop=stop, **options)
        assert [len(row) for row in stopped] == [36, 107]
        with monkeypatch.context() as patch:
            patch.setattr(generation, "SMALLEST_SEGMENT", 32)
            again, logprobs_again = package.generate(model, PROMPTS, 100, return_logprobs=True, **options)
            assert again == rows
            np.testing.assert_allclose(logprobs_again, logprobs, rtol=1e-5)
            assert package.generate(model, PROMPTS, 100, stop=stop, **options) == stopped
            extra = {"every": 7} if package is gpt_jax else {}
            steps = list(package.stream(model, PROMPTS, 100, **options, **extra))
            assert [list(tokens) for tokens in zip(*steps, strict=True)] == [
                row[len(prompt) :] for prompt, row in zip(PROMPTS, rows, strict=True)
            ]


@pytest.mark.parametrize("limit", [10**9, 2**31 - 1])
def test_a_limit_that_is_not_reached_costs_nothing(models, limit):
    for package, model in zip(PACKAGES, models, strict=True):
        [row] = package.generate(model, [[1]], 6, temperature=0)
        eos = row[4]
        assert package.generate(model, [[1]], limit, temperature=0, eos_id=eos) == [row[: row.index(eos, 1) + 1]]
        own = [{"max_new_tokens": limit, "stop": [[eos]]}, {"max_new_tokens": 1}]
        rows = package.generate(model, [[1], [2]], 3, temperature=0, per_prompt=own)
        assert rows[0] == row[: row.index(eos, 1) + 1]
        assert len(rows[1]) == 2
        assert next(iter(package.stream(model, [[1]], limit, temperature=0))) == [row[1]]
    request = generation.prepare(TINY, [[1]], limit, {"stop": [[eos] * 20]})
    assert sum(array.nbytes for array in (request.tokens, *request.inputs[:-1])) < 100_000


def test_samples_have_a_limit_and_the_message_says_what_to_do():
    for samples in (MOST_SAMPLES + 1, 10**9):
        with pytest.raises(InputError, match=r"samples must be in 1..65536.*first_row"):
            generation.prepare(TINY, [[1]], 3, {"samples": samples})


@pytest.mark.parametrize("start", [0, 1, 7, 8, 9, 4095, 4096, 100_003])
def test_numbers_from_any_position_are_those_of_the_whole_stream(start):
    [whole] = uniforms([9], [2**64 - 1], [0], start + 20)
    assert uniforms([9], [2**64 - 1], [start], 20).tolist() == [whole[start:].tolist()]


def test_numbers_of_a_position_far_away_need_no_memory():
    assert uniforms([1], [2], [2**62], 5).shape == (1, 5)


def test_one_program_serves_every_top_k_and_stop(models):
    model = gpt_jax.for_decoding(models[1])
    gpt_jax.generate(model, PROMPTS, 9, top_k=5)
    before = _start._cache_size(), _cached_loop._cache_size()
    for top_k in (1, 2, 40, 96):
        gpt_jax.generate(model, PROMPTS, 9, top_k=top_k)
    for length in (1, 2, 3, 5, 9, 16):
        gpt_jax.generate(model, PROMPTS, 9, top_k=7, stop=[[96] * length])
    gpt_jax.generate(model, PROMPTS, 9, top_k=7, stop=[[96], [95, 96], [94]], eos_id=93)
    assert (_start._cache_size(), _cached_loop._cache_size()) == before


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "options", [{"top_k": 38}, {"top_k": 30}, {"top_k": 38, "top_p": 0.9}, {"temperature": 0}], ids=str
)
def test_zeros_of_both_signs_are_equal(options, dtype):
    generator = np.random.default_rng(0)
    logits = np.concatenate([np.full((40, 57), -3.0), np.full((40, 25), 0.0), np.full((40, 15), 2.0)], axis=1)
    logits = generator.permuted(logits, axis=1).astype(dtype)
    if options.get("temperature") == 0:
        logits = np.minimum(logits, 0)
    logits[(logits == 0) & (generator.random(logits.shape) < 0.5)] = -0.0
    u = generator.random(40).astype(np.float32)
    expected = [oracle.choose(row, x, **options) for row, x in zip(logits, u.astype(np.float64), strict=True)]
    rows, active = row_options([check_options(options, 97)] * 40, 97)
    with jax.enable_x64(dtype == np.float64):
        for package, array in zip(PACKAGES, (torch.from_numpy, jnp.asarray), strict=True):
            by_row = RowOptions(*map(array, rows))
            chosen = package.sampling.choose(array(logits), None, array(u), by_row, active)
            assert chosen.tolist() == expected, package
