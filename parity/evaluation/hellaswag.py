"""HellaSwag: which of four endings continues a description (Zellers et al. 2019), on the validation set."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

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
    option_results,
    swap_contexts,
)
from parity.evaluation.scorer import Score
from parity.storage.download import RemoteFile
from parity.storage.json import get_entry

DATA = DataFile(
    RemoteFile("hellaswag_val.jsonl", 12_246_618, "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"),
    (
        "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
        "https://github.com/rowanz/hellaswag/raw/master/data/hellaswag_val.jsonl",
    ),
)


class _Record(NamedTuple):
    entry: dict[str, Any]
    endings: list[str]
    label: int
    origin: str

    def text(self, key: str) -> str:
        return get_entry(self.entry, key, str, self.origin)


def _records(task: Task) -> Iterator[_Record]:
    assert task.content is not None
    for entry, origin in task.content.json_lines():
        endings = get_entry(entry, "endings", list, origin)
        if len(endings) < 2 or not all(isinstance(ending, str) and ending.strip() for ending in endings):
            raise InputError(f"{origin}: endings must be a list of at least two texts, none of them empty")
        label = entry.get("label")
        if isinstance(label, str) and label.isdecimal():  # in Hugging Face's copy
            label = int(label)
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(endings):
            raise InputError(f"{origin}: label must be the index of the right ending, 0 to {len(endings) - 1}")
        yield _Record(entry, endings, label, origin)


def _questions(task: Task, question: Callable[[_Record], Question]) -> list[Question]:
    questions = [question(record) for record in _records(task)]
    return swap_contexts(questions) if task.control else questions


def _as_published(record: _Record) -> Question:
    return Question(record.text("ctx"), tuple(f" {end}" for end in record.endings), record.label, record.origin)


def cleaned(text: str) -> str:
    """Remove the marks that WikiHow's articles left in a text (lm_eval/tasks/hellaswag/utils.py)."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _cleaned(record: _Record) -> Question:
    context = f"{record.text('activity_label')}: {record.text('ctx_a')} {record.text('ctx_b').capitalize()}"
    return Question(cleaned(context), tuple(f" {cleaned(end)}" for end in record.endings), record.label, record.origin)


def _completion_items(task: Task) -> Iterator[Item]:
    for question in _questions(task, _as_published):
        requests = tuple(apart(task.tokenizer, question.context, option) for option in question.options)
        yield Item(requests, {"gold": question.gold}, question.origin)


def _lm_eval_items(task: Task) -> Iterator[Item]:
    for question in _questions(task, _cleaned):
        requests = tuple(joint(task.tokenizer, question.context, option) for option in question.options)
        endings = [option[1:] for option in question.options]
        facts = {
            "gold": question.gold,
            "n_characters": [len(ending) for ending in endings],
            "n_bytes": [len(ending.encode()) for ending in endings],
        }
        yield Item(requests, facts, question.origin)


def _core_items(task: Task) -> Iterator[Item]:
    for question in _questions(task, _cleaned):
        prompts = [question.context + option for option in question.options]
        yield core.choice(task, prompts, question.gold, question.origin)


def _judge_tokens(_task: Task, item: Item, scores: Sequence[Score]) -> dict[str, Any]:
    """Judge options by their log-probability, and by its mean per token."""
    return option_results(item, scores, per_token=[len(request.continuation) for request in item.requests])


def _judge_characters(_task: Task, item: Item, scores: Sequence[Score]) -> dict[str, Any]:
    return option_results(item, scores, per_character=item.facts["n_characters"], per_byte=item.facts["n_bytes"])


_SHARE = "share of the items"
_LLM_C = "karpathy/llm.c dev/data/hellaswag.py"
_NANOCHAT = "karpathy/nanochat dev/estimate_gpt3_core.ipynb"

PROTOCOLS = (
    Protocol(
        "hellaswag/completion",
        1,
        "The text as it is, context and ending encoded apart. accuracy: the ending with the largest log-probability; "
        "accuracy_per_token: with the largest mean per token. The rule of llm.c and build-nanogpt.",
        _completion_items,
        _judge_tokens,
        (Metric("accuracy_per_token", "correct_per_token", _SHARE), Metric("accuracy", "correct", _SHARE)),
        DATA,
        has_control=True,
        published={
            "124M": {"accuracy": Published(0.2859, _LLM_C), "accuracy_per_token": Published(0.2955, _LLM_C)},
            "355M": {"accuracy_per_token": Published(0.375224, "karpathy/llm.c dev/vislog.ipynb")},
            "774M": {"accuracy_per_token": Published(0.431986, "karpathy/llm.c dev/vislog.ipynb")},
            "1558M": {"accuracy": Published(0.3842, _LLM_C), "accuracy_per_token": Published(0.4893, _LLM_C)},
        },
    ),
    Protocol(
        "hellaswag/lm-eval",
        1,
        "The activity and the context, cleaned of WikiHow's marks, encoded together with the ending. accuracy: the "
        "ending with the largest log-probability; accuracy_per_character: with the largest one divided by its number "
        "of characters. The task hellaswag of lm-evaluation-harness (acc, acc_norm, acc_bytes).",
        _lm_eval_items,
        _judge_characters,
        (
            Metric("accuracy_per_character", "correct_per_character", _SHARE),
            Metric("accuracy", "correct", _SHARE),
            Metric("accuracy_per_byte", "correct_per_byte", _SHARE),
        ),
        DATA,
        crops=True,
        has_control=True,
        published={
            "124M": {
                "accuracy": Published(0.2892, "logs of lm-evaluation-harness"),
                "accuracy_per_character": Published(0.3114, "logs of lm-evaluation-harness"),
            },
            "1558M": {"accuracy": Published(0.4004, _LLM_C), "accuracy_per_character": Published(0.5089, _LLM_C)},
        },
    ),
    Protocol(
        "hellaswag/core",
        1,
        "The end-of-text token and the text of hellaswag/lm-eval, encoded together; what all endings' tokens have in "
        "common is context. Right if the ending has the largest mean log-probability per token. The task "
        "hellaswag_zeroshot of DCLM's CORE, as nanochat evaluates it.",
        _core_items,
        core.judge_choice,
        (Metric("accuracy_per_token", "correct", _SHARE),),
        DATA,
        has_control=True,
        published={
            size: {"accuracy_per_token": Published(value, _NANOCHAT)}
            for size, value in {"124M": 0.309, "355M": 0.390, "774M": 0.440, "1558M": 0.502}.items()
        },
    ),
)
