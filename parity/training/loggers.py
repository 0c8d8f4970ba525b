"""Where metrics go besides metrics.jsonl: TensorBoard and Weights & Biases, both optional."""

from collections.abc import Callable, Mapping
from typing import Any

from parity.errors import InputError
from parity.storage.download import is_offline
from parity.training.runs import RunFolder

Logger = Callable[[Mapping[str, Any]], None]
"""Takes one line of metrics.jsonl."""


def open_loggers(run: RunFolder, tensorboard: bool, wandb: bool) -> list[Logger]:
    """Loggers for a run; raises InputError, naming the extra to install, where a package is missing."""
    return [make(run) for make, wanted in ((_tensorboard, tensorboard), (_wandb, wandb)) if wanted]


def _tensorboard(run: RunFolder) -> Logger:
    """Event files in the run's folder tensorboard/."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise InputError("--tensorboard needs a package: pip install 'gpt-parity[tensorboard]'") from None
    writer = SummaryWriter(str(run.path / "tensorboard"))

    def log(entries: Mapping[str, Any]) -> None:
        for name, value in _numbers(entries).items():
            writer.add_scalar(name, value, entries["step"])
        if "validation_loss" in entries:
            writer.flush()

    return log


def _wandb(run: RunFolder) -> Logger:
    """A run in the folder wandb/; sent unless WANDB_MODE, or offline with GPT_PARITY_OFFLINE, says otherwise."""
    try:
        import wandb
    except ImportError:
        raise InputError("--wandb needs a package: pip install 'gpt-parity[wandb]'") from None
    mode = {"mode": "offline"} if is_offline() else {}
    session = wandb.init(project="gpt-parity", name=run.path.name, dir=str(run.path), config=run.config(), **mode)

    def log(entries: Mapping[str, Any]) -> None:
        # The step is a value of its own: one step has two lines, and a resumed run goes back.
        session.log({"step": entries["step"], **_numbers(entries)})

    return log


def _numbers(entries: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in entries.items() if name != "step" and isinstance(value, int | float)}
