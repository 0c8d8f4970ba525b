"""Named activations are the same in torch, JAX and NumPy, can be replaced, and cost nothing when unused."""

import threading
from concurrent.futures import ThreadPoolExecutor

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
    """{backend: (package, model, token ids as its array)}."""
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
    activations = BACKENDS[name].activations(TINY, probing_weights(TINY), TOKENS)
    assert list(activations) == NAMES == list(exact)
    for key in NAMES:
        assert activations[key].shape == tuple(SIZES[axis] for axis in taps.axes(key).split())
        assert compare(key, activations[key], exact[key], bounds[key]).ok


def test_rounding_of_sums():
    """Products are summed in float32 where the operands are bfloat16: 6 of them round by its unit roundoff."""
    assert error_bounds.sum_rounding("bfloat16", 6) == error_bounds.sum_rounding("float32", 6) == 2**-24
    assert error_bounds.sum_rounding("float64", 24) == 2 * 2**-53


@pytest.mark.parametrize(("dtype", "least", "median"), [("float32", 0.001, 0.004), ("bfloat16", 0.003, 0.012)])
def test_bounds_hold_and_are_not_void_in_other_precisions(dtype, least, median):
    """Errors stay below their bound, and storing the exact values in the dtype already uses a part of it.

    That part is the same on every processor, and no implementation can have smaller errors.
    """
    weights = error_bounds.rounded(probing_weights(TINY), dtype)
    exact, bounds = error_bounds.activation_bounds(TINY, weights, TOKENS, dtype, NAMES)
    for backend in BACKENDS.values():
        activations = backend.activations(TINY, weights, TOKENS, compute=Compute(dtype))
        for key in NAMES:
            result = compare(key, activations[key], exact[key], bounds[key])
            assert result.ok, str(result)
    stored = error_bounds.rounded(exact, dtype)
    shares = [compare(key, stored[key], exact[key], bounds[key]).share for key in NAMES]
    assert min(shares) > least
    assert np.median(shares) > median


def test_logits_are_those_of_the_plain_call():
    for package, model, ids in models(probing_weights(TINY), np.float32).values():
        with torch.inference_mode():
            logits, cache = package.run_with_cache(model, ids)
            result = compare("logits", np.asarray(logits), np.asarray(model(ids)), 2e-5)
        assert list(cache) == NAMES
        assert result.ok, str(result)


def test_an_unused_probe_costs_nothing(monkeypatch):
    """The compiled program is the same text as that of a model without taps."""
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
def test_patches_have_the_same_effect_in_all_implementations(key):
    weights = probing_weights(TINY)
    with taps.probe(TINY, None, {key: PATCHES[key]}, lambda value, x: np.broadcast_to(value, x.shape)) as expected:
        reference.logits(TINY, weights, TOKENS)
    plain = reference.activations(TINY, weights, TOKENS)
    changed = [name for name in NAMES if not np.array_equal(expected[name], plain[name])]
    assert changed[0] == key
    with jax.enable_x64(True):
        for package, model, ids in models(weights).values():
            with torch.inference_mode():
                _, cache = package.run_with_cache(model, ids, patches={key: PATCHES[key]})
            for name in NAMES:
                result = compare(
                    name, np.asarray(cache[name]), expected[name], 1e-12 * max(1, np.abs(expected[name]).max())
                )
                assert result.ok, str(result)


def test_explicit_attention_replaces_fused_attention_with_a_warning():
    model = gpt_torch.GPTModel(TINY, attention="sdpa")
    ids = torch.from_numpy(TOKENS)
    with pytest.warns(UserWarning, match="explicit attention runs instead of sdpa"):
        _, cache = gpt_torch.run_with_cache(model, ids, "blocks.*.attn.pattern")
    assert torch.allclose(cache["blocks.0.attn.pattern"].sum(-1), torch.ones(()))
    _, cache = gpt_torch.run_with_cache(model, ids, ["blocks.1.attn.z", "logits"])  # warns of nothing
    assert list(cache) == ["blocks.1.attn.z", "logits"]


@pytest.mark.parametrize("package", [gpt_torch, gpt_jax])
def test_wrong_names_and_shapes_are_refused(package):
    model = package.GPTModel(TINY)
    ids = torch.from_numpy(TOKENS) if package is gpt_torch else jnp.asarray(TOKENS)
    with pytest.raises(InputError, match="no activation is called 'ln_2'"):
        package.run_with_cache(model, ids, ["ln_2"])
    with pytest.raises(InputError, match=r"patch of blocks.1.attn.q: shape \[3, 5\] does not fit \[B T N H\]"):
        package.run_with_patches(model, ids, {"blocks.1.attn.q": np.ones((3, 5))})
    assert not taps.probing()


def in_parallel(*functions):
    """Run each function on a thread of its own, and return the results."""
    with ThreadPoolExecutor(len(functions)) as pool:
        return [future.result(timeout=120) for future in [pool.submit(function) for function in functions]]


@pytest.mark.parametrize("package", [gpt_torch, gpt_jax])
def test_threads_do_not_share_a_probe(package):
    """Three runs of one model are inside their first layer at the same time, each with its own tokens and patch."""
    _, model, _ = models(probing_weights(TINY), np.float32)[package.__name__.removeprefix("gpt_")]
    as_ids = torch.from_numpy if package is gpt_torch else jnp.asarray
    inputs = [as_ids((TOKENS + shift) % TINY.n_vocab) for shift in range(3)]

    def run(ids, factor, wait=lambda: None):
        def patch(x):
            wait()
            return x * factor

        with torch.inference_mode():
            _, cache = package.run_with_cache(model, ids, patches={"blocks.0.ln_1": patch})
        return {name: np.asarray(array) for name, array in cache.items()}

    barrier = threading.Barrier(len(inputs), timeout=60)
    alone = [run(ids, factor) for factor, ids in enumerate(inputs)]
    together = in_parallel(*(lambda i=i: run(inputs[i], i, barrier.wait) for i in range(len(inputs))))
    for expected, cache in zip(alone, together, strict=True):
        assert list(cache) == NAMES
        for name in NAMES:
            assert np.array_equal(cache[name], expected[name]), name


def test_jax_compiles_in_one_thread_while_another_has_a_probe():
    _, model, ids = models(probing_weights(TINY), np.float32)["jax"]
    expected = np.asarray(gpt_jax.run_with_cache(model, ids, "logits")[0])
    compiled = {}

    def compile_in_another_thread(x):
        [program] = in_parallel(lambda: jax.jit(lambda model, ids: model(ids)).lower(model, ids))
        compiled["text"], compiled["logits"] = program.as_text(), program.compile()(model, ids)
        return x

    _, cache = gpt_jax.run_with_cache(model, ids, patches={"blocks.1.ln_1": compile_in_another_thread})
    assert list(cache) == NAMES
    assert np.array_equal(cache["logits"], expected)
    assert compiled["text"] == jax.jit(lambda model, ids: model(ids)).lower(model, ids).as_text()
    assert compare("logits", np.asarray(compiled["logits"]), expected, 2e-5).ok


def test_torch_compiles_models_without_breaks_and_compiled_models_can_be_probed():
    """With fullgraph=True, dynamo refuses what it cannot trace, such as a ContextVar."""
    _, model, ids = models(probing_weights(TINY), np.float32)["torch"]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model(ids)
        assert torch.allclose(compiled(ids), expected, atol=2e-5)
        for patches in ({}, {"embed": torch.zeros(20)}, {"embed": torch.ones(20)}):
            _, cache = gpt_torch.run_with_cache(compiled, ids, ["logits", "embed"], patches)
            _, eager = gpt_torch.run_with_cache(model, ids, ["logits", "embed"], patches)
            assert list(cache) == list(eager)
            assert all(torch.allclose(cache[name], eager[name], atol=2e-5) for name in eager)
        assert torch.allclose(compiled(ids), expected, atol=2e-5)


def test_activations_of_compiled_functions_are_refused():
    """The user gets neither an empty cache, nor a tracer, nor a patch that stays in the compiled program."""
    model, ids = gpt_jax.GPTModel(TINY), jnp.asarray(TOKENS)
    programs = {"jit": jax.jit(lambda model, ids: model(ids)), "grad": jax.grad(lambda model, ids: model(ids).sum())}
    for program in programs.values():
        for names, patches in (("logits", {}), ((), {"embed": lambda x: x * 0})):
            with (
                pytest.raises(InputError, match="inside a function that is compiled"),
                taps.probe(TINY, names, patches),
            ):
                program(model, ids)
    expected = programs["jit"](model, ids)
    assert compare("logits", np.asarray(expected), np.asarray(model(ids)), 2e-5).ok
    for names, patches in (("logits", {}), ((), {"logits": lambda x: x * 0})):
        with (
            pytest.raises(InputError, match="no model computed logits under the probe"),
            taps.probe(TINY, names, patches),
        ):
            programs["jit"](model, ids)
    assert not taps.probing()


def test_an_error_under_a_probe_is_not_replaced():
    with pytest.raises(ZeroDivisionError), taps.probe(TINY, "logits"):
        _ = 1 / 0
    with pytest.raises(InputError, match="no model computed logits"), taps.probe(TINY, "logits"):
        pass


@pytest.mark.parametrize("remat", gpt_jax.model.REMAT_POLICIES)
def test_recomputing_models_can_be_probed(remat):
    model, ids = gpt_jax.GPTModel(TINY, remat=remat), jnp.asarray(TOKENS)
    _, expected = gpt_jax.run_with_cache(gpt_jax.GPTModel(TINY), ids)
    _, cache = gpt_jax.run_with_cache(model, ids)
    assert all(np.array_equal(cache[name], expected[name]) for name in NAMES)


@pytest.mark.parametrize("package", [gpt_torch, gpt_jax])
def test_a_pattern_patches_every_match(package):
    _, model, ids = models(probing_weights(TINY), np.float32)[package.__name__.removeprefix("gpt_")]
    with torch.inference_mode():
        _, cache = package.run_with_cache(model, ids, patches={"blocks.*.mlp.out": np.zeros(20, np.float32)})
        for i in range(TINY.n_layer):
            assert not cache[f"blocks.{i}.mlp.out"].any()
            assert np.array_equal(cache[f"blocks.{i}.resid_post"], cache[f"blocks.{i}.resid_mid"])
        with pytest.raises(InputError, match=r"blocks.1.mlp.out has two patches, 'blocks.\*.mlp.out' and 'blocks.1"):
            package.run_with_patches(model, ids, {"blocks.*.mlp.out": np.zeros(20), "blocks.1.mlp.*": np.zeros(20)})
