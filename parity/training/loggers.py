"""Optional loggers besides metrics.jsonl: TensorBoard and Weights & Biases."""

from collections.abc import Callable, Mapping
from typing import Any

from parity.errors import InputError, install_extras
from parity.storage.paths import is_offline
from parity.training.runs import RunFolder

Logger = Callable[[Mapping[str, Any]], None]
"""A function that takes one line of metrics.jsonl."""


def open_loggers(run: RunFolder, tensorboard: bool, wandb: bool) -> list[Logger]:
    """Return the loggers of a run.

    Args:
        run: Folder of the run.
        tensorboard: Whether to log to TensorBoard.
        wandb: Whether to log to Weights & Biases.

    Raises:
        InputError: If a package is missing; the message names the extra to install.
    """
    return [make(run) for make, enabled in ((_tensorboard, tensorboard), (_wandb, wandb)) if enabled]


def _tensorboard(run: RunFolder) -> Logger:
    """Write event files into the subfolder tensorboard/ of the run."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise InputError(f"--tensorboard needs a package: {install_extras('tensorboard')}") from None
    writer = SummaryWriter(str(run.path / "tensorboard"))

    def log(entries: Mapping[str, Any]) -> None:
        for name, value in _numbers(entries).items():
            writer.add_scalar(name, value, entries["step"])
        if "validation_loss" in entries:
            writer.flush()

    return log


def _wandb(run: RunFolder) -> Logger:
    """Log a run of wandb, kept in the subfolder wandb/; offline if GPT_PARITY_OFFLINE or WANDB_MODE says so."""
    try:
        import wandb
    except ImportError:
        raise InputError(f"--wandb needs a package: {install_extras('wandb')}") from None
    mode = {"mode": "offline"} if is_offline() else {}
    session = wandb.init(project="gpt-parity", name=run.path.name, dir=str(run.path), config=run.config(), **mode)

    def log(entries: Mapping[str, Any]) -> None:
        # The step is logged as a value, because a step can have two lines and a resumed run returns to earlier steps.
        session.log({"step": entries["step"], **_numbers(entries)})

    return log


def _numbers(entries: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in entries.items() if name != "step" and isinstance(value, int | float)}
