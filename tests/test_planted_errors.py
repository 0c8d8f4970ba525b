"""Every tolerance can fail: each planted error exceeds those of logits, loss and gradients, in both dtypes."""

import jax
import numpy as np
import pytest
import torch
from einops import rearrange
from support.models import BACKENDS, TINY, probing_weights, random_batch
from support.tolerances import GRADIENT_RTOL, LOGITS_ATOL, LOSS_RTOL

import gpt_jax.model
import gpt_torch.model
from parity.comparison.compare import compare

N, H = TINY.n_head, TINY.head_width
QKV, OUT = "h.1.attn.c_attn.weight", "h.1.attn.c_proj.weight"


def transposed_square(weights):
    return {OUT: weights[OUT].T.copy()}


def query_and_key_swapped(weights):
    q, k, v = np.split(weights[QKV], 3, axis=1)
    return {QKV: np.concatenate([k, q, v], axis=1)}


def heads_permuted(weights):
    return {
        QKV: rearrange(weights[QKV], "d (c n h) -> d c n h", c=3, n=N)[:, :, ::-1].reshape(weights[QKV].shape).copy()
    }


def heads_interleaved(weights):
    return {QKV: rearrange(weights[QKV], "d (c n h) -> d (n c h)", c=3, n=N)}


def missing_bias(weights):
    return {"h.2.mlp.c_proj.bias": np.zeros_like(weights["h.2.mlp.c_proj.bias"])}


def one_wrong_bias(weights):
    bias = weights["h.0.attn.c_proj.bias"].copy()
    bias[3] *= 1.05
    return {"h.0.attn.c_proj.bias": bias}


WRONG_WEIGHTS = [
    transposed_square,
    query_and_key_swapped,
    heads_permuted,
    heads_interleaved,
    missing_bias,
    one_wrong_bias,
]


def erf_gelu(name, monkeypatch):
    if name == "torch":
        monkeypatch.setattr(gpt_torch.model.GELU, "forward", lambda self, x: torch.nn.functional.gelu(x))
    else:
        monkeypatch.setattr(gpt_jax.model.GELU, "__call__", lambda self, x: jax.nn.gelu(x, approximate=False))


def small_eps(name, monkeypatch):
    monkeypatch.setattr(MODEL[name], "LAYER_NORM_EPS", 1e-6)


def mask_off_by_one(shift):
    def plant(name, monkeypatch):
        """Attend one position too far ahead (1), or not to the query's own position (-1; except the first)."""
        attention = MODEL[name].MultiHeadAttention
        method = "forward" if name == "torch" else "__call__"
        right = getattr(attention, method)

        def wrong(self, x, mask, *args, **kwargs):
            T = mask.shape[-1]
            moved = np.tril(np.ones((T, T), bool), shift)
            moved[0, 0] = True
            return right(self, x, torch.from_numpy(moved) if name == "torch" else moved, *args, **kwargs)

        monkeypatch.setattr(attention, method, wrong)

    return plant


MODEL = {"torch": gpt_torch.model, "jax": gpt_jax.model}
WRONG_CODE = {
    "erf GELU": erf_gelu,
    "eps 1e-6": small_eps,
    "mask one ahead": mask_off_by_one(1),
    "mask one behind": mask_off_by_one(-1),
}


def assert_caught(right, wrong, dtype):
    """Assert that the loss and some gradient differ by more than their tolerances."""
    assert not compare("loss", wrong[0], right[0], 0, LOSS_RTOL[dtype]).ok
    assert any(
        not compare(name, wrong[1][name], g, GRADIENT_RTOL[dtype] * np.abs(g).max()).ok for name, g in right[1].items()
    )


@pytest.fixture(params=LOGITS_ATOL, scope="module")
def reference(request):
    """(dtype, weights, batch, logits, (loss, gradients)) of the torch model without errors."""
    dtype = request.param
    weights = probing_weights(TINY, dtype)
    batch = random_batch(TINY)
    torch_backend = BACKENDS["torch"]
    logits = torch_backend.logits(TINY, weights, batch[0])
    return dtype, weights, batch, logits, torch_backend.loss_and_gradients(TINY, weights, *batch)


@pytest.mark.parametrize("plant", WRONG_WEIGHTS, ids=lambda f: f.__name__)
def test_wrong_weights_are_caught(reference, plant):
    dtype, weights, batch, logits, right = reference
    wrong = {**weights, **plant(weights)}
    got = BACKENDS["torch"].logits(TINY, wrong, batch[0])
    assert not compare("logits", got, logits, LOGITS_ATOL[dtype]).ok
    assert_caught(right, BACKENDS["torch"].loss_and_gradients(TINY, wrong, *batch), dtype)


@pytest.mark.parametrize("plant", WRONG_CODE)
@pytest.mark.parametrize("name", BACKENDS)
def test_wrong_code_is_caught(reference, name, plant, monkeypatch):
    dtype, weights, batch, logits, right = reference
    WRONG_CODE[plant](name, monkeypatch)
    if name == "jax":
        jax.clear_caches()  # otherwise the compiled program without the error would run
    try:
        assert not compare("logits", BACKENDS[name].logits(TINY, weights, batch[0]), logits, LOGITS_ATOL[dtype]).ok
        assert_caught(right, BACKENDS[name].loss_and_gradients(TINY, weights, *batch), dtype)
    finally:
        if name == "jax":
            jax.clear_caches()
