"""Log-probabilities of given tokens: both backends and the scorer against NumPy in float64."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from support.models import BACKENDS, TINY, probing_weights
from support.numpy_oracle import logits
from support.scored_requests import draw_requests

import gpt_jax
import gpt_jax.scoring
import gpt_torch
from parity import taps
from parity.comparison.error_bounds import UNIT_ROUNDOFF, propagated_errors
from parity.config import GPTConfig
from parity.errors import InputError
from parity.evaluation.batches import chunk_sizes
from parity.evaluation.scorer import Request, Scorer, truncate

PACKAGES = {"torch": gpt_torch, "jax": gpt_jax}
CONFIGS = {"gpt2": TINY, "notebook": dataclasses.replace(TINY, qkv_bias=False, tied_head=False)}


def log_softmax(z):
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def at(array, tokens):
    """array [..., T, V] at tokens [..., T]"""
    return np.take_along_axis(array, tokens[..., None], axis=-1)[..., 0]


def margins(z, tokens):
    """Logits [..., T, V] at tokens [..., T], minus the largest logit of any other token."""
    return at(z, tokens) - np.where(np.arange(z.shape[-1]) == tokens[..., None], -np.inf, z).max(axis=-1)


def integer_model(name, values):
    """A model whose logits are these integers [V] at every position, exactly."""
    config = GPTConfig(n_vocab=len(values), n_ctx=8, n_embd=4, n_head=2, n_layer=1, tied_head=False)
    weights = probing_weights(config, np.float32)
    weights["ln_f.weight"] = np.zeros(4, np.float32)
    weights["ln_f.bias"] = np.array([1, 0, 0, 0], np.float32)
    weights["lm_head.weight"] = np.zeros((len(values), 4), np.float32)
    weights["lm_head.weight"][:, 0] = values
    return BACKENDS[name].build(config, weights)


def plan(scorer, requests):
    sequences = [truncate(request, scorer.config.n_ctx)[0] for request in requests]
    return scorer.plan(sequences, [len(request.continuation) for request in requests])


@pytest.fixture(scope="module", params=PACKAGES)
def name(request):
    return request.param


@pytest.fixture(scope="module", params=CONFIGS)
def scored(request, name):
    """(package, model, function from tokens [B, T] to the logits of the tokens after each but the last, in float64)"""
    config = CONFIGS[request.param]
    weights = probing_weights(config, np.float32)
    model = BACKENDS[name].build(config, weights)
    return PACKAGES[name], model, lambda tokens: logits(config, weights, tokens[:, :-1])


def test_a_batch(scored):
    package, model, oracle = scored
    tokens = np.random.default_rng(1).integers(0, TINY.n_vocab, (3, TINY.n_ctx + 1))
    tokens[0, 12] = oracle(tokens)[0, 11].argmax()  # so that one token is the most likely
    z = oracle(tokens)
    order = np.argsort(-z, axis=-1, kind="stable")
    for first, last in ((None, None), (5, 9), (11, 12), (23, None)):
        result = package.token_logprobs(model, tokens, first, last, top=4)
        assert np.asarray(result.logprobs).dtype == np.float32
        part = slice(first, last)
        np.testing.assert_allclose(np.asarray(result.logprobs), at(log_softmax(z), tokens[:, 1:])[:, part], atol=1e-5)
        np.testing.assert_allclose(np.asarray(result.margins), margins(z, tokens[:, 1:])[:, part], atol=1e-5)
        np.testing.assert_array_equal(np.asarray(result.is_greedy), (order[..., 0] == tokens[:, 1:])[:, part])
        np.testing.assert_array_equal(np.asarray(result.top_ids), order[:, part, :4])
        expected = np.take_along_axis(log_softmax(z), order, axis=-1)[:, part, :4]
        np.testing.assert_allclose(np.asarray(result.top_logprobs), expected, atol=1e-5)
    assert bool(package.token_logprobs(model, tokens).is_greedy[0, 11])


def test_arguments_out_of_range_are_refused(scored):
    package, model, _ = scored
    tokens = np.zeros((2, TINY.n_ctx + 1), int)
    for arguments, message in (
        ((tokens[0],), r"axes \[B, T\]"),
        ((tokens[:, :1],), "T must be at least 2"),
        ((np.zeros((2, TINY.n_ctx + 2), int),), "more than the model's context"),
        ((tokens, 3, 3), "first=3 to last=3"),
        ((tokens, -1, 3), "first=-1 to last=3"),
        ((tokens, 0, TINY.n_ctx + 1), "first=0 to last=25"),
        ((tokens, 0, 3, 98), "top must be between 0 and the size of the vocabulary, 97; got 98"),
        ((np.where(np.arange(TINY.n_ctx + 1) == TINY.n_ctx, 97, tokens),), "token id 97 is outside"),
        ((np.where(np.arange(TINY.n_ctx + 1) == 0, -1, tokens),), "token id -1 is outside"),
    ):
        with pytest.raises(InputError, match=message):
            package.token_logprobs(model, *arguments)


def test_ties_go_to_the_first_id(name):
    values = [3, 7, 1, 7, 3, 7, 3]
    tokens = np.array([[0, 1, 3, 5, 0, 4]])
    for top, ids in ((2, [1, 3]), (4, [1, 3, 5, 0]), (5, [1, 3, 5, 0, 4]), (7, [1, 3, 5, 0, 4, 6, 2])):
        result = PACKAGES[name].token_logprobs(integer_model(name, values), tokens, top=top)
        np.testing.assert_array_equal(np.asarray(result.top_ids), [[ids] * 5])
        np.testing.assert_array_equal(np.asarray(result.is_greedy), [[True, False, False, False, False]])
        np.testing.assert_array_equal(np.asarray(result.margins), [[0, 0, 0, -4, -4]])
        expected = log_softmax(np.array(values, float))
        np.testing.assert_allclose(np.asarray(result.top_logprobs)[0, 0], expected[ids], rtol=1e-6)
        np.testing.assert_allclose(np.asarray(result.logprobs)[0], expected[tokens[0, 1:]], rtol=1e-6)


def test_a_tie_of_three_hundred_tokens(name):
    """More than a block of any sorting algorithm."""
    values = np.zeros(300)
    values[[40, 290]] = 1
    result = PACKAGES[name].token_logprobs(integer_model(name, values), np.array([[1, 40]]), top=5)
    assert np.asarray(result.top_ids).tolist() == [[[40, 290, 0, 1, 2]]]
    assert np.asarray(result.is_greedy).tolist() == [[True]]


def test_large_logits_lose_nothing(name):
    """float32 has a spacing of 0.008 at 100,000; the difference of two such numbers is exact."""
    values = np.array([-100_000, -100_001, -100_002])
    result = PACKAGES[name].token_logprobs(integer_model(name, values), np.array([[0, 2]]))
    np.testing.assert_allclose(float(result.logprobs[0, 0]), log_softmax(values.astype(float))[2], rtol=1e-6)


def test_float64_stays_float64(name):
    weights = probing_weights(TINY)
    tokens = np.random.default_rng(1).integers(0, TINY.n_vocab, (2, 9))
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        result = PACKAGES[name].token_logprobs(BACKENDS[name].build(TINY, weights), tokens, top=1)
        logprobs = np.asarray(result.logprobs)
    assert logprobs.dtype == np.float64
    expected = at(log_softmax(logits(TINY, weights, tokens[:, :-1])), tokens[:, 1:])
    np.testing.assert_allclose(logprobs, expected, rtol=1e-11)


def test_chunks_cover_the_positions():
    assert chunk_sizes(31, 100, 10**9) == [32]
    assert chunk_sizes(575, 50257, 2**25) == [512, 32, 32]
    assert chunk_sizes(2048, 50257, 2**25) == [512] * 4
    assert chunk_sizes(100, 50257, 1) == [32] * 4
    for n in range(1, 300):
        sizes = chunk_sizes(n, 50257, 128 * 50257)
        assert 0 <= sum(sizes) - n < 32
        assert set(sizes) <= {32, 64, 128}


def test_many_chunks_give_the_same(scored, monkeypatch):
    package, model, _ = scored
    tokens = np.random.default_rng(1).integers(0, TINY.n_vocab, (3, 25))
    whole = package.token_logprobs(model, tokens, top=2)
    monkeypatch.setattr(package.scoring, "chunk_sizes", lambda n, n_vocab, largest: chunk_sizes(n, n_vocab, 1))
    for a, b in zip(whole, package.token_logprobs(model, tokens, top=2), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-6)


def test_in_a_compiled_function():
    model = gpt_jax.GPTModel(TINY)
    tokens = np.random.default_rng(1).integers(0, TINY.n_vocab, (2, 9), dtype=np.int32)
    compiled = jax.jit(lambda model, tokens: gpt_jax.token_logprobs(model, tokens, 2, 5, top=1))
    for a, b in zip(compiled(model, tokens), gpt_jax.token_logprobs(model, tokens, 2, 5, top=1), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-6)
    tokens[0, 3] = 97
    logprobs = np.asarray(compiled(model, tokens).logprobs)
    assert np.isnan(logprobs[0, 0])
    assert np.isfinite(logprobs[1]).all()


def test_dropout_is_off_and_the_mode_is_kept():
    model = gpt_torch.GPTModel(dataclasses.replace(TINY, drop_rate=0.5))
    model.train()
    tokens = torch.arange(10)[None]
    first, second = (gpt_torch.token_logprobs(model, tokens).logprobs for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert model.training


def test_scores(scored):
    package, model, oracle = scored
    requests = draw_requests(TINY)
    scores = dict(Scorer(package, model, batch_size=4).score(requests, top=3))
    assert sorted(scores) == list(range(len(requests)))
    for index, request in enumerate(requests):
        tokens, n_truncated = truncate(request, TINY.n_ctx)
        n = len(request.continuation)
        assert list(tokens) == [*request.context, *request.continuation][-(TINY.n_ctx + 1) :]
        z, targets, score = oracle(tokens[None])[0, -n:], tokens[-n:], scores[index]
        np.testing.assert_allclose(score.token_logprobs, at(log_softmax(z), targets), atol=1e-5)
        assert score.logprob == float(score.token_logprobs.astype(np.float64).sum())
        assert score.is_greedy == bool((z.argmax(axis=-1) == targets).all())
        assert score.margin == pytest.approx(margins(z, targets).min(), abs=1e-5)
        assert score.n_truncated == n_truncated == len(request.context) + n - len(tokens)
        assert score.top_ids.tolist() == np.argsort(-z, axis=-1, kind="stable")[:, :3].tolist()


def test_a_context_is_computed_once(scored, monkeypatch):
    """Its continuations are in one row and do not attend to each other; a fused kernel computes rows apart."""
    package, model, oracle = scored
    ids = np.random.default_rng(5).integers(0, TINY.n_vocab, 40).tolist()
    requests = [Request(ids[:9], ids[9 + 3 * i : 9 + 4 * i + 1]) for i in range(5)]
    scorer = Scorer(package, model)
    [batch] = plan(scorer, requests)
    assert [(group.indices, group.n_inputs) for group in batch.groups] == [([0, 1, 2, 3, 4], 9 + 0 + 1 + 2 + 3 + 4)]
    shared = dict(scorer.score(requests))
    monkeypatch.setattr(scorer._score_batches, "can_share", False)
    assert [len(group.indices) for batch in plan(scorer, requests) for group in batch.groups] == [1] * 5
    apart = dict(scorer.score(requests))
    for index, request in enumerate(requests):
        z = oracle(np.array([[*request.context, *request.continuation]]))[0, 8:]
        expected = at(log_softmax(z), np.array(request.continuation))
        np.testing.assert_allclose(shared[index].token_logprobs, expected, atol=1e-5)
        np.testing.assert_allclose(apart[index].token_logprobs, expected, atol=1e-5)


def test_models_with_a_fused_kernel_compute_rows_apart():
    model = gpt_torch.GPTModel(TINY, attention="sdpa")
    ids = list(range(12))
    requests = [Request(ids[:9], ids[n:]) for n in (9, 10, 11)]
    scores = dict(Scorer(gpt_torch, model).score(requests))
    for index, score in Scorer(gpt_torch, gpt_torch.GPTModel(TINY)).score(requests):
        np.testing.assert_allclose(scores[index].token_logprobs, score.token_logprobs, atol=1e-5)
    assert not gpt_jax.scoring.BatchScorer(gpt_jax.GPTModel(TINY, attention="cudnn")).can_share


def test_a_greedy_continuation(scored):
    package, model, oracle = scored
    tokens = [5, 6]
    for _ in range(4):
        tokens.append(int(oracle(np.array([[*tokens, 0]]))[0, -1].argmax()))
    requests = [Request(tokens[:2], tokens[2:]), Request(tokens[:2], [*tokens[2:-1], (tokens[-1] + 1) % TINY.n_vocab])]
    scores = dict(Scorer(package, model).score(requests))
    assert [scores[0].is_greedy, scores[1].is_greedy] == [True, False]
    assert scores[0].margin > 0 > scores[1].margin


def test_a_resumed_call_gives_the_same_bits(scored):
    package, model, _ = scored
    requests = draw_requests(TINY)
    scorer = Scorer(package, model, batch_size=4)
    calls = []
    expected = list(scorer.score(requests, progress=lambda *numbers: calls.append(numbers)))
    done = {index for index, _ in expected[:13]}
    later = list(scorer.score(requests, skip=done))
    assert [index for index, _ in later] == [index for index, _ in expected[13:]]
    for (_, a), (_, b) in zip(later, expected[13:], strict=True):
        assert a.token_logprobs.tobytes() == b.token_logprobs.tobytes()
    sizes = [batch.n_rows * batch.n_inputs for batch in plan(scorer, requests)]
    assert calls == [(int(done), sum(sizes)) for done in np.cumsum(sizes)]
    assert list(scorer.score(requests, skip=range(len(requests)))) == []
    assert list(scorer.score([])) == []


def test_bad_requests_are_refused(scored):
    package, model, _ = scored
    scorer, good = Scorer(package, model), Request([1], [2])
    for bad, message in (
        (Request([], [1]), "request 1 has an empty context; put the end-of-text token before the text"),
        (Request([1], []), "request 1 has an empty continuation"),
        (Request([1], [2] * 25), "request 1 has a continuation of 25 tokens, more than the model's context, n_ctx=24"),
        (Request([1], [97]), "request 1: token id 97 is outside the vocabulary"),
        (Request([-1], [3]), "request 1: token id -1 is outside the vocabulary"),
    ):
        with pytest.raises(InputError, match=message):
            scorer.score([good, bad])
    with pytest.raises(InputError, match="top must be between"):
        scorer.score([good], top=98)
    with pytest.raises(InputError, match="--batch-size 0"):
        Scorer(package, model, batch_size=0)


def test_results_that_are_not_finite_are_refused(name):
    model = integer_model(name, [3e38, 0, -3e38])  # float32 cannot hold the difference
    with pytest.raises(InputError, match="request 0: the model's log-probabilities are not finite"):
        list(Scorer(PACKAGES[name], model).score([Request([0], [2])]))


def test_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(InputError, match="--mesh is for --backend jax"):
        Scorer(gpt_torch, gpt_torch.GPTModel(TINY), mesh=object())
    mesh = jax.sharding.AbstractMesh((1, 2, 1), ("data", "fsdp", "tensor"))
    with pytest.raises(InputError, match="give data=N and no other axis"):
        Scorer(gpt_jax, gpt_jax.GPTModel(TINY), mesh=mesh)


def test_a_size_is_compiled_once():
    config = dataclasses.replace(TINY, n_ctx=40, n_embd=12, n_layer=1)  # no other test has this shape
    scorer = Scorer(gpt_jax, gpt_jax.GPTModel(config), batch_size=4)
    generator = np.random.default_rng(0)

    def requests(count):
        lengths = generator.integers(2, config.n_ctx, count)
        return [Request(generator.integers(0, 97, n).tolist(), generator.integers(0, 97, 3).tolist()) for n in lengths]

    programs = gpt_jax.scoring._compiled(None)
    before = [program._cache_size() for program in programs]
    first = requests(60)
    list(scorer.score(first))
    batches = plan(scorer, first)
    assert len(batches) == 15
    assert {(batch.n_rows, batch.n_inputs) for batch in batches} == {(4, n) for n in (8, 16, 24, 32, 40)}
    after = [program._cache_size() for program in programs]
    assert [b - a for a, b in zip(before, after, strict=True)] == [5, 0, 5, 1]  # all chunks have 32 positions
    list(scorer.score(requests(60)))
    assert [program._cache_size() for program in programs] == after


def test_backends_agree_item_by_item_within_the_bound_of_rounding():
    """A choice may differ only where its margin lies inside the bound; such items are named."""
    weights = probing_weights(TINY, np.float32)
    requests = draw_requests(TINY, count=40)
    results = {}
    for name, package in PACKAGES.items():
        results[name] = dict(Scorer(package, BACKENDS[name].build(TINY, weights), batch_size=8).score(requests))
    undecided = []
    for index, request in enumerate(requests):
        tokens, _ = truncate(request, TINY.n_ctx)
        n = len(request.continuation)

        def compute(noise, tokens=tokens):
            """At all positions, because the bound is a multiple of the largest of random deviations."""
            with taps.probe(TINY, ["logits"], {name: rounding.forward for name, rounding in noise.items()}) as cache:
                logits(TINY, weights, tokens[None, :-1])
            z = cache["logits"][0]
            return {"logprobs": at(log_softmax(z), tokens[1:]), "margins": margins(z, tokens[1:])}

        exact, bounds = propagated_errors(TINY, "float32", len(tokens) - 1, compute)
        for name, array in exact.items():  # the differences and the logarithm of the sum, and storing the result
            bounds[name] += 4 * UNIT_ROUNDOFF["float32"] * float(np.abs(array).max())
        margin = exact["margins"][-n:].min()
        for score in (results["torch"][index], results["jax"][index]):
            assert np.abs(score.token_logprobs - exact["logprobs"][-n:]).max() <= bounds["logprobs"], index
            assert abs(score.margin - margin) <= bounds["margins"], index
            assert bounds["logprobs"] < 5e-5  # far below any error of the code
        if results["torch"][index].is_greedy != results["jax"][index].is_greedy:
            undecided.append(index)
            assert abs(margin) <= bounds["margins"], index
    print("items with another choice:", undecided)
