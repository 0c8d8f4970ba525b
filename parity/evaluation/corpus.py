"""The protocol `loss`: any corpus that a run can be trained on, in nats per token and bits per byte."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from parity.data.corpora import Corpus, load_corpus
from parity.data.tokenizer import Tokenizer
from parity.errors import InputError
from parity.evaluation.estimates import Metric
from parity.evaluation.protocol import Item, Protocol, Task
from parity.evaluation.scorer import Score, windows

_MOST_TOKENS = 2**24  # of a text that is divided into windows at once


@functools.lru_cache(maxsize=1)
def _load(name: str | None, tokenizer: Tokenizer) -> Corpus:
    if name is None:
        raise InputError("the protocol loss needs --corpus: a file, a folder or the name of a corpus")
    return load_corpus(name, tokenizer)


def _identify(task: Task) -> tuple[str, str]:
    corpus = _load(task.corpus, task.tokenizer)  # type: ignore[arg-type] # all tokenizers are hashable
    return f"{corpus.name}, {task.split}", corpus.sha256


def _items(task: Task) -> Iterator[Item]:
    corpus = _load(task.corpus, task.tokenizer)  # type: ignore[arg-type]
    eos_id = task.tokenizer.eos_id
    # The end-of-text token, which is no text, has no bytes.
    sizes = np.array([len(task.tokenizer.token_bytes(id)) * (id != eos_id) for id in range(task.tokenizer.n_vocab)])
    shards = corpus.validation if task.split == "validation" else [*corpus.train, *corpus.validation]
    for shard in shards:
        for start in range(0, len(shard), _MOST_TOKENS):
            part = np.concatenate([[eos_id], shard[start : start + _MOST_TOKENS]])
            for request in windows(part, task.n_ctx + 1, is_last_full=True) if len(part) > 1 else ():
                ids = np.asarray(request.continuation)
                yield Item((request,), {"tokens": len(ids), "bytes": int(sizes[ids].sum())}, corpus.name)


def _judge(task: Task, item: Item, scores: Sequence[Score]) -> dict[str, Any]:
    [score], [request] = scores, item.requests
    is_text = np.asarray(request.continuation) != task.tokenizer.eos_id
    text = float(score.token_logprobs[is_text].sum(dtype=np.float64))
    return {"logprob": score.logprob, "text_logprob": text}


PROTOCOLS = (
    Protocol(
        "loss",
        1,
        "The validation part of --corpus, or all of it with --split all, after the end-of-text token; windows of the "
        "model's context that overlap by one token. loss and perplexity count the end-of-text tokens between "
        "documents; bits_per_byte does not. Ours.",
        _items,
        _judge,
        (
            Metric("loss", "logprob", "nats per token", "tokens", "nats"),
            Metric("perplexity", "logprob", "per token", "tokens", "perplexity"),
            Metric("bits_per_byte", "text_logprob", "bits per byte", "bytes", "bits"),
        ),
        identify=_identify,
    ),
)
