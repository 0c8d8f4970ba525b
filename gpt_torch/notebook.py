"""The notebook's training functions, by its names; gpt_jax/notebook.py has the same.

They keep its simple loop: a constant learning rate, no clipping. scripts/train_torch.py is the trainer to use.
"""

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gpt_torch.generate import generate_text_simple
from gpt_torch.loss import calc_loss
from gpt_torch.model import GPTModel
from parity import notebook
from parity.notebook import GPTDatasetV1, plot_losses

__all__ = [
    "GPTDatasetV1",
    "calc_loss_batch",
    "calc_loss_loader",
    "create_dataloader_v1",
    "evaluate_model",
    "generate_and_print_sample",
    "plot_losses",
    "text_to_token_ids",
    "token_ids_to_text",
    "train_model_simple",
]


def create_dataloader_v1(txt: str, *args: Any, **options: Any) -> notebook.DataLoader:
    """Batches of shifted windows, int64 tensors [B, T]; the options are those of parity.notebook.create_dataloader."""
    return notebook.create_dataloader(torch.from_numpy, txt, *args, **options)


def calc_loss_batch(input_batch: Tensor, target_batch: Tensor, model: GPTModel, device: Any = None) -> Tensor:
    """Mean cross-entropy in nats over a batch [B, T]; a tensor that backward() can be called on."""
    return calc_loss(model, input_batch.to(device), target_batch.to(device))


def calc_loss_loader(
    data_loader: notebook.DataLoader, model: GPTModel, device: Any = None, num_batches: int | None = None
) -> float:
    """Mean of the losses of the first `num_batches` batches, or of all; NaN for an empty loader."""
    count = len(data_loader) if num_batches is None else min(num_batches, len(data_loader))
    losses = [calc_loss_batch(*batch, model, device).item() for batch in itertools.islice(data_loader, count)]
    return sum(losses) / count if count else float("nan")


def evaluate_model(
    model: GPTModel,
    train_loader: notebook.DataLoader,
    val_loader: notebook.DataLoader,
    device: Any = None,
    eval_iter: int | None = None,
) -> tuple[float, float]:
    """(training loss, validation loss) over `eval_iter` batches of each, without dropout."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        losses = [calc_loss_loader(loader, model, device, eval_iter) for loader in (train_loader, val_loader)]
    model.train(was_training)
    return losses[0], losses[1]


def train_model_simple(
    model: GPTModel,
    train_loader: notebook.DataLoader,
    val_loader: notebook.DataLoader,
    optimizer: torch.optim.Optimizer,
    device: Any,
    num_epochs: int,
    eval_freq: int,
    eval_iter: int,
    start_context: str,
    tokenizer: Any,
) -> tuple[list[float], list[float], list[int]]:
    """Train, evaluate every `eval_freq` steps, print a sample after each epoch.

    Returns (training losses, validation losses, tokens seen), one of each for an evaluation.
    """
    train_losses, val_losses, track_tokens_seen = [], [], []
    tokens_seen, step = 0, 0
    for epoch in range(num_epochs):
        model.train()
        for input_batch, target_batch in train_loader:
            optimizer.zero_grad()
            calc_loss_batch(input_batch, target_batch, model, device).backward()
            optimizer.step()
            tokens_seen += input_batch.numel()
            if step % eval_freq == 0:
                train_loss, val_loss = evaluate_model(model, train_loader, val_loader, device, eval_iter)
                train_losses.append(train_loss)
                val_losses.append(val_loss)
                track_tokens_seen.append(tokens_seen)
                print(f"Ep {epoch + 1} (Step {step:06d}): Train loss {train_loss:.3f}, Val loss {val_loss:.3f}")
            step += 1
        generate_and_print_sample(model, tokenizer, device, start_context)
    return train_losses, val_losses, track_tokens_seen


def generate_and_print_sample(model: GPTModel, tokenizer: Any, device: Any, start_context: str) -> None:
    """Print 50 greedy tokens after a text, on one line."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        ids = text_to_token_ids(start_context, tokenizer).to(device)
        ids = generate_text_simple(model, ids, max_new_tokens=50, context_size=model.config.n_ctx)
    print(token_ids_to_text(ids, tokenizer).replace("\n", " "))
    model.train(was_training)


def text_to_token_ids(text: str, tokenizer: Any) -> Tensor:
    """ids [1, T]"""
    return torch.tensor([tokenizer.encode(text, allowed_special={notebook.END_OF_TEXT})])


def token_ids_to_text(token_ids: Iterable, tokenizer: Any) -> str:
    """ids [1, T] -> text"""
    [row] = token_ids
    return tokenizer.decode(row.tolist())
