"""The options of a training run on the command line."""

import dataclasses
from pathlib import Path
from typing import TypeVar

import tyro

from parity import cli
from parity.errors import InputError
from parity.training.runs import RunFolder, saved_job
from parity.training.settings import TrainSettings, recipe


@dataclasses.dataclass(frozen=True)
class JobArgs:
    """Options that every training script has."""

    preset: str = "small"
    """What to train and how: small, tiny, notebook, shakespeare-char, shakespeare-char-cpu, 124M,
    124M-openwebtext, 124M-fineweb-edu, 355M, 774M or 1558M; the other options replace parts of it."""
    n_ctx: int | None = None
    """Another context length than the preset's."""
    drop_rate: float | None = None
    """Another dropout than the preset's."""
    init: str | None = None
    """Weights to start from, which also give the model's shape: 124M, ..., 1558M, or a folder."""
    run: Path | None = None
    """Run folder; by default a new one in runs/."""
    resume: bool = False
    """Continue the run in --run from its newest intact checkpoint, whichever backend wrote it."""
    vocab_bpe: Path | None = None
    """OpenAI's vocab.bpe, for the gpt2 tokenizer."""
    tensorboard: bool = False
    """Write event files into the run folder too (extra: tensorboard)."""
    wandb: bool = False
    """Log to Weights & Biases too (extra: wandb; WANDB_MODE=offline keeps it local)."""
    settings: tyro.conf.OmitArgPrefixes[TrainSettings] = dataclasses.field(default_factory=TrainSettings)


Args = TypeVar("Args", bound=JobArgs)


@dataclasses.dataclass(frozen=True)
class _First:
    """The options that decide the other ones' defaults."""

    preset: str = JobArgs.preset
    run: Path | None = None
    resume: bool = False


def parse_job_args(kind: type[Args], description: str | None) -> Args:
    """The flags over the preset's settings or, when resuming, over the run's own."""
    first = cli.parse_known(_First)
    if first.resume and first.run is None:
        raise InputError("--resume continues the run in --run; name its folder")
    if first.resume and first.run is not None:
        config, settings, saved = saved_job(RunFolder(first.run))
        default = dataclasses.replace(
            kind(),
            preset=saved["preset"],
            n_ctx=config.n_ctx,
            drop_rate=config.drop_rate,
            init=saved["init"],
            settings=settings,
        )
    else:
        default = dataclasses.replace(kind(), preset=first.preset, settings=recipe(first.preset).settings)
    return cli.parse(kind, description, default)
