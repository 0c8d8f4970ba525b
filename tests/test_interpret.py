"""Logit lens, attribution, patching and induction scores of models whose answers are known by construction."""

import dataclasses

import numpy as np
import pytest
import torch
from support.models import BACKENDS, TINY, probing_weights, random_batch

import gpt_torch
from parity import interpret, reference
from parity.config import GPTConfig
from parity.errors import InputError
from parity.weights import shapes

# Wide enough for one direction per position (12) and per token (10), and for heads of width 16.
CONFIG = GPTConfig(n_vocab=10, n_ctx=12, n_embd=48, n_head=3, n_layer=2)
H = CONFIG.head_width
TOKEN, POSITION = 0, 10  # the first directions of tokens and of positions


def blank():
    """Weights whose branches add nothing; each token and position is one direction of the residual stream."""
    weights = {name: np.zeros(shape) for name, shape in shapes(CONFIG, "huggingface").items()}
    for name in weights:
        if "ln_" in name and name.endswith("weight"):
            weights[name] += 1
    for token in range(CONFIG.n_vocab):
        weights["wte.weight"][token, TOKEN + token] = 3
    for position in range(CONFIG.n_ctx):
        weights["wpe.weight"][position, POSITION + position] = 3
    return weights


def attend(weights, layer, head, offset, sharpness=40.0):
    """The head attends from each position to the one `offset` before it (0: itself)."""
    matrix = weights[f"h.{layer}.attn.c_attn.weight"]
    for position in range(CONFIG.n_ctx):
        matrix[POSITION + position, head * H + max(0, position - offset)] = sharpness
        matrix[POSITION + position, CONFIG.n_embd + head * H + position] = 1


def move_token(weights, layer, head):
    """The head copies the token that it attends to into the residual stream."""
    values = weights[f"h.{layer}.attn.c_attn.weight"]
    for token in range(CONFIG.n_vocab):
        values[TOKEN + token, 2 * CONFIG.n_embd + head * H + token] = 1
        weights[f"h.{layer}.attn.c_proj.weight"][head * H + token, TOKEN + token] = 5


@pytest.fixture(params=BACKENDS)
def activations(request):
    return lambda weights, tokens: BACKENDS[request.param].activations(CONFIG, weights, tokens)


TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]], np.int32)


def test_the_lens_shows_when_the_answer_appears(activations):
    """Only the MLP of the second layer writes token 7; before it, the input is the best guess."""
    weights = blank()
    weights["h.1.mlp.c_proj.bias"][TOKEN + 7] = 20
    lens = interpret.logit_lens(CONFIG, weights, activations(weights, TOKENS))
    assert list(lens) == ["embed", "blocks.0.resid_post", "blocks.1.resid_post"]
    for name, guess in zip(lens, (TOKENS, TOKENS, np.full_like(TOKENS, 7)), strict=True):
        assert np.array_equal(lens[name].argmax(-1), guess), name


def test_the_last_logits_of_the_lens_are_the_models():
    config = dataclasses.replace(TINY, tied_head=False)
    weights, (tokens, _) = probing_weights(config), random_batch(config)
    cache = reference.activations(config, weights, tokens)
    lens = interpret.logit_lens(config, weights, cache)
    assert np.abs(lens["blocks.2.resid_post"] - cache["logits"]).max() < 1e-12


def test_attribution_finds_the_component_that_writes_a_token(activations):
    weights = blank()
    weights["h.1.mlp.c_proj.bias"][TOKEN + 7] = 20
    parts = interpret.direct_logit_attribution(CONFIG, weights, activations(weights, TOKENS), token=7, minus=0)
    assert max(parts, key=lambda name: parts[name].min()) == "blocks.1.mlp.out"
    for name in ("blocks.0.attn.out", "blocks.1.attn.out", "blocks.0.mlp.out", "ln_f.bias"):
        assert not parts[name].any()


@pytest.mark.parametrize("minus", [None, 3])
@pytest.mark.parametrize("tied_head", [True, False])
def test_attributions_add_up_to_the_logit(minus, tied_head):
    config = dataclasses.replace(TINY, tied_head=tied_head)
    weights, (tokens, _) = probing_weights(config), random_batch(config)
    cache = reference.activations(config, weights, tokens)
    parts = interpret.direct_logit_attribution(config, weights, cache, token=11, minus=minus)
    assert len(parts) == 2 + 2 * config.n_layer
    expected = cache["logits"][..., 11] - (0 if minus is None else cache["logits"][..., minus])
    assert np.abs(sum(parts.values()) - expected).max() < 1e-12


def test_patching_finds_the_path_of_a_token():
    """The last position reads the token at position 4, only through head 2 of the second layer."""
    weights = blank()
    attend(weights, layer=1, head=2, offset=7)
    move_token(weights, layer=1, head=2)
    clean, corrupted = TOKENS, TOKENS.copy()
    corrupted[0, 4] = 0
    caches = [reference.activations(CONFIG, weights, tokens) for tokens in (clean, corrupted)]
    model = gpt_torch.adapter.build(CONFIG, weights)
    ids = torch.from_numpy(corrupted)

    def run(patches):
        with torch.inference_mode():
            return gpt_torch.run_with_patches(model, ids, patches).numpy()

    def restored(logits):
        """1 where the last position's logits are the clean run's, 0 where they are the corrupted run's."""
        ends = [cache["logits"][0, -1] for cache in caches]
        return float((logits[0, -1] - ends[1]) @ (ends[0] - ends[1]) / ((ends[0] - ends[1]) ** 2).sum())

    names = ["embed", "blocks.0.resid_post", "blocks.1.attn.v", "blocks.1.attn.z", "blocks.1.resid_post"]
    sweep = interpret.patching_sweep(run, *caches, names, restored)
    for name in names:
        expected = np.zeros(CONFIG.n_ctx)
        expected[4 if name in ("embed", "blocks.0.resid_post", "blocks.1.attn.v") else -1] = 1
        assert np.abs(sweep[name] - expected).max() < 1e-6, (name, sweep[name])
    with pytest.raises(InputError, match="embed: the clean run has shape"):
        interpret.patching_sweep(run, {"embed": np.ones((1, 3, 48))}, caches[1], ["embed"], restored)


def test_induction_heads_have_the_highest_score(activations):
    """With period 4 an induction head attends 3 positions back; others attend to themselves or uniformly."""
    weights = blank()
    attend(weights, layer=1, head=0, offset=3)
    attend(weights, layer=1, head=1, offset=0)
    cache = activations(weights, np.tile(TOKENS[:, :4], 3))
    scores = interpret.induction_scores(CONFIG, cache, period=4)
    assert scores.shape == (2, 3)
    assert scores[1, 0] > 0.999
    assert scores[1, 1] < 1e-6
    uniform = np.mean([1 / (position + 1) for position in range(4, 12)])
    assert scores[[0, 0, 0, 1], [0, 1, 2, 2]] == pytest.approx(uniform)
    for period in (0, 12):
        with pytest.raises(InputError, match=r"period must be in 1..11"):
            interpret.induction_scores(CONFIG, cache, period)


def test_pictures_of_attention(tmp_path):
    cache = reference.activations(CONFIG, blank(), TOKENS)
    picture = interpret.plot_attention(
        tmp_path / "attention.png", cache["blocks.0.attn.pattern"][0], list("abcdefghijkl"), "layer 0"
    )
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_missing_activations_are_named():
    cache = reference.activations(CONFIG, blank(), TOKENS, ["embed", "blocks.0.*"])
    with pytest.raises(InputError, match=r"the cache has no blocks.1.resid_post; request them from run_with_cache"):
        interpret.logit_lens(CONFIG, blank(), cache)
    with pytest.raises(InputError, match=r"the cache has no blocks.1.attn.z; request them"):
        interpret.patching_sweep(lambda patches: None, cache, cache, ["blocks.1.attn.z"], float)


@pytest.mark.parametrize("tokens", [{"token": 10}, {"token": -1}, {"token": 0, "minus": 10}])
def test_tokens_outside_the_vocabulary_are_refused(tokens):
    cache = reference.activations(CONFIG, blank(), TOKENS)
    with pytest.raises(InputError, match=rf"{list(tokens)[-1]}: token id {list(tokens.values())[-1]} is outside"):
        interpret.direct_logit_attribution(CONFIG, blank(), cache, **tokens)


@pytest.mark.parametrize(
    ("shape", "labels", "message"),
    [
        ((2, 4, 3, 3), (), r"pattern must have axes \[N, T, S\], got shape \[2, 4, 3, 3\]; select a row"),
        ((3, 3), (), "pattern must have axes"),
        ((4, 3, 3), ("a", "b"), "labels: 2 for 3 queries and 3 keys"),
    ],
)
def test_patterns_and_labels_that_do_not_fit_are_refused(shape, labels, message, tmp_path):
    with pytest.raises(InputError, match=message):
        interpret.plot_attention(tmp_path / "attention.png", np.ones(shape), labels)
    assert not any(tmp_path.iterdir())
