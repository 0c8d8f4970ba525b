"""Checks on token ids that both backends make on entry."""

from parity.config import GPTConfig
from parity.errors import InputError


def check_tokens(shape: tuple[int, ...], config: GPTConfig, low: int = 0, high: int = 0) -> None:
    """Raise InputError unless tokens of `shape` [B, T], with ids low..high, fit the model."""
    if len(shape) != 2:
        raise InputError(f"tokens must have axes [B, T], got shape {list(shape)}")
    if 0 in shape:
        raise InputError(f"tokens are empty: shape {list(shape)}")
    if shape[1] > config.n_ctx:
        raise InputError(f"{shape[1]} tokens are more than the model's context, n_ctx={config.n_ctx}; shorten them")
    if low < 0 or high >= config.n_vocab:
        bad = low if low < 0 else high
        raise InputError(
            f"token id {bad} is outside the vocabulary 0..{config.n_vocab - 1}; was the text encoded for this model?"
        )
