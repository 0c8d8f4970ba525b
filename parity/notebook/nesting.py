"""OpenAI's weights in the notebook's nesting: dictionaries of dictionaries, and a list of layers."""

from pathlib import Path
from typing import Any

import numpy as np

from parity import weights
from parity.config import GPTConfig, as_tied


def download_and_load_gpt2(model_size: str, models_dir: str | Path) -> tuple[dict[str, int], dict[str, Any]]:
    """Return one of OpenAI's models, in the notebook's nesting.

    Args:
        model_size: A size of `parity.config.SIZES`, such as "124M".
        models_dir: The files are read from models_dir/model_size, and downloaded to it if they are missing.

    Returns:
        (settings, params). settings is the content of hparams.json. params has wte, wpe, the final norm's g and b, and
        blocks: one {attn, mlp, ln_1, ln_2} per layer. Matrices are float32 [in, out].

    Raises:
        InputError: For an unknown size, a failed download or damaged files.
    """
    # Imported here because they import an HTTP client and a progress bar, which `import gpt_torch` should not load.
    from parity.weights import openai
    from parity.weights.openai_files import download_model

    folder = download_model(model_size, Path(models_dir) / model_size)
    config, tensors = openai.read(folder)
    return openai.hparams(config), nest(config, tensors)


def nest(config: GPTConfig, tensors: dict[str, Any]) -> dict[str, Any]:
    """Return weights in the notebook's nesting.

    Args:
        config: Configuration of the model.
        tensors: {OpenAI's name: tensor}; matrices are [1, in, out].

    Returns:
        The params of `download_and_load_gpt2`.
    """
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
    """Return weights in the openai format; the inverse of `nest`.

    Args:
        params: Weights nested as `download_and_load_gpt2` returns them.

    Returns:
        {OpenAI's name: array} in the openai format.
    """
    flat = {f"model/{name}": params[name] for name in ("wte", "wpe") if name in params}
    flat |= {f"model/ln_f/{name}": params[name] for name in ("g", "b") if name in params}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}/{key}", inner)
        else:
            flat[prefix] = value[None] if prefix.endswith("/w") else value

    for layer, block in enumerate(params.get("blocks", [])):
        walk(f"model/h{layer}", block)
    return flat


def as_huggingface(params: dict[str, Any], config: GPTConfig) -> dict[str, np.ndarray]:
    """Return weights in the huggingface format.

    Args:
        params: Weights nested as `download_and_load_gpt2` returns them.
        config: Configuration of the model to load them into; an untied head becomes a copy of the embedding.

    Returns:
        {name: array} in the huggingface format.

    Raises:
        InputError: If the weights do not fit the configuration; the message lists the names.
    """
    arrays = dict(weights.convert(flatten(params), "openai", "huggingface", as_tied(config), origin="params"))
    if not config.tied_head:
        arrays["lm_head.weight"] = arrays["wte.weight"]
    return arrays
