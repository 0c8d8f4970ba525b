"""Planted errors of the scorer, each of which the comparison with NumPy in float64 catches."""

import numpy as np
import pytest
from support.models import BACKENDS, TINY, probing_weights
from support.numpy_oracle import logits

import gpt_jax
import gpt_jax.scoring
import gpt_torch
import gpt_torch.scoring
from parity.evaluation import scorer as module
from parity.evaluation.scorer import Request, Scorer, windows

PACKAGES = {"torch": gpt_torch, "jax": gpt_jax}
ATOL = 1e-5
TEXT = np.random.default_rng(3).integers(0, TINY.n_vocab, 60).tolist()
# In one batch, so that all rows but the longest are padded. One is longer than the context, three have a common one.
REQUESTS = [
    Request(TEXT[:5], TEXT[5:8]),
    Request(TEXT[:9], TEXT[9:10]),
    Request(TEXT[:30], TEXT[30:40]),
    Request(TEXT[20:21], TEXT[21:28]),
    Request(TEXT[:9], TEXT[40:44]),
    Request(TEXT[:9], TEXT[46:49]),
]


def expected(weights, request):
    """The log-probabilities of a continuation, and whether each token is the most likely one."""
    tokens = [*request.context, *request.continuation][-(TINY.n_ctx + 1) :]
    n = len(request.continuation)
    z = logits(TINY, weights, np.array([tokens[:-1]]))[0, -n:]
    z = z - z.max(axis=-1, keepdims=True)
    logprobs = (z - np.log(np.exp(z).sum(axis=-1, keepdims=True)))[np.arange(n), tokens[-n:]]
    return logprobs, z.argmax(axis=-1) == tokens[-n:]


def is_right(package, model, answers):
    """Whether all scores of REQUESTS are those of NumPy."""
    scores = dict(Scorer(package, model).score(REQUESTS))
    return all(
        np.abs(scores[index].token_logprobs - logprobs).max() < ATOL
        and abs(scores[index].logprob - logprobs.sum()) < len(logprobs) * ATOL
        for index, (logprobs, _) in enumerate(answers)
    )


right_lay_out, right_truncate, right_score = module.lay_out, module.truncate, module._score


def label_shifted(by):
    def lay_out(*arguments):
        layout = right_lay_out(*arguments)
        return layout._replace(columns=(layout.columns + by) % layout.tokens.shape[1])

    return lay_out


def padding_scored(*arguments):
    """The last positions of a row."""
    layout = right_lay_out(*arguments)
    shifts = [layout.tokens.shape[1] - 1 - layout.columns[layout.rows == row].max() for row in layout.rows]
    return layout._replace(columns=layout.columns + np.array(shifts))


def padded_on_the_left(*arguments):
    layout = right_lay_out(*arguments)
    shifts = [layout.tokens.shape[1] - 1 - layout.columns[layout.rows == row].max() for row in layout.rows]
    tokens, positions, segments = (a.copy() for a in (layout.tokens, layout.positions, layout.segments))
    for row, shift in dict(zip(layout.rows.tolist(), shifts, strict=True)).items():
        for array in (tokens, positions, segments):
            array[row] = np.roll(array[row], shift)
    columns = layout.columns + np.array(shifts)
    return layout._replace(tokens=tokens, positions=positions, segments=segments, columns=columns)


def all_attended(*arguments):
    """A continuation attends to those before it in the row."""
    layout = right_lay_out(*arguments)
    return layout._replace(segments=np.zeros_like(layout.segments))


def positions_run_on(*arguments):
    layout = right_lay_out(*arguments)
    T = layout.tokens.shape[1]
    return layout._replace(positions=np.broadcast_to(np.arange(T, dtype=np.int32), layout.tokens.shape).copy())


def first_token_from_the_column_before(*arguments):
    """The first token of each continuation is scored after the continuation that precedes it in the row."""
    layout = right_lay_out(*arguments)
    columns, start = layout.columns.copy(), 0
    for n in layout.counts.values():
        if n > 1:
            columns[start] = columns[start + 1] - 1
        start += n
    return layout._replace(columns=columns)


def truncated_on_the_right(request, n_ctx, name=""):
    tokens = np.array([*request.context, *request.continuation])
    return tokens[: n_ctx + 1], max(0, len(tokens) - n_ctx - 1)


def truncated_to_the_context(request, n_ctx, name=""):
    """One token less than fits."""
    tokens, n_truncated = right_truncate(request, n_ctx)
    return (tokens[1:], n_truncated + 1) if n_truncated else (tokens, 0)


def mean_for_sum(*arguments):
    score = right_score(*arguments)
    return score._replace(logprob=score.logprob / len(score.token_logprobs))


ERRORS = {
    "label shifted by one": ("lay_out", label_shifted(-1)),
    "label shifted by minus one": ("lay_out", label_shifted(1)),
    "padding scored": ("lay_out", padding_scored),
    "padded on the left": ("lay_out", padded_on_the_left),
    "continuations attend to each other": ("lay_out", all_attended),
    "positions run on": ("lay_out", positions_run_on),
    "first token after another continuation": ("lay_out", first_token_from_the_column_before),
    "truncated on the right": ("truncate", truncated_on_the_right),
    "truncated to n_ctx tokens": ("truncate", truncated_to_the_context),
    "mean for sum": ("_score", mean_for_sum),
}


@pytest.fixture(scope="module", params=PACKAGES)
def case(request):
    """(package, model, right answers)"""
    weights = probing_weights(TINY, np.float32)
    answers = [expected(weights, request) for request in REQUESTS]
    return PACKAGES[request.param], BACKENDS[request.param].build(TINY, weights), answers


def test_without_an_error(case):
    assert is_right(*case)


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_is_caught(case, error, monkeypatch):
    name, planted = ERRORS[error]
    monkeypatch.setattr(module, name, planted)
    assert not is_right(*case)


def overlapping(tokens, length, stride):
    """Each window but the first scores one token that the window before it has scored."""
    first, *others = windows(tokens, length, stride)
    return [first, *(Request(r.context[:-1], [r.context[-1], *r.continuation]) for r in others if len(r.context) > 1)]


def with_gaps(tokens, length, stride):
    """Each window but the first leaves out its first token."""
    first, *others = windows(tokens, length, stride)
    return [first, *(Request([*r.context, r.continuation[0]], r.continuation[1:]) for r in others)]


def moved(tokens, length, stride):
    """Each window but the first starts one token too late."""
    first, *others = windows(tokens, length, stride)
    return [first, *(Request(r.context[1:], r.continuation) for r in others)]


@pytest.mark.parametrize("wrong", [overlapping, with_gaps, moved], ids=lambda f: f.__name__)
def test_a_wrong_window_is_caught(case, wrong):
    """The log-probability of a text of two and a half contexts, in windows that overlap by half."""
    package, model, _ = case
    weights = probing_weights(TINY, np.float32)
    starts = [0, *range(12, 60, 12)]
    total, scored = 0.0, 0
    for start in starts:
        end = min(start + 24, 60)
        total += expected(weights, Request(TEXT[start : max(scored, start + 1)], TEXT[max(scored, start + 1) : end]))[
            0
        ].sum()
        scored = end
        if end == 60:
            break

    def logprob(requests):
        return sum(score.logprob for _, score in Scorer(package, model).score(requests))

    assert logprob(windows(TEXT, 24, 12)) == pytest.approx(total, abs=60 * ATOL)
    assert logprob(wrong(TEXT, 24, 12)) != pytest.approx(total, abs=60 * ATOL)


def reversed_argmax(package):
    """An argmax that returns the last of several equal elements."""

    def torch_logprobs(model, x, targets, top):
        right = _right(model, x, targets, top)
        logits = gpt_torch.scoring.head_logits(model, x)
        return right._replace(is_greedy=logits.shape[-1] - 1 - logits.flip(-1).argmax(dim=-1) == targets)

    def jax_logprobs(model, x, targets, top):
        right = _right(model, x, targets, top)
        logits = gpt_jax.scoring.head_logits(model, x)
        return right._replace(is_greedy=logits.shape[-1] - 1 - logits[:, ::-1].argmax(axis=-1) == targets)

    name, wrong = {gpt_torch: ("_chunk_logprobs", torch_logprobs), gpt_jax: ("_logprobs", jax_logprobs)}[package]
    _right = getattr(package.scoring, name)
    return package.scoring, name, wrong


def test_a_tie_to_the_last_index_is_caught(case, monkeypatch):
    package, model, _ = case
    weights = probing_weights(TINY, np.float32)
    weights["wte.weight"] = np.zeros_like(weights["wte.weight"])  # so that all tokens are equally likely
    model = BACKENDS["torch" if package is gpt_torch else "jax"].build(TINY, weights)
    requests = [Request([4], [0]), Request([4], [TINY.n_vocab - 1]), Request([4], [0, 0]), Request([4], [0, 1])]

    def choices():
        return [score.is_greedy for _, score in sorted(Scorer(package, model).score(requests))]

    assert choices() == [True, False, True, False]
    monkeypatch.setattr(*reversed_argmax(package))
    gpt_jax.scoring._compiled.cache_clear()
    try:
        assert choices() != [True, False, True, False]
    finally:
        gpt_jax.scoring._compiled.cache_clear()
