"""20,000 sampled tokens over a grid of options: torch and Flax agree, and they agree at GPT-2 124M's widths.

Float32 sums differ in their last bits, so a uniform within rounding of a boundary between two tokens may choose the
other one. The tests print each such position, verify it in float64, and count it.
"""

import dataclasses
import math

import numpy as np
import pytest
from support import numpy_oracle as oracle

import gpt_jax
import gpt_torch
from parity.config import PRESETS
from parity.sampling import uniforms
from parity.weights import initial_weights

GRID = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.3},
    {"temperature": 0.7, "top_k": 50},
    {"temperature": 1.0, "top_k": 40, "top_p": 0.95},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.2, "top_k": 200, "min_p": 0.02, "repetition_penalty": 1.1},
    {"temperature": 0.5},
]
ROWS, NEW = 26, 100
NEAR = 2e-5  # a probability or a logit's relative difference that float32 sums may move


def peaked(config):
    """GPT-2's initial weights with larger logits (six times at 124M's width), as peaked as those of a trained model."""
    weights = dict(initial_weights(config, 0))
    weights["ln_f.weight"] = weights["ln_f.weight"] * np.float32(6 * np.sqrt(768 / config.n_embd))
    return weights


def is_boundary(config, weights, row, at, seed, number, options):
    """Return whether, in float64, this choice is within rounding of another one."""
    row = np.array(row[:at])
    logits = oracle.logits(config, weights, row[None])[0, -1].astype(np.float64)
    [[u]] = uniforms([seed], [number], [at], 1)
    choices = set()
    for shift in (-NEAR, 0, NEAR):
        for scale in (1 - NEAR, 1, 1 + NEAR):
            moved = {name: value * scale if name in ("top_p", "min_p") else value for name, value in options.items()}
            choices.add(oracle.choose(logits, min(max(u + shift, 0), 1 - 1e-9), row, **moved))
    if options["temperature"] == 0:
        probs = oracle.keep(logits, row, **{**options, "temperature": 1.0})
        top = np.sort(np.log(probs[probs > 0]))[-2:]
        return top[1] - top[0] < NEAR
    return len(choices) > 1


def build(config):
    """(weights, the models of both packages)"""
    weights = peaked(config)
    models = [(package, package.adapter.build(config, weights)) for package in (gpt_torch, gpt_jax)]
    return weights, [models[0], (gpt_jax, gpt_jax.for_decoding(models[1][1]))]


def compare(config, built, options, seed, rows=ROWS, new=NEW):
    """(tokens compared, boundaries met) of one request with ragged prompts."""
    weights, models = built
    generator = np.random.default_rng(seed)
    prompts = [generator.integers(0, config.n_vocab, n).tolist() for n in generator.integers(1, 30, rows)]
    ours = [package.generate(model, prompts, new, seed=seed, **options) for package, model in models]
    tokens, boundaries = 0, []
    for number, (prompt, a, b) in enumerate(zip(prompts, *ours, strict=True)):
        assert len(a) == len(b) == len(prompt) + new
        differs = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
        tokens += (differs[0] if differs else len(a)) - len(prompt)
        if differs:
            at = differs[0]
            assert is_boundary(
                config, {k: v.astype(np.float64) for k, v in weights.items()}, a, at, seed, number, options
            ), f"{options} row {number} token {at}: torch {a[at]}, jax {b[at]}, and no boundary near"
            boundaries.append(f"{options} row {number} token {at}")
    return tokens, boundaries


def most_boundaries(tokens):
    """Return how many choices may differ on any processor: those whose random number is within 1e-6 of a boundary.

    A float32 sum of probabilities errs by less, and about 200 tokens have a probability that matters to it.
    """
    return math.ceil(tokens * 2 * 200 * 1e-6)


def report(results):
    tokens = sum(count for count, _ in results)
    boundaries = [place for _, places in results for place in places]
    print(f"{tokens:,} sampled tokens compared, {len(boundaries)} at a boundary: {boundaries}")
    assert len(boundaries) <= most_boundaries(tokens)
    return tokens


def test_same_tokens_over_the_grid():
    config = dataclasses.replace(PRESETS["124M"], n_vocab=2048, n_embd=128, n_head=2, n_layer=2)
    built = build(config)
    assert report([compare(config, built, options, seed) for seed, options in enumerate(GRID)]) >= 20_000


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("grid", "new"),
    [
        pytest.param([{**GRID[6], "top_p": 0.95}], 20, id="every rule at once"),
        pytest.param(GRID, NEW, id="whole grid", marks=pytest.mark.slow),
    ],
)
def test_same_tokens_at_the_widths_of_124m(grid, new):
    config = dataclasses.replace(PRESETS["124M"], n_layer=2)
    built = build(config)
    results = [compare(config, built, options, seed, new=new) for seed, options in enumerate(grid)]
    most = most_boundaries(len(grid) * ROWS * new)
    assert report(results) >= (len(grid) * ROWS - most) * new  # a row ends at a boundary


@pytest.mark.optimized
@pytest.mark.slow
def test_same_tokens_at_the_full_shape():
    config = PRESETS["124M"]
    built = build(config)
    assert report([compare(config, built, options, seed, 8, 160) for seed, options in enumerate(GRID)]) >= 8_000
