"""The loop of the notebook's training, and its picture."""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from parity.figures import new_figure
from parity.notebook.batches import DataLoader, check_positive


def mean_loss(
    calc_loss_batch: Callable[[Any, Any], float], data_loader: DataLoader, num_batches: int | None = None
) -> float:
    """Return the mean of the losses of several batches.

    Args:
        calc_loss_batch: (inputs, targets) -> the mean loss of a batch, in nats per token.
        data_loader: The batches.
        num_batches: Number of batches, from the first one; by default all.

    Returns:
        The mean over batches in nats per token; NaN for an empty loader.
    """
    count = len(data_loader) if num_batches is None else min(num_batches, len(data_loader))
    losses = [calc_loss_batch(*batch) for batch in itertools.islice(data_loader, count)]
    return sum(losses) / count if count else float("nan")


def train_loop(
    train_step: Callable[[int, Any, Any], None],
    evaluate: Callable[[], tuple[float, float]],
    print_sample: Callable[[], None],
    train_loader: DataLoader,
    num_epochs: int,
    eval_freq: int,
) -> tuple[list[float], list[float], list[int]]:
    """The loop of the notebook's `train_model_simple`, for both backends.

    Args:
        train_step: (step, inputs, targets) -> None; updates the model.
        evaluate: Returns (training loss, validation loss).
        print_sample: Called after each epoch.
        train_loader: Batches of the training text.
        num_epochs: Number of passes over `train_loader`.
        eval_freq: Steps between evaluations.

    Returns:
        (training losses, validation losses, tokens seen), one entry per evaluation; losses in nats per token.

    Raises:
        InputError: For an `eval_freq` below 1.
    """
    check_positive(eval_freq=eval_freq)
    train_losses, val_losses, track_tokens_seen = [], [], []
    tokens_seen, step = 0, 0
    for epoch in range(num_epochs):
        for input_batch, target_batch in train_loader:
            train_step(step, input_batch, target_batch)
            tokens_seen += math.prod(input_batch.shape)
            if step % eval_freq == 0:
                train_loss, val_loss = evaluate()
                train_losses.append(train_loss)
                val_losses.append(val_loss)
                track_tokens_seen.append(tokens_seen)
                print(f"Ep {epoch + 1} (Step {step:06d}): Train loss {train_loss:.3f}, Val loss {val_loss:.3f}")
            step += 1
        print_sample()
    return train_losses, val_losses, track_tokens_seen


def plot_losses(
    epochs_seen: Sequence[float],
    tokens_seen: Sequence[int],
    train_losses: Sequence[float],
    val_losses: Sequence[float],
    path: str | Path = "loss-plot.pdf",
) -> Path:
    """Plot both losses by epoch, with the number of tokens seen as a second axis above.

    Args:
        epochs_seen: Epochs at each evaluation.
        tokens_seen: Tokens at each evaluation.
        train_losses: Training losses, in nats per token.
        val_losses: Validation losses, in nats per token.
        path: File to write; its suffix selects the format.

    Returns:
        The path.
    """
    figure = new_figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(epochs_seen, train_losses, label="training loss")
    axes.plot(epochs_seen, val_losses, linestyle="-.", label="validation loss")
    axes.set(xlabel="epochs", ylabel="loss (nats per token)")
    axes.legend()
    above = axes.twiny()
    above.plot(tokens_seen, train_losses, alpha=0)  # invisible, but sets the range of the axis
    above.set_xlabel("tokens seen")
    figure.savefig(path)
    return Path(path)
