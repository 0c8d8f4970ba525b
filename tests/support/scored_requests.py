"""Requests for the scorer, in the processes of test_scoring.py and in the program shared_scores.py."""

import numpy as np

from parity.evaluation.scorer import Request


def draw_requests(config, count=30, seed=0):
    """Draw requests, of which some are longer than the context, and some have a context in common with others."""
    generator = np.random.default_rng(seed)
    requests = []
    for _ in range(count):
        ids = generator.integers(0, config.n_vocab, generator.integers(2, 2 * config.n_ctx)).tolist()
        n = int(generator.integers(1, min(len(ids), config.n_ctx + 1)))
        requests.append(Request(ids[:-n], ids[-n:]))
        while generator.random() < 0.4:
            other = generator.integers(0, config.n_vocab, generator.integers(1, 8)).tolist()
            requests.append(Request(ids[:-n], other))
    return requests
