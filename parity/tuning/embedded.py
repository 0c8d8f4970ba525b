"""Examples that are made by rule, so that a small model can be tuned, and seen to have learned, without a download."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from parity.tuning.records import Record

EMBEDDED = "rules"
"""Name of the examples made by rule."""


def records_by_rule(examples: Iterable[Mapping[str, Any]]) -> list[Record]:
    """Return examples made by rule as records, like those of a file."""
    return [Record(fields, f"{EMBEDDED}, item {number}") for number, fields in enumerate(examples, 1)]


_WORDS = {
    "animal": "bear camel cow deer dog duck eagle fox goat hen horse lion mouse owl pig rabbit sheep snake tiger wolf",
    "fruit": "apple banana cherry fig grape kiwi lemon lime mango melon olive orange papaya peach pear plum",
    "color": "black blue brown crimson gray green pink purple red silver violet white yellow",
    "tool": "axe broom chisel drill file fork hammer knife ladder pliers rake ruler saw scissors shovel spade",
}
_QUESTIONS = {
    "kind": (
        "What kind of thing is it?",
        "Name its kind.",
        "Is it an animal, a fruit, a color or a tool?",
        "What is it?",
        "To which kind does it belong?",
    ),
    "first": ("What is the first letter?", "Name its first letter.", "Which letter comes first?"),
    "parity": ("Is it even or odd?", "Even or odd?"),
}


def instructions(seed: int = 0) -> list[dict[str, str]]:
    """Return different instructions with their responses, in Alpaca's form and in random order.

    They ask what kind of thing a word names, for its first letter, and whether a number is even or odd. A held-out one
    asks about a word or number that the others ask about in other words.
    """
    records = list(_records())
    return [records[index] for index in np.random.default_rng(seed).permutation(len(records))]


def preferences(seed: int = 0) -> list[dict[str, str]]:
    """Return preferences about the answers to instructions(): the right answer is preferred to a wrong one.

    The wrong answer is another kind of thing, another letter of the word, or the other of even and odd.
    """
    generator = np.random.default_rng(seed)
    pairs = []
    for record in instructions(seed):
        answer = record["output"]
        answers = next((group for group in (list(_WORDS), ["even", "odd"]) if answer in group), list(record["input"]))
        wrong = [other for other in dict.fromkeys(answers) if other != answer]
        rejected = wrong[generator.integers(len(wrong))]
        pairs.append({key: record[key] for key in ("instruction", "input")} | {"chosen": answer, "rejected": rejected})
    return pairs


def _records() -> Iterator[dict[str, str]]:
    for kind, words in _WORDS.items():
        for word in words.split():
            yield from _variants("kind", word, kind)
            yield from _variants("first", word, word[0])
    for number in range(10, 100):
        yield from _variants("parity", str(number), "odd" if number % 2 else "even")


def _variants(topic: str, given: str, answer: str) -> Iterator[dict[str, str]]:
    for question in _QUESTIONS[topic]:
        yield {"instruction": question, "input": given, "output": answer}


_LISTS = ("Here are {}, {} and {}.", "My list: {}, {}, {}", "{}, {} or {}?", "She named {}, {} and {}.")


def labeled_lists(seed: int = 0, count: int = 1200) -> list[dict[str, str]]:
    """Return texts that name three things of one kind, with the kind as their label, in random order.

    A held-out text names things that the others name in other company.
    """
    generator = np.random.default_rng(seed)
    kinds = {kind: words.split() for kind, words in _WORDS.items()}
    texts: dict[str, str] = {}
    while len(texts) < count:
        kind = str(generator.choice(list(kinds)))
        words = generator.choice(kinds[kind], 3, replace=False)
        texts[_LISTS[generator.integers(len(_LISTS))].format(*words)] = kind
    return [{"text": text, "label": kind} for text, kind in texts.items()]
