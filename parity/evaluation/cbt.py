"""The Children's Book Test (Hill et al. 2016): which of ten words was taken out of a sentence."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from parity.errors import InputError
from parity.evaluation import detokenizers
from parity.evaluation.data import DataFile
from parity.evaluation.estimates import Metric
from parity.evaluation.protocol import Item, Protocol, Published, Task, common_prefix, joint, option_results, others
from parity.evaluation.scorer import Score
from parity.storage.download import RemoteFile

_ARCHIVE = RemoteFile("CBTest.tgz", 120_547_669, "932df0cadc1337b2a12b4c696b1041c1d1c6d4b6bd319874c6288f02e4a61e92")
_ADDRESSES = ("http://www.thespermwhale.com/jaseweston/babi/CBTest.tgz",)
_GAP = "XXXXX"


def _stories(task: Task) -> Iterator[tuple[list[str], str, list[str], int, str]]:
    """Yield the sentences, the question, the options, the index of the answer, and the origin of each item."""
    assert task.content is not None
    sentences: list[str] = []
    for number, line in enumerate(task.content.text().splitlines(), 1):
        origin = f"{task.content.origin}, line {number}"
        if not line.strip():
            continue
        match = re.match(r"(\d{1,2}) (.*)", line)
        if match is None:
            raise InputError(f"{origin}: a line must begin with its number, 1 to 21, and a space")
        if match[1] != "21":
            sentences.append(match[2].strip())
            continue
        parts = match[2].split("\t")
        options = parts[-1].strip().split("|")
        if len(parts) < 3 or parts[0].count(_GAP) != 1 or parts[1] not in options:
            raise InputError(
                f"{origin}: line 21 must hold a question with {_GAP}, the answer, and the options between |, one of "
                "them the answer, separated by tabs"
            )
        yield sentences, parts[0].strip(), options, options.index(parts[1]), origin
        sentences = []
    if sentences:
        raise InputError(f"{task.content.origin} ends within an item: the question, line 21, is missing")


def _items(task: Task) -> Iterator[Item]:
    stories = list(_stories(task))
    passages = [" ".join(sentences) for sentences, *_ in stories]
    if task.control:
        passages = [passages[other] for other in others(len(stories))]
    for passage, (_, question, options, gold, origin) in zip(passages, stories, strict=True):
        before, after = question.split(_GAP)
        start = detokenizers.cbt(f"{passage} {before}").rstrip()
        whole = [detokenizers.cbt(f"{passage} {before}{option}{after}") for option in options]
        context = start[: common_prefix([start, *whole])]
        requests = tuple(joint(task.tokenizer, context, text[len(context) :]) for text in whole)
        yield Item(requests, {"gold": gold, "options": options}, origin)


def _judge(_task: Task, item: Item, scores: Sequence[Score]) -> dict[str, Any]:
    return option_results(item, scores)


def _protocol(name: str, file: str, kind: str, paper: dict[str, float]) -> Protocol:
    return Protocol(
        name,
        1,
        f"Ten options for a {kind} that was taken out of a sentence, after a passage of twenty sentences: the option "
        "for which it and the rest of the sentence have the largest log-probability, given all before it. Validation "
        "set, restored by rules of lm-evaluation-harness. The paper's rule, as far as it is known.",
        _items,
        _judge,
        (Metric("accuracy", "correct", "share of the items"),),
        DataFile(_ARCHIVE, _ADDRESSES, f"CBTest/data/{file}"),
        crops=True,
        has_control=True,
        published={size: {"accuracy": Published(value, _PAPER)} for size, value in paper.items()},
    )


_PAPER = "Radford et al. 2019, table 3; its protocol was never published"

PROTOCOLS = (
    _protocol(
        "cbt-cn",
        "cbtest_CN_valid_2000ex.txt",
        "common noun",
        {"124M": 0.8765, "355M": 0.9235, "774M": 0.9345, "1558M": 0.9330},
    ),
    _protocol(
        "cbt-ne",
        "cbtest_NE_valid_2000ex.txt",
        "named entity",
        {"124M": 0.834, "355M": 0.871, "774M": 0.880, "1558M": 0.8905},
    ),
)
