"""gpt_torch as parity/backend.py asks for it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt_torch.activations import run_with_cache
from gpt_torch.generate import generate as generate_rows
from gpt_torch.loss import calc_loss
from gpt_torch.model import GPTModel
from gpt_torch.train import Trainer
from gpt_torch.weights import export_weights, load_weights
from parity import weights as table
from parity.comparison.protocol import FULL, Batch, Compute, Weights
from parity.config import GPTConfig
from parity.training.settings import TrainSettings


def build(config: GPTConfig, weights: Weights, compute: Compute = FULL) -> GPTModel:
    """A model with these weights; torch's products are full float32 unless `precision` is "default"."""
    device = "cuda" if compute.device == "gpu" else compute.device
    torch.backends.cuda.matmul.allow_tf32 = compute.precision == "default"
    model = GPTModel(config, seed=None).to(device, getattr(torch, compute.of(weights)))
    load_weights(model, weights)
    return model


def logits(config: GPTConfig, weights: Weights, tokens: np.ndarray, compute: Compute = FULL) -> np.ndarray:
    with torch.inference_mode():
        return to_numpy(build(config, weights, compute)(to_device(tokens, compute)))


def activations(
    config: GPTConfig,
    weights: Weights,
    tokens: np.ndarray,
    names: Iterable[str] | None = None,
    compute: Compute = FULL,
) -> dict[str, np.ndarray]:
    with torch.inference_mode():
        _, cache = run_with_cache(build(config, weights, compute), to_device(tokens, compute), names)
        return {name: to_numpy(array) for name, array in cache.items()}


def cached_logits(
    config: GPTConfig, weights: Weights, tokens: np.ndarray, start: int, compute: Compute = FULL
) -> np.ndarray:
    with torch.inference_mode():
        model, ids = build(config, weights, compute), to_device(tokens, compute)
        cache, first = model.new_cache(*ids.shape), ids.new_zeros(len(ids))
        ends = range(start, ids.shape[1])
        found = [model.decode(ids[:, (end if end > start else 0) : end + 1], cache, end if end > start else 0, first)
                 for end in ends]  # fmt: skip
        return to_numpy(torch.stack(found, dim=1))


def generate(
    config: GPTConfig, weights: Weights, prompts: Sequence[Sequence[int]], compute: Compute, **options: Any
) -> list[list[int]]:
    return generate_rows(build(config, weights, compute), prompts, **options)


def loss_and_gradients(
    config: GPTConfig, weights: Weights, inputs: np.ndarray, targets: np.ndarray, compute: Compute = FULL
) -> tuple[float, dict[str, np.ndarray]]:
    model = build(config, weights, compute)
    loss = calc_loss(model, to_device(inputs, compute), to_device(targets, compute))
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()))
    gradients = {name: to_numpy(gradient) for name, gradient in zip(parameters, found, strict=True)}
    return loss.item(), dict(table.convert(gradients, "torch", "huggingface", config))


def train(
    config: GPTConfig,
    weights: Weights,
    settings: TrainSettings,
    batches: Iterable[Batch],
    after: Callable[[dict[str, np.ndarray]], None] | None = None,
) -> list[tuple[float, float]]:
    trainer = Trainer(config, settings)
    load_weights(trainer.model, weights)
    metrics = []
    for step, (inputs, targets, lr) in enumerate(batches):
        found = trainer.train_step(*trainer.to_device(inputs, targets), lr, step)
        metrics.append((float(found["loss"]), float(found["grad_norm"])))
        if after is not None:
            after({name: array.copy() for name, array in export_weights(trainer.model).items()})
    return metrics


def to_device(ids: np.ndarray, compute: Compute) -> Tensor:
    return torch.from_numpy(ids).long().to("cuda" if compute.device == "gpu" else compute.device)


def to_numpy(x: Tensor) -> np.ndarray:
    """bfloat16, which NumPy has not, as float32."""
    return (x.float() if x.dtype == torch.bfloat16 else x).detach().cpu().numpy()
