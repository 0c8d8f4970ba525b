"""Hugging Face's GPT2LMHeadModel in a parity report: a worked example of an implementation to compare with.

Each function is one of parity.comparison.protocol.Backend. The report leaves out the sections whose functions
are missing here.

For a folder with a config.json, `open_folder` builds the model from that file as transformers alone reads it, so that
the report also shows whatever this project's reading of the file overlooks.
"""

import functools
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers

from gpt_torch.devices import choose_device
from gpt_torch.weights import to_numpy
from parity import taps
from parity.comparison.protocol import DEFAULT_COMPUTE, Compute, Weights
from parity.config import IGNORE_INDEX, GPTConfig
from parity.weights import hf_config


def open_folder(folder: Path) -> Any:
    """Return this implementation for the model that a folder's own config.json describes."""
    functions = (logits, activations, cached_logits, loss_and_gradients)
    return SimpleNamespace(**{f.__name__: functools.partial(f, folder=folder) for f in functions})


def build(
    config: GPTConfig, weights: Weights, compute: Compute = DEFAULT_COMPUTE, folder: Path | None = None
) -> transformers.GPT2LMHeadModel:
    """Make transformers' model with these weights, without dropout and with the explicit attention."""
    if folder is None:
        entries = hf_config.config_to_dict(config)
    else:
        entries = transformers.GPT2Config.from_pretrained(folder, local_files_only=True).to_dict()
    entries |= {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "attn_implementation": "eager"}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**entries)).eval()
    state = {n if n.startswith("lm_head") else f"transformer.{n}": torch.tensor(w) for n, w in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing  # absent if the head is tied
    return model.to(choose_device(compute.device), getattr(torch, compute.dtype_for(weights)))


def to_device(ids: np.ndarray, compute: Compute) -> torch.Tensor:
    return torch.from_numpy(ids).long().to(choose_device(compute.device))


def logits(
    config: GPTConfig,
    weights: Weights,
    tokens: np.ndarray,
    compute: Compute = DEFAULT_COMPUTE,
    folder: Path | None = None,
) -> np.ndarray:
    with torch.inference_mode():
        return to_numpy(build(config, weights, compute, folder)(to_device(tokens, compute)).logits)


def activations(
    config: GPTConfig,
    weights: Weights,
    tokens: np.ndarray,
    names: Iterable[str] | None = None,
    compute: Compute = DEFAULT_COMPUTE,
    folder: Path | None = None,
) -> dict[str, np.ndarray]:
    """Read activations with forward hooks; attention scores before the mask cannot be reached from outside."""
    model: Any = build(config, weights, compute, folder)
    cache: dict[str, Any] = {}

    def record(module: torch.nn.Module, name: str, which: str) -> None:
        def hook(_: Any, inputs: Any, output: Any) -> None:
            cache[name] = inputs[0] if which == "input" else output[0] if isinstance(output, tuple) else output

        module.register_forward_hook(hook)

    record(model.transformer.drop, "embed", "output")
    for number, block in enumerate(model.transformer.h):
        for module, name, which in (
            (block.ln_1, "ln_1", "output"),
            (block.attn.c_attn, "qkv", "output"),
            (block.attn.c_proj, "attn.z", "input"),
            (block.attn, "attn.out", "output"),
            (block.ln_2, "resid_mid", "input"),
            (block.ln_2, "ln_2", "output"),
            (block.mlp.c_fc, "mlp.pre", "output"),
            (block.mlp.c_proj, "mlp.post", "input"),
            (block.mlp, "mlp.out", "output"),
            (block, "resid_post", "output"),
        ):
            record(module, f"blocks.{number}.{name}", which)
    record(model.transformer.ln_f, "ln_f", "output")
    with torch.inference_mode():
        output = model(to_device(tokens, compute), output_attentions=True)
    cache["logits"] = output.logits
    heads = (config.n_head, config.head_width)
    for number, pattern in enumerate(output.attentions):
        block = f"blocks.{number}"
        cache[f"{block}.attn.pattern"] = pattern
        for name, part in zip("qkv", cache.pop(f"{block}.qkv").chunk(3, dim=-1), strict=True):
            cache[f"{block}.attn.{name}"] = part.unflatten(-1, heads)
        cache[f"{block}.attn.z"] = cache[f"{block}.attn.z"].unflatten(-1, heads)
    return {name: to_numpy(cache[name]) for name in taps.select(names, config) if name in cache}


def cached_logits(
    config: GPTConfig,
    weights: Weights,
    tokens: np.ndarray,
    start: int,
    compute: Compute = DEFAULT_COMPUTE,
    folder: Path | None = None,
) -> np.ndarray:
    model, ids = build(config, weights, compute, folder), to_device(tokens, compute)
    cache, rows = None, []
    with torch.inference_mode():
        for end in range(start, ids.shape[1]):
            new = ids[:, : end + 1] if cache is None else ids[:, end : end + 1]
            output = model(new, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            rows.append(output.logits[:, -1])
    return to_numpy(torch.stack(rows, dim=1))


def loss_and_gradients(
    config: GPTConfig,
    weights: Weights,
    inputs: np.ndarray,
    targets: np.ndarray,
    compute: Compute = DEFAULT_COMPUTE,
    folder: Path | None = None,
) -> tuple[float, dict[str, np.ndarray]]:
    model: Any = build(config, weights, compute, folder)
    logits = model(to_device(inputs, compute)).logits.flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = torch.nn.functional.cross_entropy(logits, to_device(targets, compute).flatten(), ignore_index=IGNORE_INDEX)
    loss.backward()
    gradients = {name.removeprefix("transformer."): to_numpy(p.grad) for name, p in model.named_parameters()}
    return loss.item(), gradients
