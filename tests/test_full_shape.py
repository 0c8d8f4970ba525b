"""The 124M shape with 1,024 positions in float32 and random weights: torch, Flax and Hugging Face transformers."""

import jax
import numpy as np
import pytest
import torch
import transformers
from support import numpy_oracle as oracle
from support.models import BACKENDS, CONFIGS, probing_weights, random_batch
from support.tolerances import logits_bound

from parity import weights as table
from parity.comparison.case import sharp_weights
from parity.comparison.compare import compare
from parity.config import PRESETS
from parity.weights import hf_config, huggingface, initial_weights, openai

pytestmark = pytest.mark.optimized  # as users' programs are compiled

# How far rounding may move a logit from its exact value with these weights and tokens: the bound of error_bounds.py,
# which scripts/check_parity.py computes in a minute. The measured differences are in docs/results/parity.md.
LOGITS_ATOL = 3.9e-4


def hugging_face_logits(config, weights, tokens):
    entries = {k: v for k, v in hf_config.config_to_dict(config).items() if not k.endswith("pdrop")}
    their_config = transformers.GPT2Config(**entries, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    model = transformers.GPT2LMHeadModel(their_config).eval()
    state = {n if n.startswith("lm_head") else f"transformer.{n}": torch.from_numpy(w) for n, w in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}  # tied
    with torch.inference_mode():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


@pytest.fixture(scope="module")
def full_shape():
    """(config, sharp weights, tokens [1, 1024], {implementation: logits})."""
    config = PRESETS["124M"]
    weights = sharp_weights(config, 0)
    tokens = random_batch(config, rows=1)[0]
    logits = {name: backend.logits(config, weights, tokens) for name, backend in BACKENDS.items()}
    logits["hf"] = hugging_face_logits(config, weights, tokens)
    return config, weights, tokens, logits


@pytest.mark.parametrize(("a", "b"), [("torch", "jax"), ("torch", "hf"), ("jax", "hf")])
def test_logits_agree(full_shape, a, b, record_property):
    *_, logits = full_shape
    assert np.abs(logits["torch"]).max() > 1  # fresh weights would give nearly uniform probabilities
    result = compare(f"{a}-{b}", logits[a], logits[b], LOGITS_ATOL)
    record_property("worst", result.error)
    print(result)
    assert result.ok, str(result)


def test_the_tolerance_catches_planted_errors(full_shape, monkeypatch):
    """An error in one layer of twelve exceeds the tolerance: a bias, a transposed square matrix, the erf GELU."""
    config, weights, tokens, logits = full_shape
    tokens = tokens[:, :128]
    right = BACKENDS["torch"].logits(config, weights, tokens)
    assert compare("causal", right, logits["torch"][:, :128], LOGITS_ATOL).ok
    square, bias = "h.7.attn.c_proj.weight", "h.7.attn.c_proj.bias"
    for wrong in ({square: weights[square].T.copy()}, {bias: weights[bias] * 1.1}):
        assert not compare(
            "planted", BACKENDS["torch"].logits(config, {**weights, **wrong}, tokens), right, LOGITS_ATOL
        ).ok
    monkeypatch.setattr("gpt_torch.model.GELU.forward", lambda self, x: torch.nn.functional.gelu(x))
    assert not compare("erf GELU", BACKENDS["torch"].logits(config, weights, tokens), right, LOGITS_ATOL).ok


@pytest.mark.parametrize("name", ["gpt2", "one layer"])
def test_hugging_face_on_tiny_shapes(name):
    config = CONFIGS[name]
    weights = probing_weights(config, np.float32)
    tokens = random_batch(config)[0]
    theirs = hugging_face_logits(config, weights, tokens)
    for backend in BACKENDS.values():
        bound = 2 * logits_bound(config, weights, tokens, np.float32)  # of the difference of two
        result = compare("logits", backend.logits(config, weights, tokens), theirs, bound)
        assert result.ok, str(result)


@pytest.mark.parametrize("name", CONFIGS)
def test_our_folders_open_in_both_backends_and_in_transformers(name, tmp_path):
    import gpt_jax
    import gpt_torch

    config = CONFIGS[name]
    weights = probing_weights(config, np.float32)
    huggingface.write(tmp_path, config, weights)
    tokens = random_batch(config)[0]
    expected = BACKENDS["torch"].logits(config, weights, tokens)
    assert gpt_torch.load_pretrained(tmp_path).config == gpt_jax.load_pretrained(tmp_path).config == config
    with torch.inference_mode():
        opened = {
            "torch": gpt_torch.load_pretrained(tmp_path)(torch.from_numpy(tokens)).numpy(),
            "jax": np.asarray(gpt_jax.load_pretrained(tmp_path)(jax.numpy.asarray(tokens))),
        }
        if config.qkv_bias:
            theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
            opened["transformers"] = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    bound = 2 * logits_bound(config, weights, tokens, np.float32)  # of the difference of two
    for reader, got in opened.items():
        result = compare(reader, got, expected, bound)
        assert result.ok, str(result)


@pytest.mark.slow  # sharp weights are harder
def test_initial_weights_agree():
    config = PRESETS["124M"]
    weights = initial_weights(config, seed=0)
    tokens = random_batch(config, rows=1)[0][:, :256]  # the other tests have all 1,024 positions
    torch_logits, jax_logits = (backend.logits(config, weights, tokens) for backend in BACKENDS.values())
    result = compare("torch-jax, initial weights", jax_logits, torch_logits, 1e-5)
    print(result)
    assert result.ok, str(result)


def test_float64_agrees_with_the_oracle_on_a_short_input(full_shape):
    config, weights, tokens, _ = full_shape
    weights = {name: array.astype(np.float64) for name, array in weights.items()}
    want = oracle.logits(config, weights, tokens[:, :48])
    for name, backend in BACKENDS.items():
        result = compare(f"{name}-oracle", backend.logits(config, weights, tokens[:, :48]), want, 1e-10)
        print(result)
        assert result.ok, str(result)


def test_tensorflow_and_we_read_the_same_124m(full_shape, tmp_path):
    """Our reader and TensorFlow's give bit-identical tensors, for all 148 of a bundle."""
    pytest.importorskip("tensorflow", reason="the tf extra is not installed")
    config, weights, *_ = full_shape
    arrays = dict(table.convert(weights, "huggingface", "openai", config))
    openai.write(tmp_path, config, arrays)
    ours, theirs = (openai.read(tmp_path, reader)[1] for reader in ("native", "tensorflow"))
    assert ours.keys() == theirs.keys() == arrays.keys()
    for name, array in arrays.items():
        assert np.array_equal(np.asarray(ours[name]), array)
        assert np.array_equal(theirs[name], array)
