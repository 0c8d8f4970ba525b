"""Weights into and out of the torch model, through the table in parity/weights.py."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from parity import notebook, weights
from parity.config import as_tied
from parity.weights import huggingface
from parity.weights.load import read_folder

if TYPE_CHECKING:
    from gpt_torch.model import GPTModel
from gpt_torch.weights import export_weights, load_weights


def load_weights_into_gpt(model: "GPTModel", params: dict[str, Any]) -> None:
    """The notebook's function: OpenAI's weights, nested as download_and_load_gpt2 returns them, into a model.

    A head of its own becomes a copy of the embedding. Raises InputError for a model of another shape.
    """
    arrays = dict(weights.convert(notebook.flatten(params), "openai", "huggingface", as_tied(model.config)))
    if not model.config.tied_head:
        arrays["lm_head.weight"] = arrays["wte.weight"]
    load_weights(model, arrays, origin="params")


def save_pretrained(model: "GPTModel", folder: str | Path) -> None:
    """Write config.json and model.safetensors, which load_pretrained of either backend and transformers open."""
    huggingface.write(Path(folder), model.config, export_weights(model))


def load_pretrained(path: str | Path, **options: Any) -> "GPTModel":
    """The model in a folder, or one of OpenAI's by its size ("124M"); `options` go to GPTModel.

    A size is downloaded into the cache where it is not there yet. A folder holds OpenAI's original files,
    is one saved by transformers, or is one of our checkpoints.
    """
    from gpt_torch.model import GPTModel

    config, arrays, format = read_folder(path)
    with torch.device("meta"):  # so that torch does not draw weights that are overwritten
        model = GPTModel(config, seed=None, **options)
    model.to_empty(device="cpu")
    load_weights(model, arrays, format, origin=str(path))
    return model
