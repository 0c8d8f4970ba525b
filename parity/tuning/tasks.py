"""What scripts/finetune.py does differently for each task."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from parity.data.tokenizer import Tokenizer
from parity.training.job_data import JobData
from parity.tuning import instruct, prefer
from parity.tuning.args import TuneArgs
from parity.tuning.settings import TuneSettings


def next_token(backend: str, tune: TuneSettings) -> None:
    """Return the default objective of the trainers."""


def preference(backend: str, tune: TuneSettings) -> Any:
    """Return direct preference optimization, of the backend "torch" or "jax"."""
    return importlib.import_module(f"gpt_{backend}.preference").preference(tune.dpo_beta, tune.dpo_logprobs)


class TaskParts(NamedTuple):
    """The parts of a task."""

    load: Callable[[TuneArgs, Tokenizer], JobData]
    """Reads the data; see parity.training.job.load_job."""
    objective: Callable[[str, TuneSettings], Any] = next_token
    """("torch" or "jax", settings) -> the Objective of the trainer, or None for its default."""


TASKS = {
    "instruct": TaskParts(instruct.load_instructions),
    "prefer": TaskParts(prefer.load_preferences, preference),
}
