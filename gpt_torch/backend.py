"""gpt_torch as parity/backend.py asks for it."""

import numpy as np
import torch

from gpt_torch.model import GPTModel
from gpt_torch.pretrained import load_weights
from gpt_torch.train import calc_loss
from parity import weights as table
from parity.backend import Weights
from parity.config import GPTConfig


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
