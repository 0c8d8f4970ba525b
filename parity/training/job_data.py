"""What a training job reads: here windows over a text. parity/tuning has examples instead."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from parity.config import GPTConfig
from parity.data.corpora import Corpus, load_corpus
from parity.data.tokenizer import Tokenizer, encode_prompt
from parity.data.windows import Dataset, Windows
from parity.errors import InputError
from parity.training.args import JobArgs
from parity.training.settings import TrainSettings
from parity.training.trainer import Trainer


class JobData(NamedTuple):
    """The data of a job, and what an evaluation does with it; the fields of Job have the same names."""

    corpus: Corpus
    train: Dataset
    validation: Dataset
    prompts: Sequence[Sequence[int]]
    """Token ids of the prompts that each evaluation continues."""
    sample_options: Mapping[str, Any] = MappingProxyType({})
    """Options of generate() for these prompts, in addition to those of the settings."""
    measure: Callable[[Trainer], Mapping[str, Any]] | None = None
    """Called at each evaluation; what it returns is logged with the validation loss, and its numbers are printed."""
    loss_unit: Literal["token", "pair", "text"] = "token"
    """What the loss has one term for. The exponential of the loss of a token is the perplexity."""
    begin: Callable[..., None] | None = None
    """Called with (trainer, job, console) before a run begins or resumes, with the trainer's initial weights."""
    sample: Callable[[Trainer], Sequence[str]] | None = None
    """Returns the samples of an evaluation, if they are not continuations of prompts."""
    trainer_options: Mapping[str, Any] = MappingProxyType({})
    """Arguments of the backend's Trainer that the data decide."""
    use: str = 'sample from it: python scripts/generate.py --run {run} "The "'
    """What a finished run prints about its use."""
    has_baseline: bool = True
    """Whether the loss of a bigram model on the corpus is a baseline of the run."""


def load_windows(args: JobArgs, tokenizer: Tokenizer) -> JobData:
    """Return windows over the corpus of the settings; raises InputError if it is missing or too short."""
    settings, config = args.settings, args.model
    try:
        corpus = load_corpus(settings.corpus, tokenizer, settings.validation_fraction)
    except InputError as error:
        hint = "; if the corpus has moved since the run began, name its new place with --corpus"
        raise InputError(f"{error}{hint * args.resume}") from None
    return JobData(
        corpus=corpus,
        train=Windows(
            corpus.train,
            config.n_ctx,
            config.n_vocab,
            settings.stride,
            name=f"{corpus.name} (training)",
            order=settings.window_order,
        ),
        validation=Windows(corpus.validation, config.n_ctx, config.n_vocab, name=f"{corpus.name} (validation)"),
        prompts=encode_prompts(settings, tokenizer, config),
    )


def prompt_texts(settings: TrainSettings) -> tuple[list[str], str]:
    """Return the prompts of --sample-prompt or --eval-prompts, and the option that they come from.

    Raises:
        InputError: If the file of --eval-prompts cannot be read or contains no prompt.
    """
    if settings.eval_prompts is None:
        return [settings.sample_prompt], "--sample-prompt"
    origin = f"--eval-prompts {settings.eval_prompts}"
    try:
        texts = [line for line in Path(settings.eval_prompts).read_text(encoding="utf-8").splitlines() if line]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{origin} cannot be read ({error})") from None
    if not texts:
        raise InputError(f"{origin} contains no prompt; write one per line")
    return texts, origin


def encode_prompts(settings: TrainSettings, tokenizer: Tokenizer, config: GPTConfig) -> list[Sequence[int]]:
    """Return the token ids of the prompts; raises InputError for one that does not fit into the context."""
    texts, origin = prompt_texts(settings)
    prompts = [encode_prompt(tokenizer, text) for text in texts]
    for text, prompt in zip(texts, prompts, strict=True):
        if len(prompt) >= config.n_ctx:
            raise InputError(f"{origin}: {text!r} has {len(prompt)} tokens, the context is {config.n_ctx}; shorten it")
    return prompts
