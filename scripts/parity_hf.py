"""Hugging Face's GPT2LMHeadModel for scripts/check_parity.py: how another implementation joins the comparison.

Each function is one of parity/backend.py's; what is missing is left out of the report.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import transformers

from parity import taps
from parity.comparison.protocol import FULL, Compute, Weights
from parity.config import IGNORE_INDEX, GPTConfig
from parity.weights import huggingface


def build(config: GPTConfig, weights: Weights, compute: Compute = FULL) -> transformers.GPT2LMHeadModel:
    entries = {k: v for k, v in huggingface.config_to_dict(config).items() if not k.endswith("pdrop")}
    theirs = transformers.GPT2Config(**entries, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, attn_implementation="eager")
    model = transformers.GPT2LMHeadModel(theirs).eval()
    state = {n if n.startswith("lm_head") else f"transformer.{n}": torch.tensor(w) for n, w in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing  # tied
    return model.to(getattr(torch, compute.of(weights)))


def logits(config: GPTConfig, weights: Weights, tokens: np.ndarray, compute: Compute = FULL) -> np.ndarray:
    with torch.inference_mode():
        return to_numpy(build(config, weights, compute)(torch.from_numpy(tokens).long()).logits)


def activations(
    config: GPTConfig,
    weights: Weights,
    tokens: np.ndarray,
    names: Iterable[str] | None = None,
    compute: Compute = FULL,
) -> dict[str, np.ndarray]:
    """By forward hooks on the modules; scores before the mask are not to be had from outside."""
    model = build(config, weights, compute)
    found: dict[str, Any] = {}

    def note(module: torch.nn.Module, name: str, of: str) -> None:
        def hook(_: Any, inputs: Any, output: Any) -> None:
            found[name] = inputs[0] if of == "input" else output[0] if isinstance(output, tuple) else output

        module.register_forward_hook(hook)

    note(model.transformer.drop, "embed", "output")
    for number, block in enumerate(model.transformer.h):
        at = f"blocks.{number}."
        for module, name, of in (
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
            note(module, at + name, of)
    note(model.transformer.ln_f, "ln_f", "output")
    with torch.inference_mode():
        output = model(torch.from_numpy(tokens).long(), output_attentions=True)
    found["logits"] = output.logits
    for number, pattern in enumerate(output.attentions):
        at = f"blocks.{number}."
        found[f"{at}attn.pattern"] = pattern
        heads = (config.n_head, config.head_width)
        for name, part in zip("qkv", found.pop(f"{at}qkv").chunk(3, dim=-1), strict=True):
            found[f"{at}attn.{name}"] = part.unflatten(-1, heads)
        found[f"{at}attn.z"] = found[f"{at}attn.z"].unflatten(-1, heads)
    return {name: to_numpy(found[name]) for name in taps.select(names, config) if name in found}


def cached_logits(
    config: GPTConfig, weights: Weights, tokens: np.ndarray, start: int, compute: Compute = FULL
) -> np.ndarray:
    model, ids, cache, found = build(config, weights, compute), torch.from_numpy(tokens).long(), None, []
    with torch.inference_mode():
        for end in range(start, ids.shape[1]):
            part = ids[:, : end + 1] if cache is None else ids[:, end : end + 1]
            output = model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits[:, -1])
    return to_numpy(torch.stack(found, dim=1))


def loss_and_gradients(
    config: GPTConfig, weights: Weights, inputs: np.ndarray, targets: np.ndarray, compute: Compute = FULL
) -> tuple[float, dict[str, np.ndarray]]:
    model = build(config, weights, compute)
    logits = model(torch.from_numpy(inputs).long()).logits.flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    wanted = torch.from_numpy(targets).long().flatten()
    loss = torch.nn.functional.cross_entropy(logits, wanted, ignore_index=IGNORE_INDEX)
    loss.backward()
    gradients = {name.removeprefix("transformer."): to_numpy(p.grad) for name, p in model.named_parameters()}
    return loss.item(), gradients


def to_numpy(x: torch.Tensor) -> np.ndarray:
    return (x.float() if x.dtype == torch.bfloat16 else x).detach().numpy()
