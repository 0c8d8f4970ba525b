"""The notebook's training functions, under its names; gpt_jax/notebook.py has the same.

They train as simply as the notebook does: a constant learning rate and no gradient clipping. The full trainer is
scripts/train_torch.py.
"""

from typing import Any

import torch
from torch import Tensor

from gpt_torch.generate import generate_text_simple
from gpt_torch.loss import calc_loss
from gpt_torch.model import GPTModel
from gpt_torch.modes import eval_mode, unwrap
from parity import notebook
from parity.notebook import GPTDatasetV1, plot_losses, token_ids_to_text

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
    """Return batches of windows over a text (LLMs-from-scratch, chapter 2).

    Args:
        txt: The text.
        args: Further arguments of `parity.notebook.create_dataloader`, by position: batch_size, max_length, stride, ...
        options: The same by name.

    Returns:
        An iterable of pairs (inputs, targets), both int64 tensors [B, T].

    Raises:
        InputError: For a text that is shorter than one window, for sizes below 1, and if the default tokenizer's
            vocabulary is missing.
    """
    return notebook.create_dataloader(torch.from_numpy, txt, *args, **options)


def calc_loss_batch(input_batch: Tensor, target_batch: Tensor, model: GPTModel, device: Any = None) -> Tensor:
    """Return the mean cross-entropy of a batch (LLMs-from-scratch, chapter 5).

    Args:
        input_batch: Integer ids [B, T].
        target_batch: Integer ids [B, T]: the next token of each position, or -1 or -100 where none counts.
        model: A GPTModel, which runs with dropout if it is in training mode.
        device: Device of the model, to which the batch is copied; by default it stays where it is.

    Returns:
        The loss in nats per token, a scalar of dtype float32 (float64 if the parameters are), which has a gradient.

    Raises:
        InputError: For ids or targets outside the vocabulary, and for more tokens than the model's context.
    """
    return calc_loss(model, input_batch.to(device), target_batch.to(device))


def calc_loss_loader(
    data_loader: notebook.DataLoader, model: GPTModel, device: Any = None, num_batches: int | None = None
) -> float:
    """Return the mean of the losses of several batches (LLMs-from-scratch, chapter 5).

    Args:
        data_loader: The batches.
        model: A GPTModel.
        device: Device of the model.
        num_batches: Number of batches, from the first one; by default all.

    Returns:
        The mean over batches in nats per token; NaN for an empty loader.

    Raises:
        InputError: For ids or targets outside the vocabulary, and for more tokens than the model's context.
    """

    def loss_of_batch(inputs: Any, targets: Any) -> float:
        return float(calc_loss_batch(inputs, targets, model, device))

    return notebook.mean_loss(loss_of_batch, data_loader, num_batches)


def evaluate_model(
    model: GPTModel,
    train_loader: notebook.DataLoader,
    val_loader: notebook.DataLoader,
    device: Any = None,
    eval_iter: int | None = None,
) -> tuple[float, float]:
    """Return the losses on training and validation text, without dropout (LLMs-from-scratch, chapter 5).

    Args:
        model: A GPTModel.
        train_loader: Batches of the training text.
        val_loader: Batches of the validation text.
        device: Device of the model.
        eval_iter: Number of batches of each loader; by default all.

    Returns:
        (training loss, validation loss), in nats per token.

    Raises:
        InputError: For ids or targets outside the vocabulary, and for more tokens than the model's context.
    """
    with eval_mode(model), torch.no_grad():
        losses = [calc_loss_loader(loader, model, device, eval_iter) for loader in (train_loader, val_loader)]
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
    """Train a model in place, printing the losses and, after each epoch, a sample (LLMs-from-scratch, chapter 5).

    Args:
        model: The model; it is left in training mode.
        train_loader: Batches of the training text.
        val_loader: Batches of the validation text.
        optimizer: Optimizer of the model's parameters, such as torch.optim.AdamW.
        device: Device of the model.
        num_epochs: Number of passes over `train_loader`.
        eval_freq: Steps between evaluations.
        eval_iter: Batches of each loader per evaluation.
        start_context: Text that the samples continue.
        tokenizer: Tokenizer of the samples.

    Returns:
        (training losses, validation losses, tokens seen), one entry per evaluation; losses in nats per token.

    Raises:
        InputError: For ids or targets outside the vocabulary, more tokens than the model's context, and an `eval_freq`
            below 1.
    """

    def train_step(step: int, input_batch: Tensor, target_batch: Tensor) -> None:
        model.train()
        optimizer.zero_grad()
        calc_loss_batch(input_batch, target_batch, model, device).backward()
        optimizer.step()

    return notebook.train_loop(
        train_step,
        lambda: evaluate_model(model, train_loader, val_loader, device, eval_iter),
        lambda: generate_and_print_sample(model, tokenizer, device, start_context),
        train_loader,
        num_epochs,
        eval_freq,
    )


def generate_and_print_sample(model: GPTModel, tokenizer: Any, device: Any, start_context: str) -> None:
    """Print a text and 50 tokens that continue it, chosen greedily and without dropout, on one line.

    Args:
        model: A GPTModel.
        tokenizer: The tokenizer of the text.
        device: Device of the model.
        start_context: The text.

    Raises:
        InputError: For an empty text, and for ids outside the model's vocabulary.
    """
    ids = text_to_token_ids(start_context, tokenizer).to(device)
    ids = generate_text_simple(model, ids, max_new_tokens=50, context_size=unwrap(model).config.n_ctx)
    notebook.print_on_one_line(ids, tokenizer)


def text_to_token_ids(text: str, tokenizer: Any) -> Tensor:
    """Return the token ids of a text.

    Args:
        text: The text, in which `<|endoftext|>` is the special token.
        tokenizer: The tokenizer.

    Returns:
        Ids int64 [1, T].
    """
    return torch.from_numpy(notebook.encode_text(text, tokenizer))
