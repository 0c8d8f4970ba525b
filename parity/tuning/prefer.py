"""Tuning on preferences with a reference: the data of a run, its metrics, and the reference's log-probabilities."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from parity.data.corpora import Corpus
from parity.data.tokenizer import Tokenizer
from parity.errors import InputError
from parity.storage.json import LISTING, get_entry, read_object
from parity.training.initial import initial_arrays
from parity.training.job import Job
from parity.training.job_data import JobData
from parity.training.trainer import Trainer, evaluate_all_rows
from parity.tuning.args import TuneArgs
from parity.tuning.embedded import EMBEDDED, preferences, records_by_rule
from parity.tuning.examples import Fitted, fit
from parity.tuning.instruct import SAMPLES, divide, exact_match, held_out_prompts, sample_prompts
from parity.tuning.pairs import Pair, Pairs, Preference, encode_pair, preference
from parity.tuning.records import read_records
from parity.weights.digest import weights_sha256

REFERENCE_FILE = "reference.json"
"""File of a run folder with the log-probabilities of the reference."""


def read_preferences(name: str) -> list[Preference]:
    """Return the preferences of a file, or those made by rule.

    Args:
        name: "rules", or the path of a .json, .jsonl or .parquet file.

    Raises:
        InputError: If a record has no known form, or a text is empty; the message names the file and the place.
    """
    records = records_by_rule(preferences()) if name == EMBEDDED else read_records(Path(name))
    return [preference(record) for record in records]


def load_preferences(args: TuneArgs, tokenizer: Tokenizer) -> JobData:
    """Return the data of a run that learns preferences; see parity.training.job.load_job.

    Raises:
        InputError: For bad records and for too few of them; see read_preferences() and fit().
    """
    settings, tune, config = args.settings, args.tune, args.model
    pairs = read_preferences(settings.corpus)
    train_part, test, validation_part = divide(pairs, args)
    chosen = [pair.chosen for pair in test]
    prompts = held_out_prompts(chosen, args, tokenizer)
    train, validation = (_encode(part, args, tokenizer) for part in (train_part, validation_part))
    n_equal = sum(pair.chosen == pair.rejected for pair in pairs)
    equal = f"; {n_equal} with two equal responses, from which nothing is learned" if n_equal else ""
    corpus = Corpus(
        f"{settings.corpus}, {len(train.examples)} pairs ({train}), {len(validation.examples)} for validation "
        f"({validation}), {len(test)} for tests{equal}",
        [_tokens(train)],
        [_tokens(validation)],
        hashlib.sha256(json.dumps([[c._replace(origin="") for c in pair] for pair in pairs]).encode()).hexdigest(),
    )
    validation_pairs = Pairs(validation.examples, config.n_ctx, tokenizer.eos_id)
    measures = [_rewards(validation_pairs, tune.dpo_beta, settings.micro_size)]
    if prompts:
        measures.append(exact_match(prompts, chosen, settings.sample_tokens, tokenizer, config))
    return JobData(
        corpus=corpus,
        train=Pairs(train.examples, config.n_ctx, tokenizer.eos_id),
        validation=validation_pairs,
        prompts=sample_prompts(args, tokenizer) or prompts[:SAMPLES],
        sample_options={"eos_id": tokenizer.eos_id},
        measure=lambda trainer: {name: value for m in measures for name, value in m(trainer).items()},
        loss_unit="pair",
        begin=keep_reference,
        has_baseline=False,
    )


def _encode(part: Sequence[Preference], args: TuneArgs, tokenizer: Tokenizer) -> Fitted[Pair]:
    settings, tune, config = args.settings, args.tune, args.model
    pairs = [encode_pair(pair, tokenizer, tune.template) for pair in part]
    max_length = min(tune.max_length or config.n_ctx, config.n_ctx)
    return fit(pairs, [pair.chosen.origin for pair in part], max_length, tune.overlong, settings.corpus)


def _tokens(fitted: Fitted[Pair]) -> np.ndarray:
    return np.concatenate([text.inputs for pair in fitted.examples for text in (pair.chosen, pair.rejected)])


def _rewards(pairs: Pairs, beta: float, batch_size: int) -> Callable[[Trainer], Mapping[str, float]]:
    """Return a function from a trainer to the means of the rewards, which are beta times the gain over the reference,
    and the fraction of pairs whose chosen response has the larger reward."""

    def measure(trainer: Trainer) -> dict[str, float]:
        rewards = beta * (evaluate_all_rows(trainer, pairs, batch_size) - pairs.reference)
        margins = rewards[:, 0] - rewards[:, 1]
        return {
            "reward_chosen": float(rewards[:, 0].mean()),
            "reward_rejected": float(rewards[:, 1].mean()),
            "margin": float(margins.mean()),
            "accuracy": float((margins > 0).mean()),
        }

    return measure


def keep_reference(trainer: Trainer, job: Job, console: Console) -> None:
    """Give the pairs of a job the log-probabilities of the reference: the weights that the run starts from.

    They are computed once, before the first step, and kept in the run folder, from which a resumed run reads them.

    Args:
        trainer: A trainer with the weights of the job's `init_from`, unless the job is resumed.
        job: The job, whose run folder exists.
        console: Where to print.

    Raises:
        InputError: If a resumed run has no intact file of its own data.
    """
    parts = {"train": job.train, "validation": job.validation}
    pairs = {name: dataset for name, dataset in parts.items() if isinstance(dataset, Pairs)}
    file = job.run.path / REFERENCE_FILE
    if job.resumed_step is not None:
        stored = _read(file, job.corpus.sha256, {name: len(part) for name, part in pairs.items()})
        for name, part in pairs.items():
            part.set_reference(stored[name])
        return
    console.print("reference  computing the log-probabilities of the initial weights", highlight=False)
    logprobs = {name: evaluate_all_rows(trainer, part, job.micro_size) for name, part in pairs.items()}
    if not all(np.isfinite(array).all() for array in logprobs.values()):
        raise InputError("the initial weights give log-probabilities that are not finite; are they damaged?")
    for name, part in pairs.items():
        part.set_reference(logprobs[name])
    if job.processes.first:
        initial = initial_arrays(job.config, job.settings, job.init_from)
        values = {name: array.tolist() for name, array in logprobs.items()}
        job.run.write(
            file.name,
            {
                "weights_sha256": weights_sha256(job.config, initial.arrays, initial.format),
                "corpus_sha256": job.corpus.sha256,
                "sha256": _sha256(values),
                **values,
            },
        )


def _read(file: Path, corpus_sha256: str, lengths: Mapping[str, int]) -> dict[str, np.ndarray]:
    hint = "restore it, or start a new run with the same options"
    entries = read_object(file, LISTING, hint=hint)
    values = {name: get_entry(entries, name, list, str(file)) for name in lengths}
    if entries.get("sha256") != _sha256(values) or entries.get("corpus_sha256") != corpus_sha256:
        raise InputError(f"{file} is damaged, or belongs to other data; {hint}")
    return {name: np.array(values[name], np.float64).reshape(lengths[name], 2) for name in lengths}


def _sha256(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
