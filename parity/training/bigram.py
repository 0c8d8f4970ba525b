"""A bigram model of the corpus: the baseline that a language model has to beat."""

from collections.abc import Sequence

import numpy as np


def bigram_loss(train: Sequence[np.ndarray], validation: Sequence[np.ndarray], n_vocab: int) -> float:
    """Mean loss in nats a token, on the validation tokens, of the best smoothed bigram.

    p(b | a) = (count(a, b) + k p(b)) / (count(a) + k), with p(b) from counts plus one, and k the best of
    several on the validation tokens themselves: the baseline gets every benefit of the doubt.
    """
    first, second = (np.concatenate([shard[part] for shard in train]) for part in (np.s_[:-1], np.s_[1:]))
    unigram = np.bincount(second, minlength=n_vocab) + 1.0
    unigram /= unigram.sum()
    totals = np.bincount(first, minlength=n_vocab)
    pairs, counts = np.unique(first.astype(np.int64) * n_vocab + second, return_counts=True)

    a, b = (np.concatenate([shard[part] for shard in validation]).astype(np.int64) for part in (np.s_[:-1], np.s_[1:]))
    found = np.minimum(np.searchsorted(pairs, a * n_vocab + b), len(pairs) - 1)
    seen = np.where(pairs[found] == a * n_vocab + b, counts[found], 0)
    losses = [-np.log((seen + k * unigram[b]) / (totals[a] + k)).mean() for k in (0.1, 1, 10, 100, 1000)]
    return float(min(losses))
