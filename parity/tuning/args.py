"""The command-line options of scripts/finetune.py."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import tyro

from parity import cli
from parity.config import SIZES
from parity.errors import InputError
from parity.storage.json import get_entry
from parity.training.args import Decisive, JobArgs, check_new_run, resumed_run, start_values
from parity.training.runs import RunFolder, SavedRun, read_run
from parity.tuning.embedded import EMBEDDED
from parity.tuning.settings import OFFLINE, RULES, TUNE_RECIPES, ExampleSettings, Task, TuneSettings, tune_recipe


@dataclasses.dataclass(frozen=True)
class TuneArgs(JobArgs):
    """Options of a run that tunes a model on examples."""

    preset: str = dataclasses.field(
        default=RULES,
        metadata={
            "help": f"Settings to start from: {', '.join(TUNE_RECIPES)}. The other options override single values. By "
            f"default the task's name; without data, {' or '.join(OFFLINE.values())}."
        },
    )
    init_from: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": f"Weights to start from: one of OpenAI's sizes ({', '.join(SIZES)}), a folder or file with "
            "weights, or a run folder, which stands for its newest intact checkpoint. By default the weights are "
            "random, which suits presets for a small model only."
        },
    )
    settings: tyro.conf.OmitArgPrefixes[ExampleSettings] = dataclasses.field(default_factory=ExampleSettings)
    tune: tyro.conf.OmitArgPrefixes[TuneSettings] = dataclasses.field(default_factory=TuneSettings)

    @property
    def keeps_base(self) -> bool:
        return self.tune.lora is not None

    def more_entries(self) -> dict[str, Any]:
        return {"tune": dataclasses.asdict(self.tune)}


Args = TypeVar("Args", bound=TuneArgs)


@dataclasses.dataclass(frozen=True)
class _Decisive(Decisive):
    data: str | None = None
    task: Task | None = None
    predict: Path | None = None


_OF_GENERATION = ("--sample-tokens", "--sample-temperature", "--sample-top-k")


class SavedTuning(NamedTuple):
    """What config.json records of a run that tuned a model."""

    run: SavedRun
    tune: TuneSettings


def read_tuning(run: RunFolder) -> SavedTuning:
    """Read config.json of a run; raises InputError if it is not one of scripts/finetune.py."""
    entries = run.config()
    if "tune" not in entries:
        raise InputError(f"{run.path} is not a run of scripts/finetune.py")
    saved = read_run(run)
    settings = ExampleSettings(**dataclasses.asdict(saved.settings))
    try:
        tune = TuneSettings(**get_entry(entries, "tune", dict, str(run.config_file)))
    except TypeError as error:
        raise InputError(f"{run.config_file} was not written by this version of the scripts ({error})") from None
    return SavedTuning(saved._replace(settings=settings), tune)


def saved_args(cls: type[Args], saved: SavedTuning) -> Args:
    """Return the options of a saved run, with the defaults of those that config.json does not record."""
    return dataclasses.replace(cls(), **saved.run._asdict(), tune=saved.tune, accumulate_is_default=False)


def _preset(task: Task, data: str | None) -> str:
    return OFFLINE[task] if data in (None, EMBEDDED) else task


def parse_tune_args(cls: type[Args], description: str | None, args: Sequence[str] | None = None) -> Args:
    """Read the command line of scripts/finetune.py.

    Options that are not given have the values of the preset or, on --resume and with --predict, those of the saved
    run; see parity.training.args.

    Args:
        cls: TuneArgs with the options of the script.
        description: First part of the help text.
        args: The command line without the program's name; `sys.argv[1:]` by default.

    Raises:
        InputError: If the preset, the run or the weights do not exist, a value is out of range, or options contradict
            each other.
    """
    given = cli.parse_known(_Decisive, args)
    if given.run is not None and (given.resume or given.predict is not None):
        saved = read_tuning(resumed_run(given.run, given.mirror))
        return cli.parse(cls, description, saved_args(cls, saved), args)
    preset = given.preset or _preset(given.task or "instruct", given.data)
    recipe = tune_recipe(preset)
    if given.task not in (None, recipe.tune.task):
        raise InputError(f"--preset {preset} is for the task {recipe.tune.task}, not for --task {given.task}")
    model, settings = start_values(given, recipe.model, recipe.settings)
    default = dataclasses.replace(
        cls(),
        preset=preset,
        model=model,
        settings=settings,
        tune=recipe.tune,
        accumulate_is_default=given.accumulate is None,
    )
    parsed = check_new_run(cli.parse(cls, description, default, args))
    if parsed.init_from is None and recipe.needs_weights:
        raise InputError(f"--preset {preset} needs weights to start from; name them with --init-from")
    if parsed.init_from is None and parsed.tune.lora is not None:
        raise InputError("--lora-rank: adapters need weights under them; name them with --init-from")
    if parsed.tune.task == "classify":
        changed = cli.changed_options(parsed.settings, default.settings)
        if generation := [option for option in changed if option in _OF_GENERATION]:
            raise InputError(f"{generation[0]} is for the task instruct or prefer; leave it out")
    return parsed
