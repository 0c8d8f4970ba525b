"""The command-line options that both training scripts share."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar

import tyro

from parity import cli
from parity.config import PRESETS, SIZES, GPTConfig
from parity.data.tokenizer import ByteTokenizer, GPT2Tokenizer
from parity.errors import InputError
from parity.training.initial import own_tokenizer, weights_folder
from parity.training.runs import RunFolder, read_run
from parity.training.settings import FINE_TUNING, RECIPES, TrainSettings, recipe
from parity.weights.load import read_folder

_N_VOCAB = {tokenizer.name: tokenizer.n_vocab for tokenizer in (ByteTokenizer, GPT2Tokenizer)}


@dataclasses.dataclass(frozen=True)
class JobArgs:
    """Options of a training run; the fields of its two groups are options like the others."""

    preset: str = dataclasses.field(
        default="small",
        metadata={
            "help": f"Model and settings to start from: {', '.join(RECIPES)}. The other options override single "
            f"values. With init-from, the default is {FINE_TUNING}."
        },
    )
    init_from: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": f"Weights to start from: one of OpenAI's sizes ({', '.join(SIZES)}), a folder or file with "
            "weights, or a run folder, which stands for its newest intact checkpoint. They determine the shape of the "
            "model and, unless --tokenizer is given, the tokenizer. By default the weights are random."
        },
    )
    run: Path | None = None
    """Folder that the run is written to or resumed from; by default a new folder in runs/, named by time and preset."""
    resume: bool = False
    """Resume the run in --run from its newest intact checkpoint, whichever backend wrote it."""
    vocab_bpe: Path | None = None
    """OpenAI's vocab.bpe for the gpt2 tokenizer; by default the one in the cache folder, where it is downloaded to."""
    tensorboard: bool = False
    """Also write TensorBoard event files into the run folder (requires the extra tensorboard)."""
    wandb: bool = False
    """Also log to Weights & Biases (requires the extra wandb; WANDB_MODE=offline keeps the data local)."""
    accumulate_is_default: tyro.conf.Suppress[tyro.conf.Fixed[bool]] = True
    """Whether the command line leaves --accumulate out. A resumed run never does: it keeps its number."""
    model: tyro.conf.OmitArgPrefixes[GPTConfig] = dataclasses.field(default_factory=lambda: PRESETS["small"])
    settings: tyro.conf.OmitArgPrefixes[TrainSettings] = dataclasses.field(default_factory=TrainSettings)


Args = TypeVar("Args", bound=JobArgs)


@dataclasses.dataclass(frozen=True)
class _Decisive:
    """The options that determine the defaults of the others; None if they are not given."""

    preset: str | None = None
    init_from: str | None = None
    run: Path | None = None
    resume: bool = False
    tokenizer: str | None = None
    steps: int | None = None
    lr: float | None = None
    min_lr: float | None = None
    warmup: int | None = None
    accumulate: str | None = None


def parse_job_args(cls: type[Args], description: str | None, args: Sequence[str] | None = None) -> Args:
    """Read the command line of a training script.

    Options that are not given have the values of the preset or, on --resume, those of the saved run. With other
    weights or another length of the run than the preset's, some of them are derived; see `_derived`.

    Args:
        cls: JobArgs with the options of the backend.
        description: First part of the help text.
        args: The command line without the program's name; `sys.argv[1:]` by default.

    Raises:
        InputError: If the preset, the run or the weights do not exist, a value is out of range, or options contradict
            each other.
    """
    given = cli.parse_known(_Decisive, args)
    if given.resume and given.run is None:
        raise InputError("--resume continues the run in --run; name its folder")
    if given.resume and given.run is not None:
        saved = read_run(RunFolder(given.run))
        default = dataclasses.replace(cls(), **saved._asdict(), accumulate_is_default=False)
        parsed = cli.parse(cls, description, default, args)
        if parsed.settings.accumulate == "auto":
            settings = dataclasses.replace(parsed.settings, accumulate=saved.settings.accumulate)
            parsed = dataclasses.replace(parsed, settings=settings)
        return parsed
    preset = given.preset or ("small" if given.init_from is None else FINE_TUNING)
    if preset == FINE_TUNING and given.init_from is None:
        raise InputError(f"--preset {FINE_TUNING} needs weights to start from; name them with --init-from")
    settings = recipe(preset).settings
    if given.init_from is None:
        model = recipe(preset).model
        n_vocab = _N_VOCAB.get(given.tokenizer or settings.tokenizer, model.n_vocab)
        model = dataclasses.replace(model, n_vocab=n_vocab)
    else:
        model = read_folder(weights_folder(given.init_from))[0]
        if given.tokenizer is None:
            by_size: Literal["bytes", "gpt2"] = "gpt2" if model.n_vocab >= GPT2Tokenizer.n_vocab else "bytes"
            settings = dataclasses.replace(settings, tokenizer=own_tokenizer(given.init_from) or by_size)
    default = dataclasses.replace(
        cls(),
        preset=preset,
        model=model,
        settings=_derived(settings, given),
        accumulate_is_default=given.accumulate is None,
    )
    parsed = cli.parse(cls, description, default, args)
    if parsed.settings.min_lr > parsed.settings.lr:
        raise InputError(
            f"--min-lr {parsed.settings.min_lr:g}: the learning rate cannot fall to it from --lr {parsed.settings.lr:g}"
        )
    return parsed


def _derived(settings: TrainSettings, given: _Decisive) -> TrainSettings:
    """Adapt settings that are not given to those that are.

    The final learning rate keeps its ratio to a peak that is lower than the preset's. The warm-up is at most a tenth
    of a run whose number of steps is given.
    """
    if given.lr is not None and given.min_lr is None and 0 < given.lr < settings.lr:
        settings = dataclasses.replace(settings, min_lr=given.lr * settings.min_lr / settings.lr)
    if given.steps is not None and given.warmup is None:
        settings = dataclasses.replace(settings, warmup=min(settings.warmup, max(1, given.steps // 10)))
    return settings
