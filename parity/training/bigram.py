"""A bigram model of the corpus, which is the baseline that a language model should beat."""

from collections.abc import Sequence

import numpy as np

from parity.data.token_files import Tokens


def bigram_loss(train: Sequence[Tokens], validation: Sequence[Tokens], n_vocab: int) -> float:
    """Return the mean loss in nats per token of the best smoothed bigram model on the validation tokens.

    p(b | a) = (count(a, b) + k p(b)) / (count(a) + k), where p(b) is the unigram probability with 1 added to each
    count. k is the best of several values on the validation tokens themselves, which favours the baseline.

    Args:
        train: Token ids [length] of each shard.
        validation: Token ids [length] of each shard.
        n_vocab: Size of the vocabulary.
    """
    first, second = (np.concatenate([shard[part] for shard in train]) for part in (np.s_[:-1], np.s_[1:]))
    unigram = np.bincount(second, minlength=n_vocab) + 1.0
    unigram /= unigram.sum()
    totals = np.bincount(first, minlength=n_vocab)
    pairs, counts = np.unique(first.astype(np.int64) * n_vocab + second, return_counts=True)

    a, b = (np.concatenate([shard[part] for shard in validation]).astype(np.int64) for part in (np.s_[:-1], np.s_[1:]))
    index = np.minimum(np.searchsorted(pairs, a * n_vocab + b), len(pairs) - 1)
    pair_counts = np.where(pairs[index] == a * n_vocab + b, counts[index], 0)
    losses = [-np.log((pair_counts + k * unigram[b]) / (totals[a] + k)).mean() for k in (0.1, 1, 10, 100, 1000)]
    return float(min(losses))
