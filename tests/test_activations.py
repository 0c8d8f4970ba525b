"""The same names in torch, JAX and NumPy: read, replaced, and free where nobody looks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.models import BACKENDS, TINY, probing_weights, random_batch

import gpt_jax
import gpt_torch
from parity import reference, taps
from parity.comparison import error_bounds
from parity.comparison.compare import compare
from parity.comparison.protocol import Compute
from parity.errors import InputError

NAMES = taps.activation_names(TINY)
SIZES = {**TINY.axes, "B": 2, "T": 24, "S": 24}
TOKENS = random_batch(TINY)[0]


@pytest.fixture(scope="module")
def truth():
    """(activations, bounds) in float64."""
    return error_bounds.activation_bounds(TINY, probing_weights(TINY), TOKENS, "float64", NAMES)


def models(weights, dtype=np.float64):
    """A model of each backend with ids, and a function to make NumPy arrays."""
    made = {}
    for name, package, ids in (("torch", gpt_torch, torch.from_numpy(TOKENS)), ("jax", gpt_jax, jnp.asarray(TOKENS))):
        model = BACKENDS[name].build(TINY, {n: w.astype(dtype) for n, w in weights.items()})
        made[name] = package, model, ids
    return made


def test_names_and_axes():
    assert len(NAMES) == 3 + 14 * TINY.n_layer
    assert NAMES[:4] == ["embed", "blocks.0.ln_1", "blocks.0.attn.q", "blocks.0.attn.k"]
    assert NAMES[-3:] == ["blocks.2.resid_post", "ln_f", "logits"]
    assert taps.select("blocks.*.attn.pattern", TINY) == [f"blocks.{i}.attn.pattern" for i in range(3)]
    assert taps.select(["logits", "embed"], TINY) == ["embed", "logits"]
    with pytest.raises(InputError, match=r"no activation is called 'blocks.3.ln_1'; a model of 3 layers"):
        taps.select(["blocks.3.ln_1"], TINY)


@pytest.mark.parametrize("name", BACKENDS)
def test_every_activation_is_within_its_bound_of_the_reference(truth, name):
    exact, bounds = truth
    found = BACKENDS[name].activations(TINY, probing_weights(TINY), TOKENS)
    assert list(found) == NAMES == list(exact)
    for key in NAMES:
        assert found[key].shape == tuple(SIZES[axis] for axis in taps.axes(key).split())
        assert compare(key, found[key], exact[key], bounds[key]).ok


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", BACKENDS)
def test_bounds_hold_and_are_not_empty_in_other_precisions(name, dtype):
    """Errors use a part of their bound in every place: neither beyond it, nor so small that it says nothing."""
    weights = error_bounds.rounded(probing_weights(TINY), dtype)
    exact, bounds = error_bounds.activation_bounds(TINY, weights, TOKENS, dtype, NAMES)
    found = BACKENDS[name].activations(TINY, weights, TOKENS, compute=Compute(dtype))
    shares = [compare(key, found[key], exact[key], bounds[key]).share for key in NAMES]
    assert max(shares) < 0.5
    assert min(shares) > 0.01
    assert 0.05 < np.median(shares) < 0.2


def test_logits_are_those_of_the_plain_call():
    for package, model, ids in models(probing_weights(TINY), np.float32).values():
        with torch.inference_mode():
            logits, cache = package.run_with_cache(model, ids)
            result = compare("logits", np.asarray(logits), np.asarray(model(ids)), 2e-5)
        assert list(cache) == NAMES
        assert result.ok, str(result)


def test_an_unused_probe_costs_nothing(monkeypatch):
    """The program that is compiled is the same, to the letter, as with the taps taken out of the code."""
    model, ids = gpt_jax.GPTModel(TINY), jnp.asarray(TOKENS)

    def program():
        jax.clear_caches()
        return jax.jit(gpt_jax.GPTModel.__call__).lower(model, ids).as_text()

    with_taps = program()
    monkeypatch.setattr(gpt_jax.model, "tap", lambda name, x: x)
    assert program() == with_taps
    monkeypatch.undo()
    gpt_jax.run_with_cache(model, ids)
    assert program() == with_taps


def test_patches_and_cache_under_jit_and_grad():
    _, model, ids = models(probing_weights(TINY), np.float32)["jax"]
    run = jax.jit(lambda model, ids, value: gpt_jax.run_with_patches(model, ids, {"blocks.1.resid_mid": value}))
    zeros = jnp.zeros((2, 24, 20))
    eager = gpt_jax.run_with_patches(model, ids, {"blocks.1.resid_mid": zeros})
    assert compare("jit", np.asarray(run(model, ids, zeros)), np.asarray(eager), 1e-4).ok

    def summed(value):
        return gpt_jax.run_with_patches(model, ids, {"blocks.1.resid_mid": value})[0, 0, 0]

    gradient = jax.grad(summed)(zeros + 0.5)
    assert np.abs(gradient[0, 0]).max() > 0
    assert not gradient[1].any()
    assert not gradient[0, 1:].any()  # the mask: position 0 sees no other


PATCHES = {
    "blocks.1.attn.pattern": lambda x: x * 0 + 1 / 24,
    "blocks.0.attn.z": lambda x: x * 2,
    "blocks.2.mlp.post": lambda x: -x,
    "embed": np.linspace(-1, 1, 20),
    "blocks.0.attn.scores": np.zeros(()),
    "blocks.2.attn.v": np.ones((1, 24, 1, 5)),
}


@pytest.mark.parametrize("key", PATCHES)
def test_patches_do_the_same_everywhere(key):
    weights = probing_weights(TINY)
    with taps.probe(TINY, None, {key: PATCHES[key]}, lambda value, x: np.broadcast_to(value, x.shape)) as want:
        reference.logits(TINY, weights, TOKENS)
    plain = reference.activations(TINY, weights, TOKENS)
    changed = [name for name in NAMES if not np.array_equal(want[name], plain[name])]
    assert changed[0] == key
    with jax.enable_x64(True):
        for package, model, ids in models(weights).values():
            with torch.inference_mode():
                _, cache = package.run_with_cache(model, ids, patches={key: PATCHES[key]})
            for name in NAMES:
                result = compare(name, np.asarray(cache[name]), want[name], 1e-12 * max(1, np.abs(want[name]).max()))
                assert result.ok, str(result)


def test_fused_attention_gives_way_and_says_so():
    model = gpt_torch.GPTModel(TINY, attention="sdpa")
    ids = torch.from_numpy(TOKENS)
    with pytest.warns(UserWarning, match="explicit attention runs, not sdpa"):
        _, cache = gpt_torch.run_with_cache(model, ids, "blocks.*.attn.pattern")
    assert torch.allclose(cache["blocks.0.attn.pattern"].sum(-1), torch.ones(()))
    _, cache = gpt_torch.run_with_cache(model, ids, ["blocks.1.attn.z", "logits"])  # without a warning
    assert list(cache) == ["blocks.1.attn.z", "logits"]


@pytest.mark.parametrize("package", [gpt_torch, gpt_jax])
def test_wrong_names_and_shapes_are_told(package):
    model = package.GPTModel(TINY)
    ids = torch.from_numpy(TOKENS) if package is gpt_torch else jnp.asarray(TOKENS)
    with pytest.raises(InputError, match="no activation is called 'ln_2'"):
        package.run_with_cache(model, ids, ["ln_2"])
    with pytest.raises(InputError, match=r"patch of blocks.1.attn.q has shape \[3, 5\], the activation \[B T N H\]"):
        package.run_with_patches(model, ids, {"blocks.1.attn.q": np.ones((3, 5))})
    assert not taps.probing()
