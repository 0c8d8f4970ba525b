"""The command-line options that both training scripts share."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import tyro

from parity import cli
from parity.config import PRESETS, GPTConfig
from parity.data.tokenizer import ByteTokenizer, GPT2Tokenizer
from parity.errors import InputError
from parity.training.initial import weights_folder
from parity.training.runs import RunFolder, read_run
from parity.training.settings import RECIPES, TrainSettings, recipe
from parity.weights.load import read_folder
from parity.weights.openai_files import SIZES

_N_VOCAB = {tokenizer.name: tokenizer.n_vocab for tokenizer in (ByteTokenizer, GPT2Tokenizer)}


@dataclasses.dataclass(frozen=True)
class JobArgs:
    """Options of a training run; the fields of its two groups are options like the others."""

    preset: str = dataclasses.field(
        default="small",
        metadata={
            "help": f"Model and settings to start from: {', '.join(RECIPES)}. The other options override single values."
        },
    )
    init_from: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": f"Weights to start from: one of OpenAI's sizes ({', '.join(SIZES)}), a folder or file with "
            "weights, or a run folder, which stands for its newest intact checkpoint. They determine the shape of the "
            "model, but not the tokenizer: pass --tokenizer gpt2 for OpenAI's. By default the weights are random."
        },
    )
    run: Path | None = None
    """Folder that the run is written to or resumed from; by default a new folder in runs/, named by time and preset."""
    resume: bool = False
    """Resume the run in --run from its newest intact checkpoint, whichever backend wrote it."""
    vocab_bpe: Path | None = None
    """OpenAI's vocab.bpe for the gpt2 tokenizer; by default the one in the cache folder or of a downloaded model."""
    tensorboard: bool = False
    """Also write TensorBoard event files into the run folder (requires the extra tensorboard)."""
    wandb: bool = False
    """Also log to Weights & Biases (requires the extra wandb; WANDB_MODE=offline keeps the data local)."""
    model: tyro.conf.OmitArgPrefixes[GPTConfig] = dataclasses.field(default_factory=lambda: PRESETS["small"])
    settings: tyro.conf.OmitArgPrefixes[TrainSettings] = dataclasses.field(default_factory=TrainSettings)


Args = TypeVar("Args", bound=JobArgs)


@dataclasses.dataclass(frozen=True)
class _Decisive:
    """The options that determine the defaults of the others."""

    preset: str = "small"
    init_from: str | None = None
    run: Path | None = None
    resume: bool = False
    tokenizer: str | None = None


def parse_job_args(cls: type[Args], description: str | None, args: Sequence[str] | None = None) -> Args:
    """Read the command line of a training script.

    Options that are not given have the values of the preset or, on --resume, those of the saved run.

    Args:
        cls: JobArgs with the options of the backend.
        description: First part of the help text.
        args: The command line without the program's name; `sys.argv[1:]` by default.

    Raises:
        InputError: If the preset, the run or the weights do not exist, or a value is out of range.
    """
    decisive = cli.parse_known(_Decisive, args)
    if decisive.resume and decisive.run is None:
        raise InputError("--resume continues the run in --run; name its folder")
    if decisive.resume and decisive.run is not None:
        saved = read_run(RunFolder(decisive.run))
        default = dataclasses.replace(cls(), **saved._asdict())
    else:
        settings = recipe(decisive.preset).settings
        model = _default_model(decisive, settings)
        default = dataclasses.replace(cls(), preset=decisive.preset, model=model, settings=settings)
    return cli.parse(cls, description, default, args)


def _default_model(decisive: _Decisive, settings: TrainSettings) -> GPTConfig:
    """Return the model of --init-from, or else that of the preset with the tokenizer's vocabulary."""
    if decisive.init_from is not None:
        return read_folder(weights_folder(decisive.init_from))[0]
    model = recipe(decisive.preset).model
    n_vocab = _N_VOCAB.get(decisive.tokenizer or settings.tokenizer, model.n_vocab)
    return dataclasses.replace(model, n_vocab=n_vocab)
