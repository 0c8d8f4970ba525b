"""Loading and saving PyTorch models in the file formats of parity/weights."""

from pathlib import Path
from typing import Any

import torch

from gpt_torch.model import GPTModel
from gpt_torch.modes import unwrap
from gpt_torch.weights import export_weights, load_weights
from parity import notebook
from parity.data.tokenizer import Tokenizer
from parity.hub import save_model
from parity.storage.paths import user_path
from parity.weights import huggingface
from parity.weights.load import read_folder


def load_weights_into_gpt(model: GPTModel, params: dict[str, Any]) -> None:
    """Load OpenAI's weights into a model; the notebook's function of this name (LLMs-from-scratch, chapter 5).

    Args:
        model: A model of the same shape; it is changed in place. An untied head becomes a copy of the embedding.
        params: Weights nested as `parity.notebook.download_and_load_gpt2` returns them.

    Raises:
        InputError: For a model of another shape; the message lists the names that do not fit.
    """
    load_weights(model, notebook.as_huggingface(params, unwrap(model).config), origin="params")


def save_weights(model: GPTModel, folder: str | Path) -> None:
    """Write config.json and model.safetensors: what `save_pretrained` writes, without what a model hub adds."""
    huggingface.write(user_path(folder), unwrap(model).config, export_weights(model))


def save_pretrained(model: GPTModel, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Write a folder that `load_pretrained` of either backend and transformers can load, and that a model hub takes.

    It holds config.json, model.safetensors, generation_config.json, and a model card, README.md, unless there is one.

    Args:
        model: The model.
        folder: The folder, which is made if it does not exist. It must not hold a model in another format.
        tokenizer: The model's tokenizer, whose files are written as well. Its end-of-text id is written to config.json
            unless the files that the model was loaded from state another one.

    Raises:
        InputError: If the folder holds a model in another format, or the tokenizer does not fit the model.
        OSError: If the folder cannot be written.
    """
    save_model(user_path(folder), unwrap(model).config, export_weights(model), tokenizer)


def load_pretrained(
    path: str | Path, *, device: torch.device | str | None = None, adapter: str | Path | None = None, **options: Any
) -> GPTModel:
    """Load a model from files.

    Args:
        path: A folder with OpenAI's files, as published or as fine-tuning leaves them; a folder saved by transformers
            or `save_pretrained`, or one of our checkpoints; a file .safetensors or .pth with the weights of one of
            these or of the notebook's model, with a config.json beside it; or one of OpenAI's models by its size
            ("124M"), which is downloaded into the cache once. A folder with a LoRA adapter stands for the base that it
            names, with the adapter merged.
        device: Device of the parameters; by default the CPU.
        adapter: A folder with a LoRA adapter in the form of peft or of our checkpoints, which is merged into the
            weights in float32. lora.load_adapter() keeps it apart, for further training.
        options: Further arguments of `GPTModel`, for example `attention`.

    Returns:
        A `GPTModel` in eval mode, with parameters in torch's default dtype (float32).

    Raises:
        InputError: If files are missing or damaged, a download fails, the weights are not those of a GPT-2, or the
            adapter does not fit them.
    """
    config, arrays, format = read_folder(path, adapter)
    with torch.device("meta"):  # allocates nothing and draws no random weights, which would be overwritten
        model = GPTModel(config, seed=None, **options)
    # Not model.to_empty(), which imports much of torch's compiler for tensors on the meta device.
    memory = {name: torch.empty(tensor.shape, device=device or "cpu") for name, tensor in model.state_dict().items()}
    model.load_state_dict(memory, assign=True)
    load_weights(model, arrays, format, origin=str(path))
    return model
