"""The chunked loss equals the direct one and stores no array of all logits; both backends treat targets alike."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from support.models import TINY, probing_weights, random_batch

import gpt_jax.adapter
import gpt_jax.notebook
import gpt_jax.train
import gpt_torch.loss
import gpt_torch.notebook
import gpt_torch.train
from gpt_jax.loss import CPU_TILING, GPU_TILING, Tiling, head_loss, n_chunks, summed_loss, tiling_for
from gpt_jax.preference import pair_logprobs
from parity.comparison.compare import compare
from parity.config import IGNORE_INDEX, GPTConfig
from parity.errors import InputError
from parity.training.settings import recipe


def plain(x, head, targets):
    logits = jnp.einsum("BTD,VD->BTV", x, head)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
    return jnp.where(targets == IGNORE_INDEX, 0, losses).sum()


def inputs(B=3, T=12, D=10, V=31, dtype=np.float64):
    generator = np.random.default_rng(0)
    x, head = generator.normal(size=(B, T, D)).astype(dtype), generator.normal(size=(V, D)).astype(dtype)
    targets = generator.integers(0, V, (B, T))
    targets[0, :5] = targets[2] = IGNORE_INDEX
    return x, head, targets


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("multiple", [1, 128])
@pytest.mark.parametrize("largest", [10**9, 3 * 128 * 4, 1])
def test_loss_and_gradients_are_the_plain_ones(largest, multiple, tied):
    with jax.enable_x64(True):
        x, head, targets = inputs(V=127)
        tiling = Tiling(largest, multiple)
        weighted = jax.value_and_grad(lambda x, head: 0.7 * head_loss(x, head, targets, tiling, tied=tied), (0, 1))
        got = jax.jit(weighted)(x, head)
        want = jax.value_and_grad(lambda x, head: 0.7 * plain(x, head, targets), (0, 1))(x, head)
        for name, a, b in zip(("loss", "x", "head"), jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            result = compare(name, np.asarray(a), np.asarray(b), 1e-13 * np.abs(b).max())
            assert result.ok, str(result)
        assert float(head_loss(x, head, targets, tiling)) == pytest.approx(float(want[0]) / 0.7, rel=1e-14)
        assert not np.asarray(got[1][0])[2].any()  # a row without targets


def test_chunks_divide_the_positions():
    assert n_chunks(10, 24, 240) == 1
    assert n_chunks(10, 24, 100) == 3
    assert n_chunks(10, 23, 100) == 23
    assert n_chunks(10, 24, 1) == 24


def test_a_large_vocabulary_is_padded_on_a_gpu_and_a_small_one_is_not():
    def widths(n_vocab, platform):
        """The lengths of the last axis of the logits in the program."""
        x, head = jnp.zeros((1, 2, 3)), jnp.zeros((n_vocab, 3))
        program = jax.make_jaxpr(lambda *a: head_loss(*a, tiling_for(platform)))(x, head, jnp.zeros((1, 2), int))
        return set(map(int, re.findall(r"f32\[2,(\d{3,})\] = dot_general", str(program))))

    assert widths(50257, "cpu") == {50257}
    assert widths(50257, "gpu") == widths(50257, "cuda") == {50304}
    assert widths(50304, "gpu") == {50304}
    assert widths(257, "gpu") == {257}
    assert GPU_TILING.largest_chunk > CPU_TILING.largest_chunk


def shapes_outside_loops(jaxpr):
    """Yield the shapes of all results that are not in a loop."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        if equation.primitive.name != "scan":
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                yield from shapes_outside_loops(inner) if hasattr(inner, "eqns") else ()


def test_nothing_of_the_size_of_the_logits_is_outside_the_loop_over_chunks():
    """JAX moves what does not change out of loops; a mask of the padding would be read again for every chunk."""
    x, head, targets = jnp.zeros((2, 8, 5)), jnp.zeros((12_700, 5)), jnp.zeros((2, 8), int)
    tiling = Tiling(4 * 12_800, 128)
    program = jax.make_jaxpr(jax.grad(lambda x, head: head_loss(x, head, targets, tiling), (0, 1)))(x, head)
    shapes = set(shapes_outside_loops(program.jaxpr))
    assert (12_800, 5) in shapes  # the padded head
    assert (4, 12_800) not in shapes  # the logits of a chunk


@pytest.mark.parametrize("tied_head", [True, False])
def test_a_models_gradients(tied_head):
    config = dataclasses.replace(TINY, tied_head=tied_head)
    with jax.enable_x64(True):
        model = gpt_jax.adapter.build(config, probing_weights(config))
        tokens, targets = random_batch(config)

        def by_logits(model):
            losses = optax.softmax_cross_entropy_with_integer_labels(model(tokens), jnp.maximum(targets, 0))
            return jnp.where(targets == IGNORE_INDEX, 0, losses).sum()

        got = jax.grad(summed_loss)(model, tokens, targets)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(jax.grad(by_logits)(model)), strict=True):
            assert compare("gradient", np.asarray(a), np.asarray(b), 1e-12 * np.abs(b).max()).ok


def test_memory_holds_one_chunk_of_logits():
    """Compare the memory that XLA reports, for 26 MB of logits in 13 chunks of 2 MB."""
    config = GPTConfig(n_vocab=50304, n_ctx=130, n_embd=8, n_head=1, n_layer=1)
    model = jax.eval_shape(lambda: gpt_jax.GPTModel(config, seed=None))
    x = jax.ShapeDtypeStruct((1, 130, 8), jnp.float32)
    head, targets = jax.ShapeDtypeStruct((50304, 8), jnp.float32), jax.ShapeDtypeStruct((1, 130), jnp.int32)

    def temporary(loss):
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(x, head, targets).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 130 * 50304 * 4
    assert temporary(plain) > logits
    assert temporary(lambda x, head, targets: head_loss(x, head, targets, Tiling(10 * 50304, 1))) < logits / 3
    assert model.config == config


def test_bfloat16_keeps_its_loss_in_float32():
    x, head, targets = inputs()
    short = (jnp.asarray(a, jnp.bfloat16) for a in (x, head))
    loss, gradients = jax.value_and_grad(head_loss, (0, 1))(*short, targets)
    assert loss.dtype == jnp.float32
    assert {g.dtype for g in gradients} == {jnp.dtype(jnp.bfloat16)}
    assert float(loss) == pytest.approx(float(plain(jnp.float32(x), jnp.float32(head), targets)), rel=1e-2)


def logprobs_of_the_loss(model, tokens):
    loss = jax.jit(summed_loss)
    return tokens, [-loss(model, np.array([[0]]), np.array([[token]])) for token in tokens]


def logprobs_of_pairs(model, tokens):
    targets = np.stack([tokens, tokens], axis=1)
    return tokens, jax.jit(pair_logprobs)(model, np.zeros_like(targets), targets)[:, 0]


def logprobs_of_generation(model, tokens):
    rows, logprobs = gpt_jax.generate(model, [[0]], 1, samples=len(tokens), return_logprobs=True)
    return [row[-1] for row in rows], [logprob for [logprob] in logprobs]


@pytest.mark.parametrize("function", [logprobs_of_the_loss, logprobs_of_pairs, logprobs_of_generation])
def test_a_shift_of_all_logits_costs_no_precision(function):
    """The logits are near -1000 and exact, because the hidden state is constant, with one element that is not 0."""
    model = gpt_jax.GPTModel(TINY)
    logits = (np.random.default_rng(0).normal(size=TINY.n_vocab) - 1000).astype(np.float32)
    model.final_norm.scale[...] = jnp.zeros(TINY.n_embd)
    model.final_norm.shift[...] = jnp.eye(TINY.n_embd)[0]
    model.tok_emb.embedding[...] = model.tok_emb.embedding[...].at[:, 0].set(logits)
    exact = logits + 1000.0 - np.log(np.exp(logits + np.float64(1000)).sum())
    tokens, logprobs = function(model, np.arange(TINY.n_vocab))
    # A few roundings of a float32 near 8; a float32 near 1000 is rounded by 3e-5.
    assert np.abs(np.asarray(logprobs) - exact[np.asarray(tokens)]).max() < 3e-6


@pytest.mark.parametrize("remat", ["products", "all"])
def test_computing_again_changes_no_gradient_and_saves_memory(remat):
    """Compare the memory that XLA reports, with 6 layers and 64 positions."""
    config = GPTConfig(n_vocab=97, n_ctx=64, n_embd=64, n_head=4, n_layer=6)
    tokens, targets = random_batch(config)
    results = {}
    for kind in ("none", remat):
        model = gpt_jax.GPTModel(config, remat=kind)
        compiled = jax.jit(jax.grad(summed_loss)).lower(model, tokens, targets).compile()
        results[kind] = jax.tree.leaves(compiled(model, tokens, targets)), compiled.memory_analysis().temp_size_in_bytes
    (kept, more), (again, less) = results["none"], results[remat]
    assert less < 0.8 * more
    for a, b in zip(again, kept, strict=True):
        assert compare("gradient", np.asarray(a), np.asarray(b), 2e-5 * np.abs(b).max()).ok


TARGETS_TO_REFUSE = (-2, -99, -101, TINY.n_vocab, 2**20)


def torch_batch(inputs, targets):
    return torch.from_numpy(inputs).long(), torch.from_numpy(targets).long()


def losses_and_gradients(inputs, targets):
    """Return {backend: (summed loss, [gradient])}, computed inside jax.jit and in eager torch."""
    model = gpt_jax.GPTModel(TINY)
    jax_loss, jax_gradients = jax.jit(jax.value_and_grad(summed_loss))(model, inputs, targets)
    torch_model = gpt_torch.GPTModel(TINY)
    torch_loss = gpt_torch.loss.summed_loss(torch_model, *torch_batch(inputs, targets))
    torch_loss.backward()
    return {
        "jax": (float(jax_loss), [np.asarray(leaf) for leaf in jax.tree.leaves(jax_gradients)]),
        "torch": (torch_loss.item(), [p.grad.numpy() for p in torch_model.parameters()]),
    }


def test_both_ignored_targets_count_nothing():
    inputs, targets = random_batch(TINY)
    assert (targets == IGNORE_INDEX).any()
    as_torch = np.where(targets == IGNORE_INDEX, -100, targets)
    for (loss, gradients), (other_loss, others) in zip(
        losses_and_gradients(inputs, targets).values(), losses_and_gradients(inputs, as_torch).values(), strict=True
    ):
        assert loss == other_loss
        assert all(np.array_equal(a, b) for a, b in zip(gradients, others, strict=True))
    means = [float(gpt_jax.loss.calc_loss(gpt_jax.GPTModel(TINY), inputs, ids)) for ids in (targets, as_torch)]
    model = gpt_torch.GPTModel(TINY)
    means += [gpt_torch.loss.calc_loss(model, *torch_batch(inputs, ids)).item() for ids in (targets, as_torch)]
    assert means[0] == means[1]
    assert means[2] == means[3] == pytest.approx(means[0], rel=1e-6)


@pytest.mark.parametrize("bad", TARGETS_TO_REFUSE)
def test_other_targets_are_refused_where_a_function_can_raise(bad):
    inputs, targets = random_batch(TINY)
    targets[1, 3] = bad
    settings = recipe("tiny").settings
    jax_trainer, torch_trainer = gpt_jax.train.Trainer(TINY, settings), gpt_torch.train.Trainer(TINY, settings)
    jax_model, torch_model = jax_trainer.model, torch_trainer.model
    for call in (
        lambda: gpt_jax.loss.calc_loss(jax_model, inputs, targets),
        lambda: gpt_torch.loss.calc_loss(torch_model, *torch_batch(inputs, targets)),
        lambda: jax_trainer.to_device(inputs[None], targets[None]),
        lambda: torch_trainer.to_device(inputs[None], targets[None]),
        lambda: gpt_jax.notebook.calc_loss_batch(jnp.asarray(inputs), jnp.asarray(targets), jax_model),
        lambda: gpt_torch.notebook.calc_loss_batch(*torch_batch(inputs, targets), torch_model),
    ):
        with pytest.raises(InputError, match=f"target {bad} is outside the vocabulary"):
            call()


@pytest.mark.parametrize("bad", [-1, TINY.n_vocab])
def test_the_trainers_refuse_inputs_outside_the_vocabulary(bad):
    inputs, targets = random_batch(TINY)
    inputs[1, 3] = bad
    for package in (gpt_jax, gpt_torch):
        trainer = package.train.Trainer(TINY, recipe("tiny").settings)
        with pytest.raises(InputError, match=f"token id {bad} is outside the vocabulary"):
            trainer.to_device(inputs[None], targets[None])


@pytest.mark.parametrize("bad", TARGETS_TO_REFUSE[:4])
def test_other_targets_make_a_compiled_loss_nan(bad):
    inputs, targets = random_batch(TINY)
    targets[1, 3] = bad
    for loss, gradients in losses_and_gradients(inputs, targets).values():
        assert np.isnan(loss)
        assert all(np.isnan(gradient).any() for gradient in gradients)
    assert np.isnan(float(jax.jit(gpt_jax.loss.calc_loss)(gpt_jax.GPTModel(TINY), inputs, targets)))
