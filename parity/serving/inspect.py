"""What the page computes with one model: distributions at each token, attention, logit lens, attribution.

Every function takes the Subject first, and returns what JSON can hold.
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from parity import taps
from parity.config import GPTConfig
from parity.data.tokenizer import Tokenizer
from parity.errors import InputError
from parity.generation import bucket
from parity.interpret import direct_logit_attribution, logit_lens, residual_names
from parity.reference import Weights
from parity.sampling import uniforms
from parity.serving.display import judged, log_softmax, packed, rounded, show_token, token_entries
from parity.serving.respond import LONGEST_TOKEN

MOST_INSPECTED = 128
"""Largest number of tokens of a text whose attention patterns, lens or attribution is shown."""
_CHUNK = 16  # positions whose lens is computed at once: 13 layers times 50,257 logits in float64 are 84 MB
Cache = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to look into. What is computed from its activations is NumPy, on the thread of the caller."""

    config: GPTConfig
    tokenizer: Tokenizer
    run_model: Callable[[np.ndarray, list[str], Mapping[str, np.ndarray]], tuple[np.ndarray, Cache]]
    """(tokens int [B, T], names of activations, patches) -> (logits [B, T, V], activations): `run_model` of a backend's
    adapter, without its first argument."""
    export_weights: Callable[[], Weights]
    """Returns the weights in the huggingface format."""

    @classmethod
    def of(cls, backend: Any, model: Any, tokenizer: Tokenizer) -> "Subject":
        """Return the subject for a GPTModel of a backend, whose package is gpt_torch or gpt_jax."""
        adapter = importlib.import_module(f"{backend.__name__}.adapter")
        return cls(
            model.config,
            tokenizer,
            lambda *arguments: adapter.run_model(model, *arguments),
            lambda: backend.export_weights(model),
        )

    def run(
        self, tokens: np.ndarray, names: Iterable[str] = (), patches: Mapping[str, np.ndarray] | None = None
    ) -> tuple[np.ndarray, Cache]:
        """Run the model.

        The tokens are padded on the right to one of few lengths, so that JAX compiles little; attention is causal, so
        the padding changes nothing.

        Args:
            tokens: Ids, int [B, T], which must fit into the context.
            names: Activations to record; see parity.taps.
            patches: Replacements of activations, [B, T, ...].

        Returns:
            (logits [B, T, V], {name: activation}), at least float32.
        """
        T = tokens.shape[1]
        missing = min(bucket(T), self.config.n_ctx) - T
        padded = np.pad(tokens.astype(np.int32), ((0, 0), (0, missing)))
        wide = {
            name: np.pad(patch, [(0, 0), (0, missing), *[(0, 0)] * (patch.ndim - 2)])
            for name, patch in (patches or {}).items()
        }
        logits, cache = self.run_model(padded, list(names), wide)
        return logits[:, :T], {name: _cut(name, x, T) for name, x in cache.items()}

    def encode(self, text: str, most: int | None = None) -> list[int]:
        """Return the ids of a text after an end-of-text token, which gives the first token of the text a context.

        Raises:
            InputError: If there are more than `most` tokens, by default those of the context.
        """
        limit = min(self.config.n_ctx, most or self.config.n_ctx)
        longest = LONGEST_TOKEN * limit  # a longer text need not be encoded
        ids = [self.tokenizer.eos_id, *self.tokenizer.encode(text[: longest + 1])]
        if len(ids) > limit:
            raise InputError(
                f"the text has {'more than ' * (len(text) > longest)}{len(ids)} tokens with the end-of-text token "
                f"before it, and at most {limit} fit here; shorten it"
            )
        return ids


def _cut(name: str, x: np.ndarray, length: int) -> np.ndarray:
    letters = taps.axes(name).split()
    return x[tuple(slice(length) if letter in "TS" else slice(None) for letter in letters)]


def check_ids(ids: Sequence[int], config: GPTConfig) -> np.ndarray:
    """Return ids as int32 [1, T]; raise InputError for those that are no text of the model."""
    if not ids:
        raise InputError("there are no tokens")
    config.check_tokens((1, len(ids)), min(ids), max(ids))
    return np.array([ids], np.int32)


def token_logits(subject: Subject, ids: Sequence[int]) -> np.ndarray:
    """Return the logits [T, V] after each token of a text."""
    return subject.run(check_ids(ids, subject.config))[0][0]


def judge_tokens(logits: np.ndarray, ids: Sequence[int], first: int, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Describe each token from number `first` (at least 1) on, under the logits [T, V] after the token before it."""
    return [judged(logits[number - 1], ids[number], tokenizer) for number in range(first, len(ids))]


def next_logits(subject: Subject, ids: Sequence[int], seed: int = 0) -> dict[str, Any]:
    """Return the logits [V] after a text, and the random number with which row 0 of a seed chooses the next token."""
    if not 0 <= seed < 2**64:
        raise InputError(f"seed must be in 0..2**64-1, got {seed}")
    uniform = float(uniforms([seed], [0], [len(ids)], 1)[0, 0])
    return {"logits": packed(token_logits(subject, ids)[-1], "float32"), "uniform": uniform}


def text_loss(subject: Subject, text: str) -> dict[str, Any]:
    """Return the loss of each token of a text, and of the text."""
    ids = subject.encode(text)
    if len(ids) < 2:
        raise InputError("the text is empty; type or paste one")
    judgements = judge_tokens(token_logits(subject, ids), ids, 1, subject.tokenizer)
    total = -sum(token["logprob"] for token in judgements)
    entries = token_entries(subject.tokenizer, ids)
    return {
        "ids": ids,
        "tokens": [entry | judgement for entry, judgement in zip(entries[1:], judgements, strict=True)],
        "nats": rounded(total),
        "nats_per_token": rounded(total / len(judgements)),
        "bits_per_byte": rounded(total / np.log(2) / len(text.encode("utf-8", "surrogatepass"))),
    }


def attention(subject: Subject, text: str, layer: int) -> dict[str, Any]:
    """Return the patterns [N, T, T] of a layer on a text, in units of 1/65535."""
    config, tokenizer = subject.config, subject.tokenizer
    ids = subject.encode(text, MOST_INSPECTED)
    name = f"blocks.{in_range(layer, config.n_layer, 'layer')}.attn.pattern"
    _, cache = subject.run(check_ids(ids, config), [name])
    return {
        "tokens": token_entries(tokenizer, ids),
        "layer": layer,
        "pattern": packed(np.rint(cache[name][0] * 65535), "uint16"),
    }


def lens(subject: Subject, text: str) -> dict[str, Any]:
    """Return, for each state of the residual stream and each position, the most likely next token.

    Also the log-probability and rank of the token that does follow, where there is one.
    """
    config, tokenizer = subject.config, subject.tokenizer
    ids = subject.encode(text, MOST_INSPECTED)
    names = residual_names(config)
    _, cache = subject.run(check_ids(ids, config), names)
    exported = subject.export_weights()
    used = ("wte.weight", "lm_head.weight", "ln_f.weight", "ln_f.bias")
    weights = {name: np.asarray(exported[name], np.float64) for name in used if name in exported}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for start in range(0, len(ids), _CHUNK):
        part = {name: x[:, start : start + _CHUNK] for name, x in cache.items()}
        for name, logits in logit_lens(config, weights, part).items():
            for number, z in enumerate(logits[0], start):
                rows[name].append(_lens_cell(z, ids[number + 1 : number + 2], tokenizer))
    return {
        "tokens": token_entries(tokenizer, ids),
        "layers": [{"name": name, "cells": cells} for name, cells in rows.items()],
    }


def _lens_cell(logits: np.ndarray, following: Sequence[int], tokenizer: Tokenizer) -> dict[str, Any]:
    logprobs = log_softmax(logits)
    best = int(logits.argmax())
    cell = {"id": best, "shown": show_token(tokenizer, best), "prob": rounded(np.exp(logprobs[best]))}
    for id in following:
        cell |= {"next_prob": rounded(np.exp(logprobs[id])), "next_rank": int((logits > logits[id]).sum()) + 1}
    return cell


def attribution(
    subject: Subject, text: str, position: int | None = None, token: int | None = None, minus: int | None = None
) -> dict[str, Any]:
    """Split the logit of the token after a position into what each component wrote; see direct_logit_attribution.

    Args:
        subject: The model.
        text: The text.
        position: Number of the token after which the next one is predicted; by default the last one.
        token: Id of the token whose logit is split; by default the most likely one.
        minus: If given, the difference to the logit of this token is split.
    """
    config, tokenizer = subject.config, subject.tokenizer
    ids = subject.encode(text, MOST_INSPECTED)
    position = in_range(len(ids) - 1 if position is None else position, len(ids), "position")
    names = ["embed", "blocks.*.attn.out", "blocks.*.mlp.out"]
    logits, cache = subject.run(check_ids(ids, config), names)
    logits, cache = logits[0, position], {name: x[:, position : position + 1] for name, x in cache.items()}
    token = int(logits.argmax()) if token is None else token
    parts = direct_logit_attribution(config, subject.export_weights(), cache, token, minus)
    return {
        "tokens": token_entries(tokenizer, ids),
        "position": position,
        "token": {"id": token, "shown": show_token(tokenizer, token)},
        "minus": None if minus is None else {"id": minus, "shown": show_token(tokenizer, minus)},
        "parts": [{"name": name, "value": rounded(value[0, 0])} for name, value in parts.items()],
        "total": rounded(sum(float(value[0, 0]) for value in parts.values())),
        "logit": rounded(logits[token] - (0 if minus is None else logits[minus])),
        "top": judged(logits, token, tokenizer)["top"],
    }


def in_range(value: int, count: int, name: str) -> int:
    """Return the value; raise InputError unless it is in 0..count - 1."""
    if not 0 <= value < count:
        raise InputError(f"{name} must be in 0..{count - 1}, got {value}")
    return value
