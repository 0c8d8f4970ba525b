"""The compiled program of generation: what it contains on a GPU, and the search and the cache that only it has."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import TINY, probing_weights

import gpt_jax.adapter
from gpt_jax import generation_loop
from gpt_jax.decoding import MANY_ROWS, DecodingModel
from gpt_jax.generation_loop import FlatModel, StaticOptions, _cached_loop, _start, cache_growth
from gpt_jax.model import GPTModel, cast
from gpt_jax.sampling import bisect, in_order, search_digits
from parity.generation import prepare
from parity.sampling import seen_tokens

EVERY_RULE = {"top_k": 7, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1, "temperature": 0.8, "eos_id": 3}


def lowered_loop(options, platform):
    """The loop over tokens, lowered for a platform that this machine need not have."""
    request = prepare(TINY, [[1, 2, 3], [4]], 9, options)
    static = StaticOptions(request.active, request.return_logprobs)
    weights = FlatModel.of(jax.eval_shape(lambda: DecodingModel(GPTModel(TINY, None), 1)))
    inputs = jax.tree.map(jnp.asarray, request.inputs)
    seen = seen_tokens(request.prompts, TINY.n_vocab) if request.active.repetition_penalty else None
    state = jax.eval_shape(
        lambda *arguments: _start(*arguments, cache_length=32, static=static),
        weights, request.tokens, seen, inputs,
    )  # fmt: skip
    traced = _cached_loop.trace(weights, state, inputs, np.int32(9), static=static)
    return traced.lower(lowering_platforms=(platform,)).as_text(), len(jax.tree.leaves(state))


@pytest.mark.parametrize("options", [{"temperature": 0}, EVERY_RULE], ids=str)
def test_on_a_gpu_only_the_loop_over_tokens_waits_for_the_host(options):
    """The host reads the condition of a while loop before each iteration, and the index of a case."""
    program, n_donated = lowered_loop(options, "cuda")
    assert program.count("stablehlo.while") == 1
    for case in re.finditer(r'"stablehlo.case"\((%\w+)\)', program):  # of platform_dependent(): XLA removes it
        defined_by = re.findall(rf'{case[1]} = "?([\w.]+)', program[: case.start()])[-1]
        assert defined_by in ("stablehlo.constant", "stablehlo.case")
    for operation in ("stablehlo.if", "custom_call", "infeed", "outfeed", "send", "recv"):
        assert operation not in program, operation
    assert len(re.findall("tf.aliasing_output", program)) == n_donated


@pytest.mark.parametrize(("rule", "dtype"), [("top_k", np.float32), ("top_p", np.float32), ("top_k", np.float64)])
def test_both_searches_find_the_same_threshold(rule, dtype):
    generator = np.random.default_rng(0)
    values = (generator.normal(size=(60, 97)) * 3).astype(dtype)
    values[::3] = np.round(values[::3])  # ties
    values[1], values[4] = np.abs(values[1]), -np.abs(values[4])
    values[2, 5:] = -np.inf
    if rule == "top_p":
        values = np.exp(values) / np.exp(values).sum(axis=-1, keepdims=True)
    with jax.enable_x64(dtype == np.float64):
        top_k, top_p = generator.integers(1, 98, 60), generator.random(60).astype(dtype)

        def few_enough(larger):
            if rule == "top_k":
                return larger.sum(axis=-1) < top_k
            return jnp.where(larger, values, 0).sum(axis=-1) < top_p

        ordered = in_order(jnp.asarray(values))
        kept = [
            ordered >= search(ordered, few_enough)[:, None]
            for search in (bisect, jax.jit(search_digits, static_argnums=1))
        ]
    assert kept[0].any(axis=-1).all()
    assert not kept[0].all()
    np.testing.assert_array_equal(kept[1], kept[0])


def test_a_cache_that_grows_gives_the_same_rows(monkeypatch):
    """The prompts take 16 slots, and the cache has room for 32, or for 24 and then for 32."""
    prompts, options, lengths = [[5], [90, 0, 7]], {"temperature": 0.8, "seed": 3}, []
    config = dataclasses.replace(TINY, n_layer=1)
    decoder = gpt_jax.for_decoding(gpt_jax.adapter.build(config, probing_weights(config, np.float32)))
    expected, logprobs = gpt_jax.generate(decoder, prompts, 14, return_logprobs=True, **options)

    def recording(weights, state, *args, **keywords):
        lengths.append(state.cache[0][0].shape[1])
        return _cached_loop(weights, state, *args, **keywords)

    monkeypatch.setattr(generation_loop, "cache_growth", lambda *_: 8)
    monkeypatch.setattr(generation_loop, "_cached_loop", recording)
    rows, same_logprobs = gpt_jax.generate(decoder, prompts, 14, return_logprobs=True, **options)
    assert rows == expected
    np.testing.assert_allclose(same_logprobs, logprobs, rtol=1e-5)
    assert lengths == [24, 32]


def test_a_cache_grows_where_it_is_larger_than_the_weights():
    decoder = jax.eval_shape(lambda: DecodingModel(cast(GPTModel("124M", None), jnp.bfloat16), 1))
    assert [cache_growth(decoder, B) for B in (1, 8, 32, 1000)] == [4096, 512, 128, 128]
    small = jax.eval_shape(lambda: DecodingModel(GPTModel(TINY, None), 1))
    assert cache_growth(small, 8) > TINY.n_ctx


@pytest.mark.optimized
@pytest.mark.parametrize("n_rows", [5, 6, 170, 171])
def test_prompts_of_many_tokens(n_rows):
    """120 and 144 tokens, on either side of MANY_ROWS, then 4,080 and 4,104: from 4,096 rows on, XLA computes wrong
    products of groups with a fused LayerNorm. Where a prompt is one product, nothing is computed once for each group.
    """
    model = GPTModel(TINY, seed=1)
    decoder = DecodingModel(model, 2)
    tokens = np.random.default_rng(0).integers(0, TINY.n_vocab, (n_rows, TINY.n_ctx), dtype=np.int32)

    @jax.jit
    def logits(decoder, tokens):
        return decoder.decode(tokens, decoder.new_cache(n_rows, TINY.n_ctx), 0, jnp.zeros(n_rows, jnp.int32))[0]

    np.testing.assert_allclose(logits(decoder, tokens), jax.jit(lambda m, t: m(t)[:, -1])(model, tokens), atol=2e-6)
    if jax.default_backend() == "cpu":
        program = logits.lower(decoder, tokens).compile().as_text()
        in_groups = f"f32[2,{tokens.size},{4 * TINY.n_embd}]" in program
        assert in_groups == (tokens.size < MANY_ROWS)
