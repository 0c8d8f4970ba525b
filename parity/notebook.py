"""The notebook's own functions around OpenAI's weights, so that its code runs unchanged."""

from pathlib import Path
from typing import Any

import numpy as np

from parity import openai_checkpoint
from parity.config import GPTConfig
from parity.download import download_model


def download_and_load_gpt2(model_size: str, models_dir: str | Path) -> tuple[dict[str, int], dict[str, Any]]:
    """(settings, params): hparams.json, and the weights nested as the notebook nests them.

    params has wte, wpe, the final norm's g and b, and blocks: a list of {attn, mlp, ln_1, ln_2}. Matrices
    are float32 [in, out]. Files are downloaded into models_dir/model_size where they are missing.
    """
    folder = download_model(model_size, Path(models_dir) / model_size)
    config, tensors = openai_checkpoint.read(folder)
    return openai_checkpoint.hparams(config), nest(config, tensors)


def nest(config: GPTConfig, tensors: dict[str, Any]) -> dict[str, Any]:
    """The notebook's nesting of {OpenAI's name: tensor}."""
    params: dict[str, Any] = {"blocks": [{} for _ in range(config.n_layer)]}
    for name, tensor in tensors.items():
        array = np.squeeze(np.asarray(tensor), axis=0) if name.endswith("/w") else np.asarray(tensor)
        first, *rest = name.removeprefix("model/").split("/")
        if first == "ln_f":
            place, rest = params, [rest[-1]]
        elif rest:
            place = params["blocks"][int(first.removeprefix("h"))]
        else:
            place, rest = params, [first]
        for part in rest[:-1]:
            place = place.setdefault(part, {})
        place[rest[-1]] = array
    return params


def flatten(params: dict[str, Any]) -> dict[str, np.ndarray]:
    """{OpenAI's name: array} of the notebook's nesting."""
    named = {f"model/{name}": params[name] for name in ("wte", "wpe") if name in params}
    named |= {f"model/ln_f/{name}": params[name] for name in ("g", "b") if name in params}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}/{key}", inner)
        else:
            named[prefix] = value[None] if prefix.endswith("/w") else value

    for layer, block in enumerate(params.get("blocks", [])):
        walk(f"model/h{layer}", block)
    return named
