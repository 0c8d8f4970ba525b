"""A training job as the scripts are given it: what to train, on which text, into which run folder."""

import contextlib
import dataclasses
import json
import math
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console

from parity import weights
from parity.config import GPTConfig
from parity.data.corpora import Corpus, load_corpus
from parity.data.tokenizer import Tokenizer, encode_prompt, load_tokenizer
from parity.data.windows import Windows
from parity.errors import InputError
from parity.training import checkpoints
from parity.training.args import JobArgs
from parity.training.bigram import bigram_loss
from parity.training.loggers import Logger, open_loggers
from parity.training.processes import ALONE, Processes
from parity.training.runs import FollowedRun, RunFolder, run_config, saved_job
from parity.training.settings import CHANGEABLE, TrainSettings, recipe
from parity.weights.load import read_folder

_MOST_BIGRAM_TOKENS = 50_000_000  # a bigram of more takes long and much memory


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything about a run that does not depend on the framework."""

    args: JobArgs
    config: GPTConfig
    settings: TrainSettings
    run: RunFolder
    processes: Processes
    tokenizer: Tokenizer
    corpus: Corpus
    train: Windows
    validation: Windows
    prompts: Sequence[Sequence[int]]
    """Continued at each evaluation."""
    bigram: float | None = None
    """Validation loss of the baseline."""
    loggers: Sequence[Logger] = ()

    @property
    def is_resuming(self) -> bool:
        """Whether there are checkpoints to resume from; a run killed before its first begins anew."""
        return self.args.resume and bool(checkpoints.steps(self.run.checkpoints))

    @property
    def init(self) -> str | None:
        """Weights to start from; a run that goes on has its own."""
        return None if self.is_resuming else self.args.init

    @property
    def micro_size(self) -> int:
        """Windows in a micro-batch."""
        return self.settings.batch_size // self.settings.accumulate

    def log(self, entries: Mapping[str, Any]) -> None:
        """One line for metrics.jsonl and the other loggers."""
        self.run.log(entries)
        for logger in self.loggers:
            logger(entries)


def load_job(args: JobArgs, processes: Processes = ALONE) -> Job:
    """Tokenizer, data and configuration of a job that one process or several do; nothing is written yet.

    Raises InputError for whatever is missing or does not fit.
    """
    settings = args.settings
    started = datetime.fromtimestamp(processes.all_reduce_max(int(time.time())))
    folder = args.run or Path("runs") / f"{started:%Y%m%d-%H%M%S}-{args.preset}"
    tokenizer = load_tokenizer(settings.tokenizer, args.vocab_bpe)
    config = _config(args, tokenizer)
    corpus = load_corpus(settings.corpus, tokenizer, settings.validation_part)
    return Job(
        args=args,
        config=config,
        settings=settings,
        run=RunFolder(folder) if processes.first else FollowedRun(folder),
        processes=processes,
        tokenizer=tokenizer,
        corpus=corpus,
        train=Windows(corpus.train, config.n_ctx, config.n_vocab, settings.stride, name=f"{corpus.name} (training)"),
        validation=Windows(corpus.validation, config.n_ctx, config.n_vocab, name=f"{corpus.name} (validation)"),
        prompts=_prompts(settings, tokenizer, config),
    )


def start_run(job: Job, backend: str, device_info: Mapping[str, str], console: Console) -> Job:
    """Make or reopen the run folder, and say what runs; `device_info`: what the script says of its device.

    Raises InputError for a folder that holds another run.
    """
    args, run = job.args, job.run
    entries = run_config(args.preset, job.config, job.settings, job.corpus.sha256, args.init)
    if not job.processes.agree_on(json.dumps([entries, str(run.path), args.resume])):
        raise InputError("the processes of this run were given different options or data; start all of them alike")
    changed = []
    if args.resume:
        changed = run.update(entries, [f"train.{name}" for name in CHANGEABLE])
    else:
        run.create(entries)
    run.write("env.json", {"backend": backend, **device_info, **_environment()})
    job.processes.barrier()
    if not run.config_file.exists():
        raise InputError(f"{run.path}: this process does not see what the first one wrote; --run must be shared")

    summary = {
        **device_info,
        "model": f"{args.preset}: {weights.n_params(job.config):,} parameters, context {job.config.n_ctx}",
        "weights": f"from {args.init}" if args.init else f"initial, seed {job.settings.seed}",
        "corpus": f"{job.corpus.name}: {job.train.n_tokens:,} + {job.validation.n_tokens:,} tokens "
        f"({job.tokenizer.name})",
        "run": str(run.path),
        "changed": "; ".join(changed),
    }
    for name, text in summary.items():
        if text:
            console.print(f"{name:<10} {text}", highlight=False, soft_wrap=True)
    bigram = None
    if job.processes.first and job.train.n_tokens <= _MOST_BIGRAM_TOKENS:
        bigram = bigram_loss(job.corpus.train, job.corpus.validation, job.config.n_vocab)
        console.print(f"baseline   bigram model, validation loss {bigram:.4f}  perplexity {math.exp(bigram):.2f}")
    loggers = open_loggers(run, args.tensorboard, args.wandb) if job.processes.first else ()
    return dataclasses.replace(job, bigram=bigram, loggers=loggers)


def _config(args: JobArgs, tokenizer: Tokenizer) -> GPTConfig:
    changes: dict[str, Any] = {
        name: getattr(args, name) for name in ("n_ctx", "drop_rate") if getattr(args, name) is not None
    }
    if args.resume and args.run is not None:
        return dataclasses.replace(saved_job(RunFolder(args.run))[0], **changes)
    if args.init is None:
        return dataclasses.replace(recipe(args.preset).model, n_vocab=tokenizer.n_vocab, **changes)
    config = read_folder(args.init)[0]
    if changes.get("n_ctx", config.n_ctx) != config.n_ctx:
        raise InputError(f"--n-ctx: the model in --init {args.init} has a context of {config.n_ctx}")
    if tokenizer.n_vocab > config.n_vocab:
        sizes = f"{tokenizer.n_vocab} tokens, the model in --init {args.init} {config.n_vocab}"
        raise InputError(f"--tokenizer {tokenizer.name} has {sizes}; they do not belong together")
    return dataclasses.replace(config, **changes)


def _prompts(settings: TrainSettings, tokenizer: Tokenizer, config: GPTConfig) -> list[Sequence[int]]:
    texts, origin = [settings.sample_prompt], "--sample-prompt"
    if settings.eval_prompts is not None:
        origin = f"--eval-prompts {settings.eval_prompts}"
        try:
            texts = [line for line in Path(settings.eval_prompts).read_text(encoding="utf-8").splitlines() if line]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{origin} cannot be read ({error})") from None
        if not texts:
            raise InputError(f"{origin} holds no prompt; write one a line")
    prompts = [encode_prompt(tokenizer, text) for text in texts]
    for text, prompt in zip(texts, prompts, strict=True):
        if len(prompt) >= config.n_ctx:
            raise InputError(f"{origin}: {text!r} has {len(prompt)} tokens, the context is {config.n_ctx}; shorten it")
    return prompts


def _environment() -> dict[str, Any]:
    names = ("jax", "jaxlib", "flax", "optax", "torch", "numpy", "orbax-checkpoint", "tiktoken")
    versions = {}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):  # of the backend that is not installed
            versions[name] = version(name)
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "versions": versions,
    }
