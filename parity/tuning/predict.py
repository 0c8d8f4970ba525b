"""Answers to the instructions of a file, with what can be measured about them without a judge."""

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parity.data.tokenizer import Tokenizer
from parity.errors import InputError
from parity.evaluation.scorer import Request, Scorer
from parity.storage.atomic import replace_text
from parity.tuning.encoding import encode_prompt, encode_segments
from parity.tuning.instruct import answer
from parity.tuning.records import conversation, read_records
from parity.tuning.settings import TuneSettings
from parity.tuning.template import Segment, render


def predict(
    backend: Any, model: Any, tokenizer: Tokenizer, tune: TuneSettings, most: int, source: Path, target: Path
) -> str:
    """Answer all instructions of a file, and write the records with the answers as a JSON list.

    Each record gets "model_response" and "ended" (whether the model ended its response) and, if it has a response of
    its own, "exact_match" and "loss": nats per token of the record's response, with the end-of-text token.

    Args:
        backend: The package gpt_torch or gpt_jax.
        model: A GPTModel of the backend.
        tokenizer: The tokenizer of the model.
        tune: The settings that the model was tuned with.
        most: Largest number of tokens of a response.
        source: A .json, .jsonl or .parquet file.
        target: The file to write.

    Returns:
        A line about all answers.

    Raises:
        InputError: For a record without an instruction, and for an instruction that does not fit into the context.
    """
    records = read_records(source)
    config = model.config
    segments, prompts = [], []
    for record in records:
        segments.append(render(conversation(record, needs_response=False), tune.template))
        prompts.append(encode_prompt(segments[-1], tokenizer, record.origin))
        if len(prompts[-1]) >= config.n_ctx:
            raise InputError(
                f"{record.origin}: the instruction has {len(prompts[-1])} tokens, and the model's context "
                f"{config.n_ctx}; shorten it"
            )
    generate = functools.partial(backend.generate, model)
    answers = answer(generate, prompts, most, tokenizer, config)
    losses = response_losses(Scorer(backend, model), segments, tokenizer)
    written, matches = [], []
    for number, (record, parts, response) in enumerate(zip(records, segments, answers, strict=True)):
        entry = {**record.fields, "model_response": response.text, "ended": response.ended}
        if expected := parts[-1].response:
            entry["exact_match"] = response.text == expected
            matches.append(response.text == expected)
        if number in losses:
            entry["loss"] = losses[number]
        written.append(entry)
    replace_text(target, json.dumps(written, indent=4, ensure_ascii=False) + "\n")
    text = f"{len(written)} answers in {target}; {sum(a.ended for a in answers) / len(answers):.1%} ended"
    if matches:
        text += f"; {sum(matches) / len(matches):.1%} match exactly"
    if losses:
        text += (
            f"; loss {math.fsum(losses.values()) / len(losses):.4f} nats per token of a response, mean of the records"
        )
    return text


def response_losses(
    scorer: Scorer, conversations: Sequence[Sequence[Segment]], tokenizer: Tokenizer
) -> dict[int, float]:
    """Return {number of the conversation: loss of its last response in nats per token, with the end-of-text token}.

    Those without a response, or with one that does not fit into the context, are left out.
    """
    requests = {}
    for number, segments in enumerate(conversations):
        ids, n_prompt = encode_segments(segments, tokenizer)[-1]
        continuation = [*ids[n_prompt:], tokenizer.eos_id]
        if segments[-1].response and len(continuation) <= scorer.config.n_ctx:
            requests[number] = Request(encode_prompt(segments, tokenizer), continuation)
    numbers = list(requests)
    scores = scorer.score(list(requests.values()))
    return {numbers[index]: -score.logprob / len(score.token_logprobs) for index, score in scores}
