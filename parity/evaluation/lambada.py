"""LAMBADA: the last word of a passage (Paperno et al. 2016), in the text that OpenAI prepared for GPT-2."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from parity.data.tokenizer import Tokenizer
from parity.errors import InputError
from parity.evaluation import core
from parity.evaluation.data import DataFile
from parity.evaluation.estimates import Metric
from parity.evaluation.protocol import (
    Item,
    Protocol,
    Published,
    Question,
    Task,
    apart,
    joint,
    swap_contexts,
)
from parity.evaluation.scorer import Request, Score
from parity.storage.download import RemoteFile
from parity.storage.json import get_entry

DATA = DataFile(
    RemoteFile("lambada_test.jsonl", 1_819_752, "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226"),
    ("https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",),
)

# English function words in the form in which they stand alone. OpenAI's list was never published; this one is ours.
_STOP_WORDS = """
a about above across after again against all along already also although always am among an and another any anything
are around as at away back be because been before behind being below beneath beside between beyond both but by can
cannot could did do does doing done down during each either enough even ever every everything few for from further had
has have having he her here hers herself him himself his how however i if in into is it its itself just less many may
me might mine more most much must my myself near neither never no none nor not nothing now of off often on once one
only onto or other our ours ourselves out over own perhaps quite rather same shall she should since so some something
soon still such than that the their theirs them themselves then there these they this those though through thus to
together too toward towards under until up upon us very was we well were what when where whether which while who whom
whose why will with within without would yet you your yours yourself yourselves s t d ll m re ve don didn doesn isn
wasn weren couldn wouldn
"""
_N_CANDIDATES = 128


def _questions(task: Task) -> list[Question]:
    assert task.content is not None
    questions = []
    for entry, origin in task.content.json_lines():
        text = get_entry(entry, "text", str, origin)
        context, space, word = text.rpartition(" ")
        if not space or not word:
            raise InputError(f"{origin}: the text must have a last word after a space, which is what is predicted")
        questions.append(Question(context, (f" {word}",), 0, origin))
    return swap_contexts(questions) if task.control else questions


_Encode = Callable[[Task, Question], Request]


def _items(encode: _Encode) -> Callable[[Task], Iterator[Item]]:
    def items(task: Task) -> Iterator[Item]:
        for question in _questions(task):
            yield Item((encode(task, question),), {"target": question.options[0]}, question.origin)

    return items


def _last_word(task: Task, question: Question) -> Request:
    return joint(task.tokenizer, question.context, question.options[0])


def _last_token(task: Task, question: Question) -> Request:
    ids = task.tokenizer.encode(question.context + question.options[0])
    return Request(ids[:-1], ids[-1:])


def _strict(task: Task, question: Question) -> Request:
    """Megatron-LM's rule, where the words are separated by any white space."""
    text = question.context + question.options[0]
    word = text.split()[-1]
    return apart(task.tokenizer, text[: text.rindex(word)].strip(), f" {word}")


def _core(task: Task, question: Question) -> Request:
    item = core.language(task, question.context.strip() + " ", question.options[0][1:], question.origin)
    return item.requests[0]


@functools.cache
def _stop_word_ids(tokenizer: Tokenizer, words: frozenset[str]) -> frozenset[int]:
    """Return the tokens that are a stop word, with or without a space before it, in upper or lower case."""
    texts = (tokenizer.token_bytes(id).decode("utf-8", "replace") for id in range(tokenizer.n_vocab))
    return frozenset(id for id, text in enumerate(texts) if text.strip().lower() in words)


def _judge(_task: Task, _item: Item, scores: Sequence[Score]) -> dict[str, Any]:
    return {"logprob": scores[0].logprob, "correct": scores[0].is_greedy, "margin": scores[0].margin}


def _judge_stop_words(task: Task, item: Item, scores: Sequence[Score]) -> dict[str, Any]:
    """Right if the first token is the most likely one that is no stop word, and the others are the most likely."""
    words = task.stop_words if task.stop_words is not None else frozenset(_STOP_WORDS.split())
    passed_over = _stop_word_ids(task.tokenizer, words)  # type: ignore[arg-type] # all tokenizers are hashable
    top, target = scores[0].top_ids, list(item.requests[0].continuation)
    first = next((id for id in top[0].tolist() if id not in passed_over), None)
    rest = top[1:, 0].tolist() == target[1:]
    return {"logprob": scores[0].logprob, "correct": first == target[0] and rest, "first_token": first}


_ACCURACY = Metric("accuracy", "correct", "share of the items")
_METRICS = (
    _ACCURACY,
    Metric("perplexity", "logprob", "per word", transform="perplexity"),
)
_PAPER = "Radford et al. 2019, table 3; with a stop-word filter of unknown words"
_GPT_NEO = "EleutherAI/gpt-neo README"
_NANOCHAT = "karpathy/nanochat dev/estimate_gpt3_core.ipynb"


def _protocol(name: str, description: str, encode: _Encode, **more: Any) -> Protocol:
    return Protocol(name, 1, description, _items(encode), _judge, _METRICS, DATA, has_control=True, **more)


PROTOCOLS = (
    _protocol(
        "lambada-openai/last-word",
        "The last word after a single space, encoded together with the passage; right if each of its tokens is the "
        "most likely one. The task lambada_openai of lm-evaluation-harness.",
        _last_word,
        crops=True,
        published={
            "124M": {
                "accuracy": Published(0.3256, "EleutherAI/lm-evaluation-harness#2159"),
                "perplexity": Published(40.0554, "EleutherAI/lm-evaluation-harness#2159"),
            },
            "1558M": {"accuracy": Published(0.5121, _GPT_NEO), "perplexity": Published(10.63, _GPT_NEO)},
        },
    ),
    _protocol(
        "lambada-openai/last-token",
        "Only the very last token of the passage, given all before it. Easier, because it may be the end of a word. "
        "The default of Megatron-LM.",
        _last_token,
        published={"124M": {"accuracy": Published(0.4667, "huggingface/transformers#13761")}},
    ),
    _protocol(
        "lambada-openai/last-word-strict",
        "The last word, encoded apart from the passage, which loses the white space at its ends. "
        "Megatron-LM with --strict-lambada.",
        _strict,
    ),
    Protocol(
        "lambada-openai/stop-words",
        1,
        "As last-word, but the first token is the most likely one that is no stop word. The paper used such a filter "
        "and never published its words; these are ours, or those of --stop-words.",
        _items(_last_word),
        _judge_stop_words,
        (_ACCURACY,),
        DATA,
        crops=True,
        has_control=True,
        top=_N_CANDIDATES,
        published={
            size: {"accuracy": Published(value, _PAPER)}
            for size, value in {"124M": 0.4599, "355M": 0.5548, "774M": 0.6012, "1558M": 0.6324}.items()
        },
    ),
    _protocol(
        "lambada-core",
        "The end-of-text token, the passage without white space at its ends, and the last word, encoded together. "
        "The task lambada_openai of DCLM's CORE, as nanochat evaluates it.",
        _core,
        published={
            size: {"accuracy": Published(value, _NANOCHAT)}
            for size, value in {"124M": 0.3229, "355M": 0.4260, "774M": 0.4880, "1558M": 0.5230}.items()
        },
    ),
)
