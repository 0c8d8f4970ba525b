"""Tuning on instructions with responses: the data of a run, and the answers to held-out instructions."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from parity.config import GPTConfig
from parity.data.corpora import Corpus
from parity.data.tokenizer import Tokenizer, stream_text
from parity.errors import InputError
from parity.training.job_data import JobData, prompt_texts
from parity.training.trainer import Trainer
from parity.tuning.args import TuneArgs
from parity.tuning.embedded import EMBEDDED, instructions, records_by_rule
from parity.tuning.encoding import Example, encode_example, encode_prompt
from parity.tuning.examples import Examples, Fitted, fit
from parity.tuning.packing import Packed
from parity.tuning.records import Conversation, Turn, conversation, read_records, split
from parity.tuning.settings import TuneSettings
from parity.tuning.template import render

AnyRecord = TypeVar("AnyRecord")
SAMPLES = 3
"""Number of held-out instructions whose answers are written as samples."""
_ANSWERED_AT_ONCE = 32


class Answer(NamedTuple):
    """A model's response."""

    text: str
    """Without white space around it."""
    ended: bool
    """Whether the model ended it with the end-of-text token."""


def read_instructions(name: str) -> list[Conversation]:
    """Return the conversations of a file, or those made by rule.

    Args:
        name: "rules", or the path of a .json, .jsonl or .parquet file.

    Raises:
        InputError: If a record has no known form, or a response is empty; the message names the file and the place.
    """
    records = records_by_rule(instructions()) if name == EMBEDDED else read_records(Path(name))
    return [conversation(record) for record in records]


def load_instructions(args: TuneArgs, tokenizer: Tokenizer) -> JobData:
    """Return the data of a run that learns responses to instructions; see parity.training.job.load_job.

    Raises:
        InputError: For bad records and for too few of them; see read_instructions() and fit().
    """
    settings, tune, config = args.settings, args.tune, args.model
    conversations = read_instructions(settings.corpus)
    train_part, test, validation_part = divide(conversations, args)
    prompts = held_out_prompts(test, args, tokenizer)
    train, validation = (
        _encode(part, tune, config, tokenizer, settings.corpus) for part in (train_part, validation_part)
    )
    corpus = Corpus(
        f"{settings.corpus}, {len(train.examples)} examples ({train}), {len(validation.examples)} for validation "
        f"({validation}), {len(test)} for tests",
        [_tokens(train)],
        [_tokens(validation)],
        hashlib.sha256(json.dumps([c._replace(origin="") for c in conversations]).encode()).hexdigest(),
    )
    return JobData(
        corpus=corpus,
        train=_dataset(train, tune, config, tokenizer),
        validation=_dataset(validation, tune, config, tokenizer),
        prompts=sample_prompts(args, tokenizer) or prompts[:SAMPLES],
        sample_options={"eos_id": tokenizer.eos_id},
        measure=exact_match(prompts, test, settings.sample_tokens, tokenizer, config) if prompts else None,
        has_baseline=False,
    )


def divide(records: Sequence[AnyRecord], args: TuneArgs) -> tuple[list[AnyRecord], list[AnyRecord], list[AnyRecord]]:
    """Return the records for training, for tests and for validation; raises InputError if there are too few."""
    settings, test_fraction = args.settings, args.tune.test_fraction
    parts = split(records, test_fraction, settings.validation_fraction)
    for part, option in zip(parts, ("training", "--test-fraction", "--validation-fraction"), strict=True):
        if not part and not (option == "--test-fraction" and not test_fraction):
            raise InputError(f"{settings.corpus}: of {len(records)} examples none is left for {option}")
    return parts


def _encode(
    part: Sequence[Conversation], tune: TuneSettings, config: GPTConfig, tokenizer: Tokenizer, name: str
) -> Fitted[Example]:
    examples = [encode_example(render(c, tune.template), tokenizer, tune.loss_on, c.origin) for c in part]
    max_length = min(tune.max_length or config.n_ctx, config.n_ctx)
    return fit(examples, [c.origin for c in part], max_length, tune.overlong, name)


def _dataset(fitted: Fitted[Example], tune: TuneSettings, config: GPTConfig, tokenizer: Tokenizer) -> Examples | Packed:
    if tune.packing:
        return Packed(fitted.examples, min(tune.max_length or config.n_ctx, config.n_ctx), tokenizer.eos_id)
    return Examples(fitted.examples, config.n_ctx, tokenizer.eos_id)


def _tokens(fitted: Fitted[Example]) -> np.ndarray:
    return np.concatenate([example.inputs for example in fitted.examples])


def held_out_prompts(test: Sequence[Conversation], args: TuneArgs, tokenizer: Tokenizer) -> list[list[int]]:
    """Return the prompts that each evaluation answers; raises InputError for one that does not fit into the context."""
    chosen = test[: args.tune.eval_items]
    prompts = [encode_prompt(render(c, args.tune.template), tokenizer, c.origin) for c in chosen]
    _check_prompts(prompts, [c.origin for c in chosen], args.model)
    return prompts


def _check_prompts(prompts: Sequence[Sequence[int]], origins: Sequence[str], config: GPTConfig) -> None:
    for prompt, origin in zip(prompts, origins, strict=True):
        if len(prompt) >= config.n_ctx:
            raise InputError(
                f"{origin}: the instruction has {len(prompt)} tokens, the model's context {config.n_ctx}; shorten it"
            )


def sample_prompts(args: TuneArgs, tokenizer: Tokenizer) -> list[list[int]]:
    """Return the prompts of --sample-prompt and --eval-prompts, which are instructions; none by default."""
    if not args.settings.sample_prompt and args.settings.eval_prompts is None:
        return []
    texts, origin = prompt_texts(args.settings)
    conversations = [Conversation((Turn(text.strip(), "", ""),), "", origin) for text in texts]
    prompts = [encode_prompt(render(c, args.tune.template), tokenizer, origin) for c in conversations]
    _check_prompts(prompts, [origin] * len(prompts), args.model)
    return prompts


def exact_match(
    prompts: Sequence[Sequence[int]],
    conversations: Sequence[Conversation],
    most: int,
    tokenizer: Tokenizer,
    config: GPTConfig,
) -> Callable[[Trainer], Mapping[str, float]]:
    """Return a function from a trainer to the fraction of responses that match, and of those that end.

    Args:
        prompts: Those of held_out_prompts().
        conversations: The conversations that the prompts are of, perhaps followed by others.
        most: Largest number of tokens of a response.
        tokenizer: The tokenizer.
        config: The model's configuration.
    """
    expected = [c.turns[-1].response for c in conversations[: len(prompts)]]

    def measure(trainer: Trainer) -> dict[str, float]:
        answers = answer(trainer.generate, prompts, most, tokenizer, config)
        matches = sum(a.text == text for a, text in zip(answers, expected, strict=True))
        return {
            "exact_match": matches / len(answers),
            "ended": sum(a.ended for a in answers) / len(answers),
        }

    return measure


def answer(
    generate: Callable[..., list[list[int]]],
    prompts: Sequence[Sequence[int]],
    most: int,
    tokenizer: Tokenizer,
    config: GPTConfig,
) -> list[Answer]:
    """Return the most likely responses to prompts, token by token.

    Args:
        generate: The backend's generate() for the model, with its arguments from the prompts on.
        prompts: Token ids, from encode_prompt().
        most: Largest number of tokens of a response.
        tokenizer: The tokenizer.
        config: The model's configuration.
    """
    answers = []
    for first in range(0, len(prompts), _ANSWERED_AT_ONCE):
        part = prompts[first : first + _ANSWERED_AT_ONCE]
        room = [min(most, config.n_ctx - len(prompt)) for prompt in part]
        own: list[dict[str, Any]] = [{"max_new_tokens": n} for n in room]
        rows = generate(part, max(room), per_prompt=own, temperature=0.0, eos_id=tokenizer.eos_id)
        for prompt, row in zip(part, rows, strict=True):
            new = row[len(prompt) :]
            ended = bool(new) and new[-1] == tokenizer.eos_id
            text = "".join(stream_text(tokenizer, new[:-1] if ended else new)).strip()
            answers.append(Answer(text, ended))
    return answers
