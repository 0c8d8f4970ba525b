"""The command-line options that both training scripts share."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro

from parity import cli
from parity.config import PRESETS, SIZES, GPTConfig
from parity.data.tokenizer import ByteTokenizer, GPT2Tokenizer, Tokenizer
from parity.errors import InputError
from parity.training.initial import own_tokenizer, weights_folder
from parity.training.mirror import fetch_config
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
            "weights, or a run folder or the address of a mirrored run, which stand for the newest intact checkpoint. "
            "They determine the shape of the model and, unless --tokenizer is given, the tokenizer. By default the "
            "weights are random."
        },
    )
    run: Path | None = None
    """Folder that the run is written to or resumed from; by default a new folder in runs/, named by time and preset."""
    resume: bool = False
    """Resume the run in --run from its newest intact checkpoint, whichever backend wrote it."""
    mirror: str | None = None
    """Address that the run is mirrored to while it trains: each checkpoint, its metrics and its samples, for example
    s3://BUCKET/NAME, gs://BUCKET/NAME or file:///FOLDER. With --resume, the run continues from the newest checkpoint
    in --run or at this address, so --run may be an empty folder of another machine. By default it is not mirrored."""
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

    @property
    def keeps_base(self) -> bool:
        """Whether a resumed run needs the weights of --init-from again, because its checkpoints have adapters only."""
        return False

    def more_entries(self) -> dict[str, Any]:
        """Return what the run's config.json records in addition to preset, model and settings."""
        return {}


Args = TypeVar("Args", bound=JobArgs)
Settings = TypeVar("Settings", bound=TrainSettings)


@dataclasses.dataclass(frozen=True)
class Decisive:
    """The options that determine the defaults of the others; None if they are not given."""

    preset: str | None = None
    init_from: str | None = None
    run: Path | None = None
    resume: bool = False
    mirror: str | None = None
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
    given = cli.parse_known(Decisive, args)
    if given.resume and given.run is not None:
        run = resumed_run(given.run, given.mirror)
        if "tune" in run.config():
            raise InputError(f"--run {run.path} is a run of scripts/finetune.py; resume it with that script")
        saved = read_run(run)
        default = dataclasses.replace(cls(), **saved._asdict(), accumulate_is_default=False)
        parsed = cli.parse(cls, description, default, args)
        if parsed.settings.accumulate == "auto":
            settings = dataclasses.replace(parsed.settings, accumulate=saved.settings.accumulate)
            parsed = dataclasses.replace(parsed, settings=settings)
        return parsed
    preset = given.preset or ("small" if given.init_from is None else FINE_TUNING)
    model, settings = start_values(given, recipe(preset).model, recipe(preset).settings)
    default = dataclasses.replace(
        cls(),
        preset=preset,
        model=model,
        settings=settings,
        accumulate_is_default=given.accumulate is None,
    )
    parsed = check_new_run(cli.parse(cls, description, default, args))
    if preset == FINE_TUNING and parsed.init_from is None:
        raise InputError(f"--preset {FINE_TUNING} needs weights to start from; name them with --init-from")
    return parsed


def resumed_run(folder: Path, mirror: str | None) -> RunFolder:
    """Return the run that --resume continues, which now has a config.json if its mirror has one.

    Raises:
        InputError: If neither the folder nor the mirror holds a run.
    """
    run = RunFolder(folder)
    if mirror is not None:
        fetch_config(run, mirror)
    return run


def check_new_run(args: Args) -> Args:
    """Return the options; raises InputError if they resume no run, or the learning rate would rise to its final value.

    Called after `cli.parse`, which prints the help text: --help needs no valid combination of options.
    """
    if args.resume:
        raise InputError("--resume continues the run in --run; name its folder")
    settings = args.settings
    if settings.min_lr > settings.lr:
        raise InputError(f"--min-lr {settings.min_lr:g}: the learning rate cannot fall to it from --lr {settings.lr:g}")
    return args


def check_model(args: JobArgs, tokenizer: Tokenizer) -> None:
    """Raise InputError unless the model fits the weights of --init-from, the tokenizer and the samples."""
    config = args.model
    if args.init_from is not None and not args.resume:
        given = read_folder(weights_folder(args.init_from))[0].to_dict()
        for name, value in config.to_dict().items():
            if name not in ("drop_rate", "eos_id") and value != given[name]:
                option = f"--{name.replace('_', '-')}"
                raise InputError(f"{option}: the model in --init-from {args.init_from} has {name}={given[name]}")
        own = own_tokenizer(args.init_from)
        if own not in (None, tokenizer.name):
            raise InputError(
                f"--tokenizer {tokenizer.name}: the weights in --init-from {args.init_from} belong to the {own} "
                "tokenizer, whose ids have other meanings"
            )
    if tokenizer.n_vocab > config.n_vocab:
        origin = "--n-vocab" if args.init_from is None else f"--init-from {args.init_from}"
        raise InputError(
            f"{origin}: the model has {config.n_vocab} tokens, the {tokenizer.name} tokenizer {tokenizer.n_vocab}; "
            "they do not belong together"
        )
    top_k = args.settings.sample_top_k
    if top_k is not None and top_k > config.n_vocab:
        raise InputError(f"--sample-top-k {top_k}: the model has only {config.n_vocab} tokens")


def start_values(given: Decisive, model: GPTConfig, settings: Settings) -> tuple[GPTConfig, Settings]:
    """Return the model and the settings of a new run, before the options that do not decide about others.

    Args:
        given: The options that decide about others.
        model: The model of the preset; --init-from replaces it.
        settings: The settings of the preset.

    Raises:
        InputError: If the weights of --init-from do not exist.
    """
    if given.init_from is None:
        n_vocab = _N_VOCAB.get(given.tokenizer or settings.tokenizer, model.n_vocab)
        return dataclasses.replace(model, n_vocab=n_vocab), _derived(settings, given)
    model = read_folder(weights_folder(given.init_from))[0]
    if given.tokenizer is None:
        by_size: Literal["bytes", "gpt2"] = "gpt2" if model.n_vocab >= GPT2Tokenizer.n_vocab else "bytes"
        settings = dataclasses.replace(settings, tokenizer=own_tokenizer(given.init_from) or by_size)
    return model, _derived(settings, given)


def _derived(settings: Settings, given: Decisive) -> Settings:
    """Adapt settings that are not given to those that are.

    The final learning rate keeps its ratio to a peak that is lower than the preset's. The warm-up is at most a tenth
    of a run whose number of steps is given.
    """
    if given.lr is not None and given.min_lr is None and 0 < given.lr < settings.lr:
        settings = dataclasses.replace(settings, min_lr=given.lr * settings.min_lr / settings.lr)
    if given.steps is not None and given.warmup is None:
        settings = dataclasses.replace(settings, warmup=min(settings.warmup, max(1, given.steps // 10)))
    return settings
