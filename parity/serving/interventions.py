"""What changes if a head is ablated, or an activation is patched from another prompt."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from parity.data.tokenizer import Tokenizer
from parity.errors import InputError, check_choice
from parity.serving.display import log_softmax, most_likely, rounded, show_token, token_entries
from parity.serving.inspect import Subject, check_ids, in_range

MOST_PATCHED = 64
"""Largest number of tokens of a text that is patched: each position is a run of its own."""
_TOKENS_AT_ONCE = 1024
PATCHABLE = ("resid_post", "attn.out", "mlp.out")
"""Activations of a layer that can be patched."""
Replacement = Literal["zero", "mean"]


def ablate(
    subject: Subject, text: str, layer: int, position: int | None = None, replacement: Replacement = "zero"
) -> dict[str, Any]:
    """Remove each head of a layer, and its MLP, one at a time.

    Args:
        subject: The model.
        text: The text.
        layer: Number of the layer.
        position: Number of the token after which the prediction is compared; by default the last one.
        replacement: What a removed output becomes: zero, or its mean over the positions of the text.

    Returns:
        The prediction `before`, and in `after` one entry per head, and one for the MLP: the prediction without it, with
        the log-probability of the token that was most likely before, and the divergence KL(before || after) in nats.
    """
    config, tokenizer = subject.config, subject.tokenizer
    check_choice("replacement", replacement, get_args(Replacement))
    ids = subject.encode(text, MOST_PATCHED)
    position = in_range(len(ids) - 1 if position is None else position, len(ids), "position")
    prefix = f"blocks.{in_range(layer, config.n_layer, 'layer')}"
    z, mlp = f"{prefix}.attn.z", f"{prefix}.mlp.out"
    logits, cache = subject.run(check_ids(ids, config), [z, mlp])

    def emptied(x: np.ndarray) -> np.ndarray:  # [1, T, ...], averaged over T, or 0
        return x.mean(1, keepdims=True) if replacement == "mean" else np.zeros_like(x[:, :1])

    without_head = np.repeat(cache[z], config.n_head, axis=0)  # [N rows, T, N, H]
    for head in range(config.n_head):
        without_head[head, :, head] = emptied(cache[z])[0, :, head]
    without_mlp = np.broadcast_to(emptied(cache[mlp]), cache[mlp].shape)
    after = [
        *_patched(subject, ids, z, without_head, position),
        *_patched(subject, ids, mlp, without_mlp, position),
    ]
    before = log_softmax(logits[0, position])
    labels = [*(f"head {head}" for head in range(config.n_head)), "MLP"]
    token = int(before.argmax())
    return {
        "tokens": token_entries(tokenizer, ids),
        "position": position,
        "token": {"id": token, "shown": show_token(tokenizer, token), "logprob": rounded(before[token])},
        "before": most_likely(before, tokenizer),
        "after": [
            {"label": label, **_prediction(log_softmax(z), before, token, tokenizer)}
            for label, z in zip(labels, after, strict=True)
        ],
    }


def patch(subject: Subject, clean: str, corrupted: str, layer: int, kind: str = "resid_post") -> dict[str, Any]:
    """Replace one activation of the corrupted prompt by that of the clean prompt, at one position at a time.

    The score is the difference of two logits after the last token: of the token that is most likely after the clean
    prompt, and of that after the corrupted prompt.

    Args:
        subject: The model.
        clean: The prompt whose activations are copied.
        corrupted: The prompt whose activations are replaced; it must have as many tokens.
        layer: Number of the layer.
        kind: One of PATCHABLE.

    Raises:
        InputError: For prompts of different lengths, and if both have the same most likely token.
    """
    config, tokenizer = subject.config, subject.tokenizer
    sources, targets = (subject.encode(text, MOST_PATCHED) for text in (clean, corrupted))
    if len(sources) != len(targets):
        raise InputError(
            f"the prompts have {len(sources) - 1} and {len(targets) - 1} tokens; patching goes position by position, "
            "so write prompts of the same number of tokens"
        )
    check_choice("kind", kind, PATCHABLE)
    name = f"blocks.{in_range(layer, config.n_layer, 'layer')}.{kind}"
    logits, cache = subject.run(np.array([sources, targets], np.int32), [name])
    ends = logits[:, -1]
    answer, other = (int(z.argmax()) for z in ends)
    if answer == other:
        raise InputError(
            f"after both prompts the most likely token is {show_token(tokenizer, answer)!r}; write prompts that "
            "continue differently"
        )
    T = len(targets)
    patched = np.repeat(cache[name][1:], T, axis=0)  # [T rows, T, D]
    patched[range(T), range(T)] = cache[name][0]
    before = log_softmax(ends[1])
    rows = _patched(subject, targets, name, patched, T - 1)
    return {
        "clean": token_entries(tokenizer, sources),
        "corrupted": token_entries(tokenizer, targets),
        "answer": {"id": answer, "shown": show_token(tokenizer, answer)},
        "other": {"id": other, "shown": show_token(tokenizer, other)},
        "clean_score": rounded(ends[0][answer] - ends[0][other]),
        "corrupted_score": rounded(ends[1][answer] - ends[1][other]),
        "before": most_likely(before, tokenizer),
        "after": [
            {"score": rounded(z[answer] - z[other]), **_prediction(log_softmax(z), before, answer, tokenizer)}
            for z in rows
        ],
    }


def _patched(subject: Subject, ids: Sequence[int], name: str, patches: np.ndarray, position: int) -> list[np.ndarray]:
    """Return the logits [V] at a position with each of the patches [rows, T, ...] of an activation."""
    tokens = np.array([ids], np.int32)
    rows = max(1, min(len(patches), _TOKENS_AT_ONCE // len(ids)))
    results: list[np.ndarray] = []
    for start in range(0, len(patches), rows):
        part = patches[start : start + rows]
        part = np.concatenate([part, np.repeat(part[:1], rows - len(part), axis=0)])  # one shape for JAX
        logits, _ = subject.run(np.repeat(tokens, rows, axis=0), (), {name: part})
        results += list(logits[:, position].copy())  # a view would keep the logits of all positions
    return results[: len(patches)]


def _prediction(after: np.ndarray, before: np.ndarray, token: int, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "logprob": rounded(after[token]),
        "kl": rounded(max(0.0, (np.exp(before) * (before - after)).sum())),
        "top": most_likely(after, tokenizer),
    }
