"""gpt_torch as parity/backend.py asks for it."""

from collections.abc import Callable, Iterable

import numpy as np
import torch

from gpt_torch.model import GPTModel
from gpt_torch.pretrained import export_weights, load_weights
from gpt_torch.train import Trainer, calc_loss
from parity import weights as table
from parity.backend import Batch, Weights
from parity.config import GPTConfig
from parity.settings import TrainSettings


def build(config: GPTConfig, weights: Weights) -> GPTModel:
    """A model with these weights, in their dtype."""
    dtype = next(iter(weights.values())).dtype
    model = GPTModel(config, seed=None).to(torch.float64 if dtype == np.float64 else torch.float32)
    load_weights(model, weights)
    return model


def logits(config: GPTConfig, weights: Weights, tokens: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return build(config, weights)(torch.from_numpy(tokens)).numpy()


def loss_and_gradients(
    config: GPTConfig, weights: Weights, inputs: np.ndarray, targets: np.ndarray
) -> tuple[float, dict[str, np.ndarray]]:
    model = build(config, weights)
    loss = calc_loss(model, torch.from_numpy(inputs).long(), torch.from_numpy(targets).long())
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()))
    gradients = {name: gradient.numpy() for name, gradient in zip(parameters, found, strict=True)}
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
        found = trainer.train_step(*trainer.put(inputs, targets), lr, step)
        metrics.append((float(found["loss"]), float(found["grad_norm"])))
        if after is not None:
            after({name: array.copy() for name, array in export_weights(trainer.model).items()})
    return metrics
