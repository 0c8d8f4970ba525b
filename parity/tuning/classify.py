"""Tuning a model to label texts: the data of a run, what it reports, and the labels of a file."""

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from parity.config import GPTConfig
from parity.data.corpora import Corpus
from parity.data.tokenizer import Tokenizer
from parity.errors import InputError, printable
from parity.storage.atomic import replace_text
from parity.training.job_data import JobData, prompt_texts
from parity.training.trainer import Trainer, evaluate_all_rows
from parity.tuning.args import TuneArgs
from parity.tuning.labeled import LabeledText, LabeledTexts
from parity.tuning.labels import Labeled, balanced, labels_of, read_labeled, split_at_random
from parity.tuning.settings import TuneSettings
from parity.weights import Row, rows
from parity.weights.classifier import ClassifierConfig, backbone

SPLIT_SEED = 123
"""Seed of the split, which depends on the file alone; the book's."""
_SAMPLES = 3
_MOST_COLUMNS = 12


def last_blocks(config: GPTConfig, count: int) -> list[Row]:
    """Return the rows of the last blocks and the final norm, without the head; none of them if `count` is 0."""
    layers = tuple(range(config.n_layer))[max(0, config.n_layer - count) :] if count else ()
    table = [row for row in rows(backbone(config)) if row.per_layer or row.huggingface.startswith("ln_f.")]
    return [dataclasses.replace(row, layers=layers) if row.per_layer else row for row in table] if layers else []


def load_labels(args: TuneArgs, tokenizer: Tokenizer) -> JobData:
    """Return the data of a run that learns labels; see parity.training.job.load_job.

    Raises:
        InputError: For bad records, for too few of them, and if all have the same label; see read_labeled().
    """
    settings, tune, name = args.settings, args.tune, args.settings.corpus
    texts = read_labeled(name)
    labels = labels_of(texts, name)
    chosen = balanced(texts, labels, SPLIT_SEED) if tune.balance else texts
    train, test, validation = split_at_random(chosen, SPLIT_SEED, tune.test_fraction, settings.validation_fraction)
    if not validation:
        raise InputError(f"{name}: of {len(chosen)} texts none is left for --validation-fraction")
    if missing := set(labels) - {text.label for text in train}:
        raise InputError(
            f"{name}: of {len(train)} texts for training none has the label {printable(repr(min(missing)), 60)}; give "
            "more of them, or leave the label out"
        )
    limit = min(tune.max_length or args.model.n_ctx, args.model.n_ctx)
    encoded = {part: [_encode(text, tokenizer) for text in texts] for part, texts in
               (("train", train), ("validation", validation), ("test", test))}  # fmt: skip
    longest = min(limit, max(map(len, encoded["train"])))
    fixed = longest if tune.position == "last" else None
    classifier = ClassifierConfig(labels, tokenizer.eos_id, tune.head_bias, tune.position, fixed)
    parts, reports = {}, {}
    for part, (own, ids) in {
        "train": (train, encoded["train"]),
        "validation": (validation, encoded["validation"]),
        "test": (test, encoded["test"]),
    }.items():
        kept, reports[part] = _fit(own, ids, limit, tune)
        parts[part] = LabeledTexts(
            [LabeledText(ids, labels.index(text.label)) for text, ids in kept], classifier, args.model.n_ctx
        )
    if not parts["train"].texts or not parts["validation"].texts:
        raise InputError(f"{name}: too few texts have at most {limit} tokens; use --overlong cut, or a larger context")
    counts = Counter(text.label for text in chosen)
    described = ", ".join(f"{printable(label, 30)} {counts[label]}" for label in labels[:_MOST_COLUMNS])
    corpus = Corpus(
        f"{name}, {len(labels)} labels ({described}), {len(parts['train'])} texts ({reports['train']}), "
        f"{len(parts['validation'])} for validation ({reports['validation']}), {len(parts['test'])} for tests",
        [_tokens(parts["train"])],
        [_tokens(parts["validation"])],
        hashlib.sha256(json.dumps([(text.text, text.label) for text in texts]).encode()).hexdigest(),
    )
    held_out = _HeldOut(parts["test"], settings.micro_size, tune.eval_items, _sample_texts(args, tokenizer, test))
    table = None if tune.train_blocks is None else last_blocks(args.model, tune.train_blocks)
    return JobData(
        corpus=corpus,
        train=parts["train"],
        validation=parts["validation"],
        prompts=[],
        measure=held_out.measure,
        loss_unit="text",
        sample=held_out.sample,
        trainer_options={"classifier": classifier, "table": table},
        has_baseline=False,
        use="label texts with it: python scripts/finetune.py --run {run} --predict FILE --out FILE",
    )


def _encode(text: Labeled, tokenizer: Tokenizer) -> np.ndarray:
    return np.array(tokenizer.encode(text.text), np.int32)


def _fit(
    texts: Sequence[Labeled], encoded: Sequence[np.ndarray], limit: int, tune: TuneSettings
) -> tuple[list[tuple[Labeled, np.ndarray]], str]:
    """Return the texts with their ids, those that are too long without their end or left out, and a count of both."""
    kept, n_cut, n_dropped = [], 0, 0
    for text, ids in zip(texts, encoded, strict=True):
        if len(ids) > limit:
            if tune.overlong == "refuse":
                raise InputError(
                    f"{text.record.origin}: the text has {len(ids)} tokens, more than {limit}; shorten it, or use "
                    "--overlong cut or drop"
                )
            if tune.overlong == "drop":
                n_dropped += 1
                continue
            n_cut += 1
        kept.append((text, ids[:limit]))
    return kept, f"{n_cut} cut, {n_dropped} dropped"


def _tokens(texts: LabeledTexts) -> np.ndarray:
    return np.concatenate([text.inputs for text in texts.texts])


def _sample_texts(args: TuneArgs, tokenizer: Tokenizer, test: Sequence[Labeled]) -> list[tuple[str, np.ndarray]]:
    """Return the texts of --sample-prompt or --eval-prompts, by default the first ones for tests, with their ids."""
    given = args.settings.sample_prompt or args.settings.eval_prompts is not None
    chosen = prompt_texts(args.settings)[0] if given else [text.text for text in test[:_SAMPLES]]
    return [(text, np.array(tokenizer.encode(text)[: args.model.n_ctx], np.int32)) for text in chosen]


class _HeldOut:
    """What an evaluation reports about the texts for tests: accuracy, confusions and a few labels."""

    def __init__(self, test: LabeledTexts, size: int, count: int, samples: Sequence[tuple[str, np.ndarray]]):
        self.classifier, self._size, self._texts = test.classifier, size, [text for text, _ in samples]
        self._test = LabeledTexts(test.texts[:count], test.classifier, test.n_ctx)
        self._samples = LabeledTexts([LabeledText(ids, 0) for _, ids in samples], test.classifier, test.n_ctx)
        self._confusions: np.ndarray | None = None

    def measure(self, trainer: Trainer) -> Mapping[str, Any]:
        """Return the fraction of the texts whose label is right, and the table of confusions."""
        if not self._test.texts:
            return {}
        chosen = self._logits(trainer, self._test).argmax(axis=1)
        self._confusions = confusions([text.label for text in self._test.texts], chosen, len(self.classifier.labels))
        return {"accuracy": accuracy(self._confusions), "confusions": self._confusions.tolist()}

    def sample(self, trainer: Trainer) -> list[str]:
        """Return the table of confusions as text, and the labels of a few texts with their probabilities."""
        if self._confusions is None:
            self.measure(trainer)
        described = [] if self._confusions is None else [describe(self._confusions, self.classifier.labels)]
        for text, logits in zip(self._texts, self._logits(trainer, self._samples), strict=True):
            best = int(logits.argmax())
            probability = 1 / np.exp(logits - logits[best]).sum()
            described.append(f"{self.classifier.labels[best]} {probability:.3f}  {text!r}")
        return described

    def _logits(self, trainer: Trainer, texts: LabeledTexts) -> np.ndarray:
        return evaluate_all_rows(trainer, texts, self._size) if len(texts) else np.zeros((0, 1))


def confusions(labels: Sequence[int], chosen: Sequence[int], count: int) -> np.ndarray:
    """Return a table of integers [label, chosen label]: how many texts with the label were given the other one."""
    table = np.zeros((count, count), np.int64)
    np.add.at(table, (np.asarray(labels, np.int64), np.asarray(chosen, np.int64)), 1)
    return table


def accuracy(table: np.ndarray) -> float:
    """Return the fraction of the texts in a table of confusions whose label is right."""
    return float(np.trace(table) / table.sum())


def describe(table: np.ndarray, labels: Sequence[str]) -> str:
    """Return a table of confusions as text: a row for each label and a column for each chosen one.

    If there are many labels, there is a line for each that says how often it was found, and what it was taken for.
    """
    names = [printable(label, 20) for label in labels]
    width = max(map(len, names))
    if len(labels) <= _MOST_COLUMNS:
        columns = [max(len(name), len(str(table.max()))) for name in names]
        rows = [["chosen:", *names], *([name, *map(str, row)] for name, row in zip(names, table.tolist(), strict=True))]
        width = max(width, len("chosen:"))
        return "\n".join(
            first.ljust(width) + "".join(f"  {cell:>{w}}" for cell, w in zip(cells, columns, strict=True))
            for first, *cells in rows
        )
    lines = []
    for number, (name, row) in enumerate(zip(names, table, strict=True)):
        others = np.where(np.arange(len(row)) == number, 0, row)
        taken = f", {others.max()} taken for {names[others.argmax()]}" if others.max() else ""
        lines.append(f"{name.ljust(width)}  {row[number]} of {row.sum()}{taken}")
    return "\n".join(lines)


def predict_labels(backend: Any, model: Any, tokenizer: Tokenizer, source: Path, target: Path) -> str:
    """Label all texts of a file, and write the records with their labels as a JSON list.

    Each record gets "model_label" and "probabilities" and, if it has a label of its own, "correct" and "loss", in nats.

    Args:
        backend: The package gpt_torch or gpt_jax.
        model: A classifier of the backend.
        tokenizer: The tokenizer of the model.
        source: A file with texts, with or without labels; see parity.tuning.labels.KINDS.
        target: The file to write.

    Returns:
        A line about all texts and, if they have labels, the table of confusions.

    Raises:
        InputError: For a record without a text, and for a label that the classifier does not have.
    """
    classifier: ClassifierConfig = model.classifier
    texts = read_labeled(str(source), needs_label=False)
    for text in texts:
        if text.label and text.label not in classifier.labels:
            known = ", ".join(classifier.labels[:_MOST_COLUMNS])
            raise InputError(f"{text.record.origin}: the label {text.label!r:.60} is none of the classifier's: {known}")
    limit = classifier.length or model.config.n_ctx
    encoded = [_encode(text, tokenizer) for text in texts]
    n_cut = sum(len(ids) > limit for ids in encoded)
    probabilities = backend.classify(model, [ids[:limit] for ids in encoded])
    written, pairs, losses = [], [], []
    for text, row in zip(texts, probabilities, strict=True):
        best = int(row.argmax())
        named = {label: float(p) for label, p in zip(classifier.labels, row, strict=True)}
        entry = {**text.record.fields, "model_label": classifier.labels[best], "probabilities": named}
        if text.label:
            own = classifier.labels.index(text.label)
            pairs.append((own, best))
            losses.append(-math.log(max(float(row[own]), 1e-300)))
            entry |= {"correct": own == best, "loss": losses[-1]}
        written.append(entry)
    replace_text(target, json.dumps(written, indent=4, ensure_ascii=False) + "\n")
    summary = f"{len(written)} texts in {target}" + f", {n_cut} of them cut to {limit} tokens" * (n_cut > 0)
    if pairs:
        own_labels, chosen = zip(*pairs, strict=True)
        table = confusions(own_labels, chosen, len(classifier.labels))
        summary += f"; {accuracy(table):.2%} labeled right, loss {math.fsum(losses) / len(losses):.4f} nats per text"
        summary += "\n" + describe(table, classifier.labels)
    return summary
