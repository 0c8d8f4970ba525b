"""CORE of DCLM (Li et al. 2024): the centred accuracy of 22 tasks, from the bundle of files that nanochat evaluates.

Prompts, few-shot examples and cropping are those of nanochat's core_eval.py and base_eval.py. The real bundle has not
been tried: the tests use an invented one.
"""

import csv
import hashlib
import io
import math
import random
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from parity.errors import InputError
from parity.evaluation.data import Content
from parity.evaluation.estimates import Metric
from parity.evaluation.protocol import Item, Protocol, Published, Task, common_prefix
from parity.evaluation.scorer import Request, Score
from parity.storage.json import get_entry

_BUNDLE = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"


class _Suite(NamedTuple):
    """One of the tasks."""

    label: str
    kind: str
    uri: str
    n_shots: int
    delimiter: str
    baseline: float
    """Accuracy of guessing, 0 to 1."""


class Bundle:
    """The files of the bundle, in a folder or a .zip file."""

    def __init__(self, path: Path | None):
        if path is None:
            raise InputError(f"the protocol core needs --data: the folder or the .zip file of {_BUNDLE}")
        self.path = path
        self._zip: zipfile.ZipFile | None = None
        if path.is_file():
            try:
                self._zip = zipfile.ZipFile(path)
            except zipfile.BadZipFile as error:
                raise InputError(f"--data {path} is truncated, or no .zip file ({error})") from None
        elif not path.is_dir():
            raise InputError(f"--data {path} is neither a file nor a folder")

    def read(self, name: str) -> Content:
        """Read a file of the bundle."""
        origin = f"{self.path}, {name}"
        try:
            data = (self.path / name).read_bytes() if self._zip is None else self._zip.read(f"eval_bundle/{name}")
        except (KeyError, FileNotFoundError):
            raise InputError(f"--data {self.path} has no {name}; it must be the bundle of {_BUNDLE}") from None
        except zipfile.BadZipFile as error:
            raise InputError(f"{origin} is damaged ({error})") from None
        return Content(data, origin, hashlib.sha256(data).hexdigest(), False)


def _identify(task: Task) -> tuple[str, str]:
    """Return the path, and a hash of the files that the protocol reads."""
    bundle, whole = Bundle(task.path), hashlib.sha256()
    for name in ("core.yaml", "eval_meta_data.csv", *(f"eval_data/{suite.uri}" for suite in _suites(bundle))):
        whole.update(bundle.read(name).sha256.encode())
    return str(task.path), whole.hexdigest()


def _suites(bundle: Bundle) -> list[_Suite]:
    import yaml  # here, because only this protocol needs it

    settings, table = bundle.read("core.yaml"), bundle.read("eval_meta_data.csv")
    try:
        entries = yaml.safe_load(settings.text())["icl_tasks"]
        baselines = {
            row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(io.StringIO(table.text()))
        }
        return [
            _Suite(
                str(entry["label"]),
                str(entry["icl_task_type"]),
                str(entry["dataset_uri"]),
                int(entry["num_fewshot"][0]),
                str(entry.get("continuation_delimiter", " ")),
                baselines[entry["label"]],
            )
            for entry in entries
        ]
    except (yaml.YAMLError, KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(
            f"{settings.origin} and {table.origin} do not describe tasks as those of DCLM do ({error!r})"
        ) from None


_Entry = tuple[dict[str, Any], str]
"""A line of a task's file, and where it is."""


def _text(entry: _Entry, key: str) -> str:
    return get_entry(entry[0], key, str, entry[1])


def _texts(entry: _Entry, key: str) -> list[str]:
    texts = get_entry(entry[0], key, list, entry[1])
    if len(texts) < 2 or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{entry[1]}: {key} must be a list of at least two texts")
    return texts


def _gold(entry: _Entry, options: Sequence[str]) -> int:
    gold = get_entry(entry[0], "gold", int, entry[1])
    if not 0 <= gold < len(options):
        raise InputError(f"{entry[1]}: gold must be the index of the right option, 0 to {len(options) - 1}")
    return gold


def after_prefix(task: Task, ids: Sequence[int], n_prefix: int, origin: str) -> Request:
    """Split the tokens of a prompt after a prefix, with the end-of-text token before them.

    Prompts are cropped to their last n_ctx tokens, the last one included, although the model never reads it.
    """
    tokens = [task.tokenizer.eos_id, *ids]
    cut = max(0, len(tokens) - task.n_ctx)
    if cut > n_prefix:
        raise InputError(f"{origin}: the scored part is longer than the model's context of {task.n_ctx} tokens")
    return Request(tokens[cut : n_prefix + 1], tokens[n_prefix + 1 :])


def choice(task: Task, prompts: Sequence[str], gold: int, origin: str) -> Item:
    """The prompts of the options differ after a common beginning, which is the context.

    An option that has no tokens of its own, because it is the beginning of all others, is not scored; see judge_choice.
    """
    encoded = [task.tokenizer.encode(prompt) for prompt in prompts]
    n_prefix = common_prefix(encoded)
    requests = tuple(after_prefix(task, ids, n_prefix, origin) for ids in encoded if len(ids) > n_prefix)
    unscored = [number for number, ids in enumerate(encoded) if len(ids) == n_prefix]
    return Item(requests, {"gold": gold, **({"unscored": unscored} if unscored else {})}, origin)


def language(task: Task, context: str, continuation: str, origin: str) -> Item:
    """The context is stripped and encoded by itself; its tokens have to begin those of the whole text."""
    prefix, whole = task.tokenizer.encode(context.strip()), task.tokenizer.encode(context + continuation)
    if whole[: len(prefix)] != prefix:
        raise InputError(f"{origin}: the tokens of the context do not begin those of the whole text")
    return Item((after_prefix(task, whole, len(prefix), origin),), {}, origin)


def judge_choice(_task: Task, item: Item, scores: Sequence[Score]) -> dict[str, Any]:
    """The option with the largest mean log-probability per token is chosen, the first of equal ones.

    nanochat computes the mean of no numbers for an option that is not scored, which is not a number: such an option is
    chosen if it is the first, and never otherwise.
    """
    unscored = item.facts.get("unscored", [])
    means = [score.logprob / len(score.token_logprobs) for score in scores]
    for number in unscored:
        means.insert(number, math.inf if number == 0 else -math.inf)
    chosen = means.index(max(means))
    return {"logprob": [score.logprob for score in scores], "choice": chosen, "correct": chosen == item.facts["gold"]}


def _multiple_choice(task: Task, suite: _Suite, entry: _Entry, shots: Sequence[_Entry]) -> Item:
    examples = "".join(
        f"{_text(shot, 'query')}{suite.delimiter}{_texts(shot, 'choices')[_gold(shot, _texts(shot, 'choices'))]}\n\n"
        for shot in shots
    )
    options = _texts(entry, "choices")
    prompts = [f"{examples}{_text(entry, 'query')}{suite.delimiter}{option}" for option in options]
    return choice(task, prompts, _gold(entry, options), entry[1])


def _schema(task: Task, suite: _Suite, entry: _Entry, shots: Sequence[_Entry]) -> Item:
    """The contexts differ, and their common end is the continuation."""
    examples = "".join(
        f"{_texts(shot, 'context_options')[_gold(shot, _texts(shot, 'context_options'))]}{suite.delimiter}"
        f"{_text(shot, 'continuation')}\n\n"
        for shot in shots
    )
    options = _texts(entry, "context_options")
    prompts = [f"{examples}{option}{suite.delimiter}{_text(entry, 'continuation')}" for option in options]
    encoded = [task.tokenizer.encode(prompt) for prompt in prompts]
    n_suffix = common_prefix([[task.tokenizer.eos_id, *ids][::-1] for ids in encoded])
    requests = tuple(after_prefix(task, ids, len(ids) - n_suffix, entry[1]) for ids in encoded)
    return Item(requests, {"gold": _gold(entry, options)}, entry[1])


def _language_modeling(task: Task, suite: _Suite, entry: _Entry, shots: Sequence[_Entry]) -> Item:
    examples = "".join(
        f"{_text(shot, 'context').strip()}{suite.delimiter}{_text(shot, 'continuation')}\n\n" for shot in shots
    )
    context = f"{examples}{_text(entry, 'context').strip()}{suite.delimiter}"
    return language(task, context, _text(entry, "continuation"), entry[1])


_KINDS: dict[str, Callable[[Task, _Suite, _Entry, Sequence[_Entry]], Item]] = {
    "multiple_choice": _multiple_choice,
    "schema": _schema,
    "language_modeling": _language_modeling,
}


def shots(n_items: int, index: int, n_shots: int) -> list[int]:
    """Return the items that are shown before an item as examples."""
    return random.Random(1234 + index).sample([other for other in range(n_items) if other != index], n_shots)


def _items(task: Task) -> Iterator[Item]:
    bundle = Bundle(task.path)
    for suite in _suites(bundle):
        if suite.kind not in _KINDS:
            raise InputError(f"{task.path}, core.yaml: {suite.label} is of the unknown kind {suite.kind!r:.60}")
        entries = list(bundle.read(f"eval_data/{suite.uri}").json_lines())
        if len(entries) <= suite.n_shots:
            raise InputError(f"{task.path}: {suite.label} needs more than {suite.n_shots} items, it has {len(entries)}")
        random.Random(1337).shuffle(entries)
        if task.limit is not None:  # the examples are taken from these items alone, as in nanochat
            entries = entries[: max(task.limit, suite.n_shots + 1)]
        for index, entry in enumerate(entries[: task.limit]):
            examples = [entries[other] for other in shots(len(entries), index, suite.n_shots)]
            item = _KINDS[suite.kind](task, suite, entry, examples)
            yield item._replace(facts={"task": suite.label, "baseline": suite.baseline, **item.facts})


def _judge(task: Task, item: Item, scores: Sequence[Score]) -> dict[str, Any]:
    if "gold" in item.facts:
        results = judge_choice(task, item, scores)
    else:
        results = {"logprob": scores[0].logprob, "correct": scores[0].is_greedy, "margin": scores[0].margin}
    baseline = item.facts["baseline"]
    return {**results, "centered": (results["correct"] - baseline) / (1 - baseline)}


_README = "karpathy/nanochat README and dev/estimate_gpt3_core.ipynb"

PROTOCOLS = (
    Protocol(
        "core",
        1,
        "The tasks of DCLM's CORE in a local bundle, with examples or without, as nanochat evaluates them. core is the "
        "mean over the tasks of their centred accuracy, (accuracy - chance) / (1 - chance); accuracy is the mean over "
        "the tasks of their accuracy.",
        _items,
        _judge,
        (
            Metric("core", "centered", "mean centred accuracy of the tasks", group="task"),
            Metric("accuracy", "correct", "mean accuracy of the tasks", group="task"),
        ),
        identify=_identify,
        group="task",
        published={
            size: {"core": Published(value, _README)}
            for size, value in {"124M": 0.1139, "355M": 0.1849, "774M": 0.2146, "1558M": 0.256525}.items()
        },
    ),
)
