"""The benchmark of evaluation: the scorer in both backends, and the transformers model of lm-evaluation-harness."""

import logging
from typing import Any

import numpy as np

from measure import peers
from measure.args import Args
from measure.report import Measurement
from measure.timing import Spec, Workload, interleave
from parity.config import PRESETS, GPTConfig
from parity.evaluation.scorer import Request

Pairs = list[tuple[list[int], list[int]]]
"""Token ids of contexts and continuations."""


def lambada_lengths(count: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw the numbers of tokens of contexts and last words as in LAMBADA: texts of 83 tokens, from 56 to 223."""
    contexts = np.clip(55 + generator.gamma(4, 6.8, count), 55, 222).astype(int)
    return contexts, 1 + (generator.random(count) < 0.22).astype(int)


def hellaswag_lengths(count: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw the numbers of tokens of contexts and endings, four per context, as in HellaSwag.

    Two thirds of the texts are instructions, the others describe short videos.
    """
    is_long = generator.random((count // 4, 1)) < 0.67
    long, short = generator.normal(78, 16, (count // 4, 1)), generator.normal(22, 8, (count // 4, 1))
    contexts = np.clip(np.where(is_long, long, short), 5, 150).repeat(4, axis=1).astype(int)
    endings = np.clip(generator.gamma(4, 6, (count // 4, 4)), 2, 60).astype(int)
    return contexts.ravel(), endings.ravel()


WORKS = {"LAMBADA": lambada_lengths, "HellaSwag": hellaswag_lengths}


def draw_pairs(config: GPTConfig, name: str, count: int) -> Pairs:
    """Draw contexts and continuations of random ids; those of HellaSwag have four continuations per context."""
    generator = np.random.default_rng(0)
    pairs: Pairs = []
    context: list[int] = []
    for number, (n_context, n) in enumerate(zip(*WORKS[name](count, generator), strict=True)):
        if name != "HellaSwag" or number % 4 == 0:
            context = generator.integers(0, config.n_vocab, n_context).tolist()
        pairs.append((context, generator.integers(0, config.n_vocab, n).tolist()))
    return pairs


def evaluate(args: Args) -> list[Measurement]:
    """Measure the scores of texts with the lengths of LAMBADA and of HellaSwag."""
    config, count = PRESETS[args.size], args.items
    measurements = []
    for name in WORKS:
        pairs = draw_pairs(config, name, count)
        specs: dict[str, Spec] = {
            "gpt_jax": args.spec(jax_scores, config, pairs),
            "gpt_torch": args.spec(torch_scores, config, pairs, args.threads),
        }
        for batch_size in (1, 16):
            specs[f"lm-eval, transformers, batches of {batch_size}"] = args.spec(
                harness_scores, config, pairs, batch_size, args.threads
            )
        timings, _ = interleave(args.selected(specs), args.rounds, 1)
        tokens = sum(len(context) + len(continuation) - 1 for context, continuation in pairs)
        scored = sum(len(continuation) for _, continuation in pairs)
        title = f"Evaluation: {args.size}, float32, {count} texts as long as {name}'s, {tokens:,} tokens"
        notes = [f"{scored:,} tokens are scored"]
        measurements.append(Measurement(title, "pass", count, "texts", timings, notes))
    return measurements


def jax_scores(config: GPTConfig, pairs: Pairs) -> Workload:
    import gpt_jax

    return peers.in_jax(_scoring(gpt_jax, gpt_jax.GPTModel(config), pairs))


def torch_scores(config: GPTConfig, pairs: Pairs, threads: int) -> Workload:
    import gpt_torch

    _, device = peers.set_up_torch(threads)
    return peers.in_torch(_scoring(gpt_torch, gpt_torch.GPTModel(config).to(device), pairs))


def _scoring(package: Any, model: Any, pairs: Pairs) -> Any:
    from parity.evaluation.scorer import Scorer

    scorer, requests = Scorer(package, model), [Request(*pair) for pair in pairs]
    return lambda: sum(score.logprob for _, score in scorer.score(requests))


def harness_scores(config: GPTConfig, pairs: Pairs, batch_size: int, threads: int) -> Workload:
    """The model `hf` of lm-evaluation-harness, with transformers' GPT2LMHeadModel (SDPA attention)."""
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    logging.disable(logging.WARNING)
    _, device = peers.set_up_torch(threads)
    end = "<|endoftext|>"  # the texts are token ids already, but the model wants a tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({end: 0}, end)), eos_token=end)
    harness = HFLM(pretrained=peers.transformers_model(config).to(device), tokenizer=tokenizer, batch_size=batch_size)
    requests = [(("", ""), *pair) for pair in pairs]
    return peers.in_torch(lambda: harness._loglikelihood_tokens(requests, disable_tqdm=True))
