"""What scripts/finetune.py does differently for each task."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from parity.data.tokenizer import Tokenizer
from parity.training.job_data import JobData
from parity.tuning import classify, instruct, prefer
from parity.tuning.args import TuneArgs
from parity.tuning.settings import TuneSettings


def next_token(package: str, tune: TuneSettings) -> Any:
    """Return the cross-entropy of the next token, which is None unless examples are packed."""
    return importlib.import_module(f"{package}.packing").PACKED if tune.packing else None


def preference(package: str, tune: TuneSettings) -> Any:
    """Return direct preference optimization."""
    return importlib.import_module(f"{package}.preference").preference(tune.dpo_beta, tune.dpo_logprobs)


class TaskParts(NamedTuple):
    """The parts of a task."""

    load: Callable[[TuneArgs, Tokenizer], JobData]
    """Reads the data; see parity.training.job.load_job."""
    objective: Callable[[str, TuneSettings], Any] = next_token
    """("gpt_torch" or "gpt_jax", settings) -> the Objective of the package's Trainer, or None for its default."""


TASKS = {
    "instruct": TaskParts(instruct.load_instructions),
    "classify": TaskParts(classify.load_labels),
    "prefer": TaskParts(prefer.load_preferences, preference),
}
