"""A training job: what to train, on which text, into which run folder."""

import dataclasses
import functools
import json
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from parity import weights
from parity.config import GPTConfig
from parity.data.corpora import Corpus
from parity.data.tokenizer import Tokenizer, load_tokenizer
from parity.data.windows import Dataset
from parity.errors import InputError
from parity.storage import manifest as manifests
from parity.training import checkpoints
from parity.training.agreement import (
    environment,
    environment_changes,
    process_facts,
    sampled_sha256,
)
from parity.training.args import JobArgs, check_model
from parity.training.bigram import bigram_loss
from parity.training.job_data import JobData, load_windows
from parity.training.loggers import Logger, open_loggers
from parity.training.mirror import fetch_newest
from parity.training.processes import ALONE, Processes
from parity.training.run_config import run_config
from parity.training.runs import RunFolder
from parity.training.settings import CHANGEABLE_KEYS, TrainSettings
from parity.training.trainer import Trainer
from parity.training.uploads import Uploads

_MOST_BIGRAM_TOKENS = 50_000_000  # counting the bigrams of a larger corpus takes too much time and memory


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything about a run that does not depend on the framework; JobData explains what describes its data."""

    args: JobArgs
    config: GPTConfig
    settings: TrainSettings
    run: RunFolder
    processes: Processes
    tokenizer: Tokenizer
    corpus: Corpus
    train: Dataset
    validation: Dataset
    prompts: Sequence[Sequence[int]]
    corpus_samples: str | None
    """Hash of samples of the corpus's tokens, which shows files that were changed in place; None if it is verified."""
    sample_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    measure: Callable[[Trainer], Mapping[str, Any]] | None = None
    loss_unit: Literal["token", "pair", "text"] = "token"
    begin: Callable[..., None] | None = None
    sample: Callable[[Trainer], Sequence[str]] | None = None
    trainer_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    use: str = ""
    has_baseline: bool = True
    bigram: float | None = None
    """Validation loss of the baseline in nats per token, if it was computed."""
    loggers: Sequence[Logger] = ()
    uploads: Uploads | None = None
    """Of the first process of a run that is mirrored."""
    damaged: Sequence[int] = ()
    """The steps whose checkpoints at the address of the mirror were found damaged."""
    resumed_step: int | None = None
    """The step of the checkpoint that the run resumes from, once start_run() has verified it."""
    identity: checkpoints.RunIdentity = dataclasses.field(default_factory=checkpoints.RunIdentity)
    """What the run's checkpoints record about it."""

    @property
    def is_resuming(self) -> bool:
        """Whether there are checkpoints to resume from; a run that was killed before its first one starts anew."""
        return self.args.resume and bool(checkpoints.steps(self.run.checkpoints))

    @property
    def init_from(self) -> str | None:
        """The weights to start from; a resumed run has weights of its own, unless they are adapters."""
        return None if self.is_resuming and not self.args.keeps_base else self.args.init_from

    @property
    def micro_size(self) -> int:
        """Number of windows in a micro-batch."""
        return self.settings.micro_size

    def log(self, entries: Mapping[str, Any]) -> None:
        """Write one line to metrics.jsonl, and hand it to the other loggers."""
        self.run.log(entries)
        for logger in self.loggers:
            logger(entries)


def load_job(
    args: JobArgs,
    processes: Processes = ALONE,
    load_data: Callable[[JobArgs, Tokenizer], JobData] = load_windows,
) -> Job:
    """Load tokenizer, corpus and configuration of a run.

    Nothing is written yet, except that the run folder of a mirrored run that is resumed gets its newest checkpoint.

    Args:
        args: The options.
        processes: The processes that work on the run together.
        load_data: Reads the data that the options name.

    Raises:
        InputError: If something is missing, the options do not fit each other, or the processes of the run were given
            different options.
    """
    settings, config = args.settings, args.model
    damaged = None
    if args.resume and args.mirror is not None and args.run is not None:
        damaged = processes.first_does(functools.partial(fetch_newest, RunFolder(args.run), args.mirror))
    started = datetime.fromtimestamp(processes.all_reduce_max(int(time.time())))
    number = processes.all_reduce_max(secrets.randbits(16))  # for runs that start in the same second
    folder = args.run or Path("runs") / f"{started:%Y%m%d-%H%M%S}-{args.preset}-{number:04x}"
    tokenizer = load_tokenizer(settings.tokenizer, args.vocab_bpe)
    check_model(args, tokenizer)
    data = load_data(args, tokenizer)
    shards = [*data.corpus.train, *data.corpus.validation]
    job = Job(
        args=args,
        config=config,
        settings=settings,
        run=RunFolder(folder, writes=processes.first),
        processes=processes,
        damaged=damaged or (),
        tokenizer=tokenizer,
        corpus_samples=None if data.corpus.is_verified else sampled_sha256(shards),
        **data._asdict(),
    )
    if processes.count > 1 and (different := processes.differences(_facts(job))):
        raise InputError(
            f"the processes of this run have different {', '.join(different)}; start all of them with the same "
            "options, on the same data, with the same versions"
        )
    return job


# Options that may differ between the processes of a run.
_OWN_OPTIONS = ("process_id", "coordinator", "join_timeout", "vocab_bpe", "tensorboard", "wandb")


def _facts(job: Job) -> dict[str, str]:
    """Return what all processes of a run must have in common, with the names that a message uses."""
    options = {name: value for name, value in dataclasses.asdict(job.args).items() if name not in _OWN_OPTIONS}
    return {
        "options": json.dumps(options, default=str),
        "run folders": f"{job.run.path} with the steps {checkpoints.steps(job.run.checkpoints)}",
        "tokens in the corpus": f"{job.corpus.sha256} {job.corpus_samples}",
        **process_facts(job.init_from),
    }


def start_run(job: Job, backend: str, device_info: Mapping[str, str], console: Console) -> Job:
    """Create or reopen the run folder, and print a summary of the run.

    Args:
        job: The job.
        backend: "jax" or "torch".
        device_info: Facts about device, precision and program, for the summary and for env.json.
        console: Where to print.

    Returns:
        The job with its baseline and its loggers.

    Raises:
        InputError: If the folder or the mirror contains another run, or the folder is in use.
    """
    args, run = job.args, job.run
    entries = _entries(job)
    surroundings = {"backend": backend, **device_info, **environment()}
    before = run.environment() if args.resume else {}
    try:
        resumed_step, changed = _reopen(job, entries) if args.resume else (None, [])
        if not args.resume:
            run.create(entries)
        run.write("env.json", surroundings)
        job.processes.barrier()
        if not job.processes.agree_on(_state(run, resumed_step)):
            raise InputError(f"{run.path}: not all processes see what the first one wrote; --run must be shared")
        loggers = open_loggers(run, args.tensorboard, args.wandb) if job.processes.first else ()
        uploads, mirror = None, ""
        if args.mirror is not None and job.processes.first:
            uploads = Uploads(args.mirror, run, job.settings, console)
            mirror = uploads.claim(not args.resume, job.damaged)
    except BaseException:
        run.discard()
        raise

    n_train, n_validation = job.corpus.n_tokens
    summary = {
        **device_info,
        "model": f"{args.preset}: {weights.n_params(job.config):,} parameters, context {job.config.n_ctx}",
        "settings": _describe_schedule(job.settings),
        "weights": f"from {args.init_from}" if args.init_from else f"initial, seed {job.settings.seed}",
        "corpus": f"{job.corpus.name}: {n_train:,} + {n_validation:,} tokens ({job.tokenizer.name})",
        "run": str(run.path),
        "mirror": mirror,
        "changed": "; ".join([*changed, *environment_changes(before, surroundings)]),
    }
    for name, text in summary.items():
        if text:
            console.print(f"{name:<10} {text}", highlight=False, soft_wrap=True)
    bigram = None
    if job.has_baseline and job.processes.first and n_train <= _MOST_BIGRAM_TOKENS:
        bigram = bigram_loss(job.corpus.train, job.corpus.validation, job.config.n_vocab)
        console.print(f"baseline   bigram model, validation loss {bigram:.4f}  perplexity {math.exp(bigram):.2f}")
    return dataclasses.replace(
        job, bigram=bigram, loggers=loggers, uploads=uploads, resumed_step=resumed_step, identity=run.identity()
    )


def _entries(job: Job) -> dict[str, Any]:
    """Return the entries of the run's config.json."""
    args, corpus = job.args, job.corpus
    entries = run_config(args.preset, job.config, job.settings, corpus.sha256, args.init_from, job.corpus_samples)
    return {**entries, **args.more_entries()}


def _state(run: RunFolder, resumed_step: int | None) -> str:
    """Return what distinguishes a run folder and the checkpoint that is resumed; empty if there is none."""
    files = [run.config_file]
    if resumed_step is not None:
        files.append(checkpoints.step_folder(run.checkpoints, resumed_step) / manifests.MANIFEST)
    try:
        return "\n".join(file.read_text(encoding="utf-8") for file in files)
    except (OSError, UnicodeDecodeError):
        return ""


def _reopen(job: Job, entries: Mapping[str, Any]) -> tuple[int | None, list[str]]:
    """Lock a run folder that is resumed, and check that its files belong together, before any is changed.

    Returns:
        The step of the checkpoint to resume from, None for a run that was killed before its first one, and one
        description per changed setting.
    """
    run, first = job.run, job.processes.first
    run.config()
    run.lock()

    def find_newest() -> int:
        if checkpoints.steps(run.checkpoints):
            return int(run.newest_intact().name)
        if run.metrics.last_step > 0:
            raise InputError(
                f"{run.path} has metrics up to step {run.metrics.last_step}, but no checkpoint; restore its folder "
                "checkpoints/, or start a new run with another --run"
            )
        return -1

    verified = job.processes.first_does(find_newest)  # reads all files of the checkpoint
    changed = run.update(entries, CHANGEABLE_KEYS)
    newest = job.processes.all_reduce_max(-1 if verified is None else verified)
    if first and newest >= 0:
        settings = job.settings
        checkpoints.remove_unfinished(run.checkpoints)
        checkpoints.set_aside_later(run.checkpoints, newest)
        checkpoints.retain(run.checkpoints, newest, settings.keep, settings.keep_every, run.metrics.best_step(newest))
    return (None if newest < 0 else newest), changed


def _describe_schedule(settings: TrainSettings) -> str:
    """Return the line of a run's summary with the settings that presets and --init-from decide."""
    text = (
        f"{settings.steps:,} steps of {settings.batch_size} windows; learning rate {settings.lr:g}, falling to "
        f"{settings.min_lr:g}, after {settings.warmup:,} warm-up steps"
    )
    if settings.warmup >= settings.steps:
        text += f"; the warm-up is not shorter than the run, so the learning rate never reaches {settings.lr:g}"
    return text


def describe_precision(settings: TrainSettings, attention: str) -> str:
    """Return the line of a run's summary that names dtypes and attention."""
    return f"computes in {settings.dtype}, parameters {settings.param_dtype}; attention {attention}"
