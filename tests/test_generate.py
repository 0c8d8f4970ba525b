"""Same weights, options and seed: same tokens in both backends, and as the oracle chooses."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_oracle as oracle
import pytest
import torch
from conftest import TINY, probing_weights

import gpt_jax
import gpt_torch
from gpt_jax.generate import _loop
from gpt_jax.generate import choose as choose_jax
from gpt_torch.generate import choose as choose_torch
from parity.errors import InputError
from parity.noise import uniforms

PROMPTS = [[5], [1, 2, 3], [90, 0, 7, 7, 31, 2, 4]]
OPTIONS = [
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.6, "top_k": 7},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.95},
    {"temperature": 1.0, "top_k": 1},
]


def models():
    pair = gpt_torch.GPTModel("tiny"), gpt_jax.GPTModel("tiny")
    for package, model in zip((gpt_torch, gpt_jax), pair, strict=True):
        package.load_weights(model, probing_weights(TINY, np.float32))
    return pair


def by_oracle(prompt, row, new, options, seed):
    """No cache, no padding, float64."""
    weights = probing_weights(TINY)
    tokens = list(prompt)
    for u in uniforms(seed, np.array([row]), np.array([len(prompt)]), new)[0]:
        logits = oracle.logits(TINY, weights, np.array([tokens]))[0, -1]
        tokens.append(oracle.choose(logits, u, **options))
    return tokens


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_same_tokens_in_both_and_by_the_oracle(options):
    ours_torch, ours_jax = models()
    for seed in range(3):
        want = [by_oracle(prompt, row, 16, options, seed) for row, prompt in enumerate(PROMPTS)]
        assert gpt_torch.generate(ours_torch, PROMPTS, 16, seed=seed, **options) == want
        assert gpt_jax.generate(ours_jax, PROMPTS, 16, seed=seed, **options) == want


def test_seeds_differ_and_repeat():
    for package, model in zip((gpt_torch, gpt_jax), models(), strict=True):
        a, b, c = (package.generate(model, PROMPTS, 12, seed=seed) for seed in (1, 1, 2))
        assert a == b != c


@pytest.mark.parametrize("options", OPTIONS[:5], ids=str)
def test_choose_against_the_oracle(options):
    """Many rows, ties among them, and uniforms at both ends."""
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(500, 97)) * 3
    logits[::3] = np.round(logits[::3])  # ties
    u = np.concatenate([[0.0, 1 - 2.0**-24], generator.random(498)]).astype(np.float32)
    want = [oracle.choose(row, x, **options) for row, x in zip(logits, u.astype(np.float64), strict=True)]
    top_k, top_p, t = options.get("top_k"), options.get("top_p"), options["temperature"]
    got = choose_torch(torch.from_numpy(logits), torch.from_numpy(u), t, top_k, top_p)
    assert got.tolist() == want
    with jax.enable_x64(True):
        got = choose_jax(jnp.asarray(logits), jnp.asarray(u), t, top_p or 1.0, t == 0, top_k, top_p is not None)
    assert got.tolist() == want


def test_cut_after_eos():
    for package, model in zip((gpt_torch, gpt_jax), models(), strict=True):
        whole = package.generate(model, PROMPTS, 16, seed=4)
        eos = whole[1][6]
        for prompt, row, cut in zip(
            PROMPTS, whole, package.generate(model, PROMPTS, 16, seed=4, eos_id=eos), strict=True
        ):
            new = row[len(prompt) :]
            assert cut == prompt + (new[: new.index(eos) + 1] if eos in new else new)


def test_a_bucket_compiles_once():
    model = models()[1]
    gpt_jax.generate(model, [[1, 2]], 3)
    before = _loop._cache_size()
    for prompt, new, seed, temperature in [([1], 16, 1, 0.7), ([3] * 8, 9, 2, 1.5), ([4] * 7, 1, 3, 1.0)]:
        gpt_jax.generate(model, [prompt], new, seed=seed, temperature=temperature)
    assert _loop._cache_size() == before


def test_torch_mode_is_restored():
    model = gpt_torch.GPTModel({**TINY.to_dict(), "drop_rate": 0.5}).train()
    a, b = (gpt_torch.generate(model, PROMPTS, 5) for _ in range(2))
    assert a == b
    assert model.training


def test_noise_depends_on_seed_row_and_position_only():
    whole = uniforms(7, np.arange(4), np.zeros(4, int), 50)
    part = uniforms(7, np.array([2, 0]), np.array([10, 49]), 1)
    assert part[:, 0].tolist() == [whole[2, 10], whole[0, 49]]
    assert whole.dtype == np.float32
    assert whole.min() >= 0
    assert whole.max() < 1
    assert len(np.unique(whole)) > 190
    many = uniforms(0, np.arange(3), np.zeros(3, int), 100_000)
    assert many.mean(axis=1) == pytest.approx([0.5] * 3, abs=0.005)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "at least one"),
        ([[]], {}, "end-of-text"),
        ([[1], [97]], {}, "token id 97"),
        ([[-1]], {}, "token id -1"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
        ([[1] * 20], {"max_new_tokens": 5}, "exceeds the model's context"),
        ([[1] * 25], {"max_new_tokens": 1}, "more than the model's context"),
        ([[1]], {"temperature": -0.1}, "temperature"),
        ([[1]], {"temperature": float("nan")}, "temperature"),
        ([[1]], {"top_k": 0}, "top_k"),
        ([[1]], {"top_k": 98}, "top_k"),
        ([[1]], {"top_p": 0.0}, "top_p"),
        ([[1]], {"top_p": 1.1}, "top_p"),
        ([[1]], {"eos_id": 97}, "eos_id"),
        ([[1]], {"seed": -1}, "seed"),
    ],
)
def test_bad_requests(prompts, options, message):
    for package, model in ((gpt_torch, gpt_torch.GPTModel("tiny")), (gpt_jax, gpt_jax.GPTModel("tiny"))):
        with pytest.raises(InputError, match=message):
            package.generate(model, prompts, **{"max_new_tokens": 3, **options})
