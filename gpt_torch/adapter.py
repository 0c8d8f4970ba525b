"""gpt_torch as a backend of comparisons: the functions of parity.comparison.protocol.Backend."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt_torch.activations import run_with_cache
from gpt_torch.devices import choose_device
from gpt_torch.generate import generate as generate_rows
from gpt_torch.loss import calc_loss
from gpt_torch.model import GPTModel
from gpt_torch.modes import eval_mode
from gpt_torch.train import Trainer
from gpt_torch.weights import export_weights, load_weights, to_numpy
from parity import taps
from parity.arrays import as_numpy
from parity.comparison.error_bounds import Rounding
from parity.comparison.protocol import DEFAULT_COMPUTE, Batch, Compute, Weights, train_steps
from parity.config import GPTConfig
from parity.training.settings import TrainSettings
from parity.weights import convert


def build(config: GPTConfig, weights: Weights, compute: Compute = DEFAULT_COMPUTE) -> GPTModel:
    """Make a model with these weights, in the dtype and on the device of `compute`."""
    model = GPTModel(config, seed=None).to(_device(compute), getattr(torch, compute.dtype_for(weights)))
    load_weights(model, weights)
    return model


@contextlib.contextmanager
def computing(compute: Compute) -> Iterator[None]:
    """Within this context, compute matrix products on a GPU in the precision of `compute`."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if compute.precision == "default" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def logits(config: GPTConfig, weights: Weights, tokens: np.ndarray, compute: Compute = DEFAULT_COMPUTE) -> np.ndarray:
    with computing(compute), torch.inference_mode():
        return to_numpy(build(config, weights, compute)(to_device(tokens, compute)))


def activations(
    config: GPTConfig,
    weights: Weights,
    tokens: np.ndarray,
    names: Iterable[str] | None = None,
    compute: Compute = DEFAULT_COMPUTE,
) -> dict[str, np.ndarray]:
    with computing(compute), torch.inference_mode():
        _, cache = run_with_cache(build(config, weights, compute), to_device(tokens, compute), names)
        return {name: to_numpy(activation) for name, activation in cache.items()}


def run_model(
    model: GPTModel, tokens: np.ndarray, names: Iterable[str] = (), patches: Mapping[str, Any] | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Run an existing model on tokens int [B, T], in full precision: run_with_cache from and to NumPy arrays.

    Results have at least float32.

    Returns:
        (logits [B, T, V], {name: activation}).
    """
    ids = torch.from_numpy(tokens).long().to(model.tok_emb.weight.device)
    with computing(DEFAULT_COMPUTE), torch.inference_mode(), eval_mode(model):
        logits, cache = run_with_cache(model, ids, names, patches)
        return as_numpy(logits), {name: as_numpy(activation) for name, activation in cache.items()}


def cached_logits(
    config: GPTConfig, weights: Weights, tokens: np.ndarray, start: int, compute: Compute = DEFAULT_COMPUTE
) -> np.ndarray:
    with computing(compute), torch.inference_mode():
        model, ids = build(config, weights, compute), to_device(tokens, compute)
        cache, pad_lengths = model.new_cache(*ids.shape), ids.new_zeros(len(ids))
        rows = [model.decode(ids[:, : start + 1], cache, 0, pad_lengths)]  # [B, V]
        for slot in range(start + 1, ids.shape[1]):
            rows.append(model.decode(ids[:, slot : slot + 1], cache, slot, pad_lengths))
        return to_numpy(torch.stack(rows, dim=1))


def generate(
    config: GPTConfig, weights: Weights, prompts: Sequence[Sequence[int]], compute: Compute, **options: Any
) -> list[list[int]]:
    with computing(compute):
        return generate_rows(build(config, weights, compute), prompts, **options)


def loss_and_gradients(
    config: GPTConfig,
    weights: Weights,
    inputs: np.ndarray,
    targets: np.ndarray,
    compute: Compute = DEFAULT_COMPUTE,
) -> tuple[float, dict[str, np.ndarray]]:
    with computing(compute):
        model = build(config, weights, compute)
        loss = calc_loss(model, to_device(inputs, compute), to_device(targets, compute))
        parameters = dict(model.named_parameters())
        gradients = torch.autograd.grad(loss, list(parameters.values()))
    by_name = {name: to_numpy(gradient) for name, gradient in zip(parameters, gradients, strict=True)}
    return loss.item(), dict(convert(by_name, "torch", "huggingface", config))


def train(
    config: GPTConfig,
    weights: Weights,
    settings: TrainSettings,
    batches: Iterable[Batch],
    after_step: Callable[[dict[str, np.ndarray]], None] | None = None,
) -> list[tuple[float, float]]:
    trainer = Trainer(config, settings)
    load_weights(trainer.model, weights)
    return train_steps(trainer, lambda: export_weights(trainer.model), batches, after_step)


@contextlib.contextmanager
def perturbed(config: GPTConfig, noise: Mapping[str, Rounding]) -> Iterator[None]:
    """Add rounding errors to activations, and to the gradients with respect to them, on the CPU.

    This is how parity.comparison.sections derives the error bounds of gradients and training.

    Args:
        config: Configuration of the model that runs in this context.
        noise: {activation name: the rounding errors to add}.
    """

    def patch(rounding: Rounding) -> Callable[[Tensor], Tensor]:
        def add_errors(x: Tensor) -> Tensor:
            values = x.detach().numpy()
            x = x + torch.from_numpy(rounding.forward(values) - values)
            if x.requires_grad:
                x.register_hook(lambda gradient: torch.from_numpy(rounding.backward(gradient.numpy())))
            return x

        return add_errors

    with taps.probe(config, (), {name: patch(rounding) for name, rounding in noise.items()}):
        yield


def to_device(ids: np.ndarray, compute: Compute) -> Tensor:
    """Token ids as int64 on the device of `compute`."""
    return torch.from_numpy(ids).long().to(_device(compute))


def _device(compute: Compute) -> torch.device:
    return choose_device(compute.device)
