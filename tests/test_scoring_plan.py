"""Windows, truncation and batches: what is scored, and how much of a batch is padding."""

import numpy as np
import pytest
from measure.scoring import WORKS, draw_pairs

from parity.config import PRESETS
from parity.errors import InputError
from parity.evaluation.batches import Group, group_sequences, lay_out, padded_size, plan_batches
from parity.evaluation.scorer import Request, truncate, windows

N_CTX = 8


def scored(requests, n_tokens):
    """{token: the tokens before it that the model sees}, for a text of the tokens 0, 1, 2, ..."""
    result = {}
    for request in requests:
        seen = list(request.context)
        for token in request.continuation:
            assert token not in result
            assert seen == list(range(seen[0], token))
            result[int(token)] = seen[0]
            seen.append(int(token))
        assert len(seen) - 1 <= N_CTX
    assert max(result, default=0) < n_tokens
    return result


def hugging_face(n, stride):
    """Windows of n_ctx tokens. Labels are shifted inside a window, so its first token is never predicted."""
    result, previous_end = {}, 0
    for begin in range(0, n, stride):
        end = min(begin + N_CTX, n)
        labels = range(previous_end, end)
        result |= {token: begin for token in labels if token > begin}
        previous_end = end
        if end == n:
            break
    return result


def harness(n):
    """Token 0 is the end-of-text token. The last window is filled with earlier tokens, and inputs are n_ctx."""
    result, predicted = {}, 0
    while predicted < n - 1:
        count = min(n - 1 - predicted, N_CTX)
        end = predicted + count
        begin = max(0, end - N_CTX) if predicted else 0
        result |= dict.fromkeys(range(predicted + 1, end + 1), begin)
        predicted = end
    return result


def megatron(n, overlap):
    """Sample k has the inputs k overlap + 0 .. n_ctx - 1; each but the first counts its last `overlap` targets."""
    result = {}
    for sample in range(max(1, -(-max(n - 1 - overlap, 0) // overlap) + 1)):
        begin = sample * overlap
        targets = range(begin + 1, begin + N_CTX + 1)
        result |= {token: begin for token in (targets[-overlap:] if sample else targets) if token < n}
    return result


RULES = {
    "hf": (lambda tokens: windows(tokens, N_CTX, N_CTX), lambda n: hugging_face(n, N_CTX)),
    "hf, half": (lambda tokens: windows(tokens, N_CTX, N_CTX // 2), lambda n: hugging_face(n, N_CTX // 2)),
    "harness": (lambda tokens: windows(tokens, N_CTX + 1, N_CTX, is_last_full=True), harness),
    "megatron": (lambda tokens: windows(tokens, N_CTX + 1, 3), lambda n: megatron(n, 3)),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("n", [2, 3, 7, 8, 9, 10, 12, 15, 16, 17, 18, 24, 25, 26, 33, 50])
def test_windows(rule, n):
    ours, expected = RULES[rule]
    assert scored(ours(range(n)), n) == expected(n)


def test_a_window_of_one_token_scores_nothing():
    assert scored(windows(range(N_CTX + 1), N_CTX, N_CTX), N_CTX + 1) == dict.fromkeys(range(1, N_CTX), 0)
    assert list(scored(windows(range(25), N_CTX, N_CTX), 25)) == [x for x in range(24) if x % N_CTX]


def test_by_default_every_token_but_the_first_is_scored_once():
    assert list(scored(windows(range(50), N_CTX + 1), 50)) == list(range(1, 50))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((range(1), 8), "a text of 1 tokens"),
        ((range(9), 1), "windows of 1 tokens"),
        ((range(9), 8, 9), "windows of 8 tokens with stride 9"),
        ((range(9), 8, 0), "windows of 8 tokens with stride 0"),
    ],
)
def test_bad_windows_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        windows(*arguments)


def test_the_context_is_cut_from_the_left():
    """n_ctx + 1 tokens fit, because the last one is only scored."""
    for n_context in range(1, 12):
        context, continuation = list(range(100, 100 + n_context)), [1, 2, 3]
        tokens, n_truncated = truncate(Request(context, continuation), N_CTX)
        assert tokens.tolist() == [*context[max(0, n_context - 6) :], 1, 2, 3]
        assert n_truncated == max(0, n_context - 6)
    tokens, n_truncated = truncate(Request([7, 8, 9], range(N_CTX)), N_CTX)
    assert (tokens.tolist(), n_truncated) == ([9, *range(N_CTX)], 2)


def test_padded_sizes_are_few_and_near():
    for n in range(1, 1025):
        size = padded_size(n, 1024)
        assert n <= size <= 1024
        assert size - n < 8 or (size - n) / size < 1 / 8
    assert len({padded_size(n, 1024) for n in range(1, 1025)}) == 40
    assert padded_size(1000, 1003) == 1003
    assert padded_size(3, 4) == 4


def groups_of(lengths):
    return [Group([index], length) for index, length in enumerate(lengths)]


def test_each_group_is_in_one_batch():
    lengths = np.random.default_rng(0).integers(1, 100, 57).tolist()
    batches = plan_batches(groups_of(lengths), 100, lambda n_inputs: 10)
    assert sorted(index for batch in batches for group in batch.groups for index in group.indices) == list(range(57))
    assert [len(batch.groups) for batch in batches] == [10] * 5 + [7]
    assert [batch.n_inputs for batch in batches] == sorted((batch.n_inputs for batch in batches), reverse=True)
    assert all(group.n_inputs <= batch.n_inputs for batch in batches for group in batch.groups)
    assert plan_batches([], 100, lambda n_inputs: 10) == []


@pytest.mark.parametrize(
    ("count", "multiple", "n_rows"), [(15, 1, 15), (9, 1, 15), (8, 1, 8), (1, 1, 1), (3, 5, 5), (9, 5, 15)]
)
def test_the_last_batch_has_fewer_rows(count, multiple, n_rows):
    *_, last = plan_batches(groups_of([5] * (30 + count)), 100, lambda n_inputs: 15, multiple)
    assert (len(last.groups), last.n_rows) == (count, n_rows)


def test_sequences_with_a_common_context_are_grouped():
    a, b = list(range(10)), list(range(1, 11))
    pairs = [
        (a, [1, 2]),
        (b, [1]),
        (a, [3, 4, 5]),
        (a, [6] * 8),
        (b, [7]),
        (a, [8] * 21),
        ([9], [1, 2, 3]),
        ([9], [4, 5, 6]),
    ]
    sequences, counts = [np.array(x + y) for x, y in pairs], [len(y) for _, y in pairs]
    expected = [([0, 2, 3], 10 + 1 + 2 + 7), ([1, 4], 10), ([5], 30), ([6], 3), ([7], 3)]
    assert [tuple(group) for group in group_sequences(sequences, counts, 100, True)] == expected
    expected = [([0, 2], 13), ([1, 4], 10), ([3], 17), ([5], 30), ([6], 3), ([7], 3)]
    assert [tuple(group) for group in group_sequences(sequences, counts, 19, True)] == expected
    expected = [([index], len(sequence) - 1) for index, sequence in enumerate(sequences)]
    assert [tuple(group) for group in group_sequences(sequences, counts, 100, False)] == expected


def test_the_layout_of_a_batch():
    sequences, counts = [np.arange(1, 6), np.arange(11, 14), np.array([1, 2, 8]), np.array([1, 2, 9])], [3, 1, 1, 1]
    [batch] = plan_batches(group_sequences(sequences, counts, 8, True), 8, lambda n_inputs: 3, multiple=3)
    layout = lay_out(batch, sequences, counts)
    assert layout.tokens.tolist() == [[1, 2, 3, 4, *[0] * 4], [11, 12, *[0] * 6], [0] * 8]
    assert layout.positions.tolist() == [[0, 1, 2, 3, *[0] * 4], [0, 1, *[0] * 6], [0] * 8]
    assert layout.segments.tolist() == [[0, 0, 1, 1, *[0] * 4], [0] * 8, [0] * 8]
    assert layout.is_shared
    assert layout.rows.tolist() == [0, 0, 0, 0, 0, 1]
    assert layout.columns.tolist() == [1, 2, 3, 1, 1, 1]
    assert layout.targets.tolist() == [3, 4, 5, 8, 9, 13]
    assert layout.counts == {0: 3, 2: 1, 3: 1, 1: 1}
    assert list(layout.counts) == [0, 2, 3, 1]


@pytest.mark.parametrize("name", WORKS)
@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("count", [500, 5152])
def test_less_than_15_percent_is_padding(name, is_shared, count):
    pairs = draw_pairs(PRESETS["124M"], name, count)
    sequences = [np.array(context + continuation) for context, continuation in pairs]
    groups = group_sequences(sequences, [len(continuation) for _, continuation in pairs], 1024, is_shared)
    batches = plan_batches(groups, 1024, lambda n_inputs: 2**10 // n_inputs)
    computed = sum(batch.n_rows * batch.n_inputs for batch in batches)
    padding = 1 - sum(group.n_inputs for group in groups) / computed
    sizes = {(batch.n_rows, batch.n_inputs) for batch in batches}
    print(f"{name}: {len(groups):,} rows, {computed:,} tokens, {padding:.1%} padding, {len(sizes)} sizes")
    assert padding < 0.15
