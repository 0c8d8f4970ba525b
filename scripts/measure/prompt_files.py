"""The benchmark of generate.py --prompts: from a file of prompts to the file of their continuations."""

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from measure import peers
from measure.args import Args
from measure.report import Measurement
from measure.timing import Spec, Workload, interleave
from parity.config import GPTConfig
from parity.data.tokenizer import load_tokenizer
from parity.parts import Part
from parity.prompt_files.output import Output
from parity.prompt_files.prompts import PromptFile
from parity.prompt_files.run import Plan, continuations

N_BATCHES = 4


def prompt_files(args: Args, config: GPTConfig, dtype: str, batch_size: int, length: int, n_new: int) -> Measurement:
    """Measure continuing the prompts of a file, and the same batches with generate() alone."""
    shape = (N_BATCHES * batch_size, length)
    prompts = np.random.default_rng(0).integers(0, config.n_vocab, shape).tolist()
    specs: dict[str, Spec] = {
        "generate() of each batch": args.spec(batches, config, prompts, batch_size, n_new, dtype),
        "generate.py --prompts": args.spec(file, config, prompts, batch_size, n_new, dtype),
    }
    timings, _ = interleave(specs, args.rounds, 1)
    title = f"Prompts of a file: {args.size}, {dtype}, {len(prompts)} prompts of {length} tokens, {n_new} new tokens"
    title += f", {batch_size} at once, gpt_jax"
    return Measurement(title, "file", len(prompts) * n_new, "tokens", timings)


def _generator(config: GPTConfig, dtype: str) -> Callable[..., list[list[int]]]:
    import gpt_jax

    return functools.partial(gpt_jax.generate, gpt_jax.for_decoding(gpt_jax.cast(gpt_jax.GPTModel(config), dtype)))


def batches(config: GPTConfig, prompts: list[list[int]], batch_size: int, n_new: int, dtype: str) -> Workload:
    """One call of generate() for each batch, whose prompts are there as ids."""
    generate = _generator(config, dtype)

    def call() -> None:
        for start in range(0, len(prompts), batch_size):
            generate(prompts[start : start + batch_size], n_new, temperature=0)

    return peers.in_jax(call)


def file(config: GPTConfig, prompts: list[list[int]], batch_size: int, n_new: int, dtype: str) -> Workload:
    """What generate.py --prompts does once the model is loaded: read the file, generate, write the continuations."""
    generate, tokenizer = _generator(config, dtype), load_tokenizer("bytes")
    text = "".join(json.dumps({"tokens": ids}) + "\n" for ids in prompts)
    options: dict[str, Any] = {"temperature": 0}

    def call() -> None:
        with tempfile.TemporaryDirectory() as name:
            source = Path(name) / "prompts.jsonl"
            source.write_text(text)
            lines = PromptFile(source)
            plan = Plan.of(lines.n_prompts, batch_size, 1)
            chosen = lines.encode(plan.prompts_of(Part(0, 1)), tokenizer, config)
            out = Output(Path(name) / "out.jsonl", options, [prompt.id for prompt in chosen])
            for records in continuations(generate, tokenizer, chosen, plan, out.n_done, n_new, options):
                out.add(records)
            out.close()

    return peers.in_jax(call)
