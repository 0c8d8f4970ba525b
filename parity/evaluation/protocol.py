"""What a protocol is: items from a file, each of them requests to score, and metrics of their scores."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from parity.data.tokenizer import Tokenizer
from parity.errors import InputError
from parity.evaluation.data import Content, DataFile
from parity.evaluation.estimates import Metric
from parity.evaluation.scorer import Request, Score, truncate


class Published(NamedTuple):
    """A number that somebody published for OpenAI's weights."""

    value: float
    source: str


class Task(NamedTuple):
    """What a protocol is applied to."""

    content: Content | None
    """The protocol's file, if it has one."""
    tokenizer: Tokenizer
    n_ctx: int
    """Length of the model's context."""
    control: bool = False
    """Whether to give each item the context of another one."""
    corpus: str | None = None
    """The corpus of the protocol `loss`."""
    split: str = "validation"
    """The part of the corpus: "validation" or "all"."""
    stop_words: frozenset[str] | None = None
    """The words that lambada-openai/stop-words passes over; by default its own list."""
    path: Path | None = None
    """--data, for protocols that read several files."""
    limit: int | None = None
    """Largest number of items (of each group, if the protocol has groups)."""


class Item(NamedTuple):
    """One item of a protocol."""

    requests: tuple[Request, ...]
    facts: dict[str, Any]
    """What the judge and the metrics need besides the scores; part of the item's record."""
    origin: str
    """The file and the line, for messages."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """A way to measure a model, with everything that changes the number."""

    name: str
    version: int
    """Increased whenever the protocol gives another number for the same model."""
    description: str
    items: Callable[[Task], Iterable[Item]]
    """Yields the items, in the order of the file."""
    judge: Callable[[Task, Item, Sequence[Score]], dict[str, Any]]
    """Returns the results of an item from the scores of its requests: part of its record."""
    metrics: tuple[Metric, ...]
    data: DataFile | None = None
    n_ctx: int | None = None
    """The number of positions that the model must have, if the protocol depends on it."""
    identify: Callable[[Task], tuple[str, str]] | None = None
    """Returns the name and the sha256 of what is evaluated, for protocols without `data`."""
    crops: bool = False
    """Whether a context that is too long loses its beginning; otherwise the item is refused."""
    has_control: bool = False
    group: str | None = None
    """The fact by which items are grouped; --limit then counts in each group."""
    top: int = 0
    """Number of most likely tokens that the judge needs at each scored position."""
    published: Mapping[str, Mapping[str, Published]] = dataclasses.field(default_factory=dict)
    """{size of OpenAI's model: {name of the metric: number}}."""


def common_prefix(sequences: Iterable[Sequence[Any]]) -> int:
    """Return how many elements all sequences begin with."""
    columns = zip(*sequences, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


class Question(NamedTuple):
    """An item with a context and one or more continuations."""

    context: str
    options: tuple[str, ...]
    gold: int
    """Index of the right option."""
    origin: str


def others(n: int) -> list[int]:
    """Return another item for each of n items, all different, for the control that exchanges contexts.

    A model that reads contexts then does about as well as one that sees the options alone.
    """
    if n < 2:
        raise InputError("--control needs at least two items, because it exchanges their contexts")
    order = np.random.default_rng(0).permutation(n)
    result = np.empty(n, int)
    result[order] = np.roll(order, 1)
    return result.tolist()


def swap_contexts(questions: Sequence[Question]) -> list[Question]:
    """Give each question the context of another one."""
    pairs = zip(questions, others(len(questions)), strict=True)
    return [question._replace(context=questions[other].context) for question, other in pairs]


def joint(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """Encode a context and its continuation as one text, as lm-evaluation-harness does.

    Spaces at the end of the context belong to the continuation. If tokens merge across the border, the continuation is
    what remains of the text's tokens after as many as the context alone has. An empty context is the end-of-text token.
    """
    first, whole = tokenizer.encode(context.rstrip()), tokenizer.encode(context + continuation)
    if not first:
        first, whole = [tokenizer.eos_id], [tokenizer.eos_id] * (whole[:1] != [tokenizer.eos_id]) + whole
    return Request(first, whole[len(first) :])


def apart(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """Encode a context and its continuation each by itself."""
    return Request(tokenizer.encode(context), tokenizer.encode(continuation))


def fitted(item: Item, n_ctx: int, crops: bool) -> tuple[Item, int]:
    """Cut the contexts of an item that are too long, from the left.

    Args:
        item: The item.
        n_ctx: Length of the model's context.
        crops: Whether contexts may be cut at all.

    Returns:
        The item, and the number of tokens that were cut from all its contexts.

    Raises:
        InputError: If a context would have to be cut but may not be, a continuation is empty or longer than n_ctx, or a
            context is empty.
    """
    requests, total = [], 0
    for request in item.requests:
        tokens, n_cut = truncate(request, n_ctx, item.origin)
        if n_cut and not crops:
            raise InputError(
                f"{item.origin}: the item has {len(request.context)} tokens of context and {len(request.continuation)} "
                f"to score, which do not fit into the model's context of {n_ctx}"
            )
        border = len(tokens) - len(request.continuation)
        requests.append(Request(tokens[:border], tokens[border:]) if n_cut else request)
        total += n_cut
    return item._replace(requests=tuple(requests)), total


def option_results(item: Item, scores: Sequence[Score], **lengths: Sequence[int]) -> dict[str, Any]:
    """Judge options by their log-probability, and by that per unit of each kind of length; the first wins a tie."""
    sums = np.array([score.logprob for score in scores])
    results: dict[str, Any] = {"logprob": sums.tolist(), "choice": int(sums.argmax())}
    results["correct"] = results["choice"] == item.facts["gold"]
    for name, length in lengths.items():
        choice = int((sums / np.array(length)).argmax())
        results[f"choice_{name}"], results[f"correct_{name}"] = choice, choice == item.facts["gold"]
    return results


def limited(items: Iterable[Item], limit: int | None, group: str | None = None) -> Iterator[Item]:
    """Yield the first items, of each group if the protocol has groups."""
    counts: dict[Any, int] = {}
    for item in items:
        key = item.facts.get(group) if group else None
        counts[key] = counts.get(key, 0) + 1
        if limit is None or counts[key] <= limit:
            yield item
        elif group is None:
            return
