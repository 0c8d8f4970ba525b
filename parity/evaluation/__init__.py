"""Evaluation of a model: log-probabilities of given tokens, and the measures that are computed from them."""
