"""Log-probabilities of given tokens: both backends and the scorer against NumPy in float64."""

import dataclasses

import numpy as np
import pytest
from support.models import BACKENDS, TINY, probing_weights
from support.numpy_oracle import logits

import gpt_jax
import gpt_torch
from parity.errors import InputError
from parity.evaluation.scorer import Request, Scorer, truncate

PACKAGES = {"torch": gpt_torch, "jax": gpt_jax}
CONFIGS = {"gpt2": TINY, "notebook": dataclasses.replace(TINY, qkv_bias=False, tied_head=False)}


def log_softmax(z):
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def expected_logprobs(config, weights, tokens):
    """Log-probabilities [B, T - 1, V] of the tokens after each token but the last, in float64."""
    return log_softmax(logits(config, weights, tokens[:, :-1]))


def draw_requests(count=30, seed=0):
    """Draw requests of which some are longer than the context."""
    generator = np.random.default_rng(seed)
    requests = []
    for _ in range(count):
        ids = generator.integers(0, TINY.n_vocab, generator.integers(2, 2 * TINY.n_ctx)).tolist()
        n = int(generator.integers(1, min(len(ids), TINY.n_ctx + 1)))
        requests.append(Request(ids[:-n], ids[-n:]))
    return requests


@pytest.fixture(scope="module", params=PACKAGES)
def name(request):
    return request.param


@pytest.fixture(scope="module", params=CONFIGS)
def model_and_oracle(request, name):
    """(package, model, function from tokens [B, T] to log-probabilities)"""
    config = CONFIGS[request.param]
    weights = probing_weights(config, np.float32)
    model = BACKENDS[name].build(config, weights)
    return PACKAGES[name], model, lambda tokens: expected_logprobs(config, weights, tokens)


def test_logprobs_of_a_batch(model_and_oracle):
    package, model, oracle = model_and_oracle
    tokens = np.random.default_rng(1).integers(0, TINY.n_vocab, (3, TINY.n_ctx + 1))
    expected = oracle(tokens)
    tokens[0, 6:12] = expected[0, 5:11].argmax(axis=-1)
    expected = oracle(tokens)
    order = np.argsort(-expected, axis=-1, kind="stable")
    of_targets = np.take_along_axis(expected, tokens[:, 1:, None], axis=-1)[..., 0]
    others = np.where(np.arange(TINY.n_vocab) == tokens[:, 1:, None], -np.inf, expected).max(axis=-1)
    for first, last in ((None, None), (5, 9), (0, 1), (23, None)):
        result = package.token_logprobs(model, tokens, first, last, top=4)
        part = slice(first, last)
        assert np.asarray(result.logprobs).dtype == np.float32
        np.testing.assert_allclose(np.asarray(result.logprobs), of_targets[:, part], atol=1e-5)
        np.testing.assert_allclose(np.asarray(result.margins), (of_targets - others)[:, part], atol=1e-5)
        np.testing.assert_array_equal(np.asarray(result.is_greedy), (order[..., 0] == tokens[:, 1:])[:, part])
        np.testing.assert_array_equal(np.asarray(result.top_ids), order[:, part, :4])
        top_logprobs = np.take_along_axis(expected, order, axis=-1)[:, part, :4]
        np.testing.assert_allclose(np.asarray(result.top_logprobs), top_logprobs, atol=1e-5)
    assert np.asarray(package.token_logprobs(model, tokens).is_greedy).sum() >= 1


def test_scores(model_and_oracle):
    package, model, oracle = model_and_oracle
    requests = draw_requests()
    scores = dict(Scorer(package, model, batch_size=4).score(requests))
    assert sorted(scores) == list(range(len(requests)))
    for index, request in enumerate(requests):
        tokens, n_truncated = truncate(request, TINY.n_ctx)
        n = len(request.continuation)
        assert list(tokens) == [*request.context, *request.continuation][-(TINY.n_ctx + 1) :]
        assert n_truncated == len(request.context) + n - len(tokens)
        expected = oracle(tokens[None])[0, -n:]
        score = scores[index]
        of_targets = expected[np.arange(n), tokens[-n:]]
        np.testing.assert_allclose(score.token_logprobs, of_targets, atol=1e-5)
        assert score.logprob == float(score.token_logprobs.astype(np.float64).sum())
        assert score.is_greedy == bool((expected.argmax(axis=-1) == tokens[-n:]).all())
        assert score.n_truncated == n_truncated


def test_bad_requests_are_refused(model_and_oracle):
    package, model, _ = model_and_oracle
    scorer = Scorer(package, model)
    good = Request([1], [2])
    for bad, message in (
        (Request([], [1]), "request 1 has an empty context"),
        (Request([1], []), "request 1 has an empty continuation"),
        (Request([1], [2] * 25), "request 1 has a continuation of 25 tokens"),
        (Request([1], [97]), "request 1: token id 97 is outside the vocabulary"),
        (Request([-1], [3]), "request 1: token id -1 is outside the vocabulary"),
    ):
        with pytest.raises(InputError, match=message):
            scorer.score([good, bad])
