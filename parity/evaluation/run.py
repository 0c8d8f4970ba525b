"""Apply a protocol to a model: items to scores to records, and records to results."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from parity.errors import InputError
from parity.evaluation.estimates import Estimate, Metric, difference, estimate
from parity.evaluation.protocol import Item, Protocol, Task, fitted, limited
from parity.evaluation.scorer import Request, Score, Scorer
from parity.evaluation.weights import OPENAI_WEIGHTS
from parity.parts import Part

Record = dict[str, Any]
"""The record of an item: its index, its facts, and what the judge says."""


def items_of(protocol: Protocol, task: Task) -> list[tuple[Item, int]]:
    """Return the items of a protocol, with contexts that fit, and the number of tokens that were cut from each.

    Raises:
        InputError: If the model's context is too short for the protocol or an item, or the file has no items.
    """
    if protocol.n_ctx is not None and task.n_ctx < protocol.n_ctx:
        raise InputError(
            f"{protocol.name} needs a model with a context of {protocol.n_ctx} tokens; this one has {task.n_ctx}"
        )
    items = limited(protocol.items(task), task.limit, protocol.group)
    result = [fitted(item, task.n_ctx, protocol.crops) for item in items]
    if not result:
        origin = task.content.origin if task.content else task.path or task.corpus
        raise InputError(f"{origin} has no items for {protocol.name}")
    return result


def records_of(
    protocol: Protocol,
    task: Task,
    items: Sequence[tuple[Item, int]],
    scorer: Scorer,
    done: Mapping[int, Record],
    add: Callable[[Record], None] = lambda record: None,
    progress: Callable[[int, int], None] | None = None,
    part: Part | None = None,
) -> list[Record]:
    """Score the items of a protocol, or a part of them.

    Args:
        protocol: The protocol.
        task: What `items_of` was given.
        items: What it returned.
        scorer: Scores the requests.
        done: Records by index that an earlier, interrupted call has added. The others are computed in the same batches
            as they would be without them, so the results are the same.
        add: Called with each new record as soon as it is complete.
        progress: See Scorer.score.
        part: The part; by default all items. The items of a part are in the same batches as without it, so the results
            are the same; see items_of_part().

    Returns:
        The records of these items, in the order of the items.
    """
    requests, owners = _requests(items)
    own = range(len(items)) if part is None else items_of_part(items, scorer, part)
    chosen = frozenset(own)
    starts = {index: request for request, index in reversed(list(enumerate(owners)))}
    records = {index: dict(record) for index, record in done.items() if index in chosen}
    waiting: dict[int, dict[int, Score]] = {}

    def complete(index: int, scores: Sequence[Score]) -> None:
        item, n_cut = items[index]
        cut = {"n_truncated": n_cut} if n_cut else {}
        records[index] = {"index": index, **item.facts, **protocol.judge(task, item, scores), **cut}
        add(records[index])

    for index in own:
        if not items[index][0].requests and index not in records:
            complete(index, ())
    skip = {request for request, index in enumerate(owners) if index in records or index not in chosen}
    for request, score in scorer.score(requests, progress, skip, protocol.top):
        index = owners[request]
        scores = waiting.setdefault(index, {})
        scores[request - starts[index]] = score
        if len(scores) == len(items[index][0].requests):
            complete(index, [score for _, score in sorted(waiting.pop(index).items())])
    return [records[index] for index in own]


def items_of_part(items: Sequence[tuple[Item, int]], scorer: Scorer, part: Part) -> Sequence[int]:
    """Return the indices of the items of a part, in ascending order.

    The batches follow those of Scorer.score(). An item belongs to the part that its first batch belongs to, and a part
    has batches that follow each other, so that few of them are computed by other parts as well. All parts have about as
    many tokens.
    """
    requests, owners = _requests(items)
    first = dict.fromkeys(range(len(items)), 0)  # {item: the number of its first batch}
    batches = scorer.batches(requests)
    for number, batch in reversed(list(enumerate(batches))):
        for group in batch.groups:
            first.update((owners[request], number) for request in group.indices)
    sizes = [0] * max(1, len(batches))  # tokens of the items whose first batch it is
    for request, owner in zip(requests, owners, strict=True):
        sizes[first[owner]] += len(request.context) + len(request.continuation)
    before = list(itertools.accumulate(sizes, initial=0))
    return [item for item, number in first.items() if before[number] * part.count // max(1, before[-1]) == part.index]


def _requests(items: Sequence[tuple[Item, int]]) -> tuple[list[Request], list[int]]:
    """Return the requests of all items, and the index of the item that each belongs to."""
    requests: list[Request] = []
    owners: list[int] = []
    for index, (item, _) in enumerate(items):
        requests += item.requests
        owners += [index] * len(item.requests)
    return requests, owners


def results_of(
    protocol: Protocol, models: Sequence[tuple[str, str]], records: Sequence[Sequence[Record]], is_comparable: bool
) -> dict[str, Any]:
    """Return the metrics of one model, or of two with their differences, as JSON.

    Args:
        protocol: The protocol.
        models: Name of each model, and the sha256 of its weights.
        records: The records of each model.
        is_comparable: Whether these are all items of the published file, so that published numbers of OpenAI's models
            are of the same measurement.
    """
    entries: list[dict[str, Any]] = []
    for (name, sha256), own in zip(models, records, strict=True):
        size = OPENAI_WEIGHTS.get(sha256)
        published = protocol.published.get(size or "", {}) if is_comparable else {}
        metrics = {metric.name: _entry(metric, estimate(metric, own)) for metric in protocol.metrics}
        for metric, number in published.items():
            entry = metrics[metric]
            entry["published"] = {"value": number.value, "source": number.source}
            if (error := entry["standard_error"]) and entry["value"] is not None:
                entry["published"]["difference_in_standard_errors"] = (entry["value"] - number.value) / error
        entries.append({"name": name, "weights_sha256": sha256, "openai_model": size, "metrics": metrics})
    if len(models) == 1:
        return {"models": entries}
    a, b = records
    return {"models": entries, "differences": {m.name: _entry(m, difference(m, a, b)) for m in protocol.metrics}}


def _entry(metric: Metric, value: Estimate) -> dict[str, Any]:
    entry = {"value": _finite(value.value), "unit": metric.unit, "standard_error": _finite(value.standard_error)}
    return {**entry, "groups": value.groups} if value.groups else entry


def _finite(number: float | None) -> float | None:
    """Return None for the perplexity of a model that is too bad for one; JSON has no infinity."""
    return number if number is not None and math.isfinite(number) else None
