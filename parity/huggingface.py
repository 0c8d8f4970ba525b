"""Hugging Face's folder, config.json and model.safetensors, in and out: our own checkpoints too.

Keys: transformers' GPT2Config. One key of ours, qkv_bias, stands beside them, so that the notebook's
option survives; transformers keeps what it does not know without acting on it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from parity.config import GPTConfig
from parity.errors import InputError

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
_PREFIX = "transformer."
_REQUIRED = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "model_type": "gpt2"}


def config_to_dict(config: GPTConfig) -> dict[str, Any]:
    """config.json of transformers' GPT2LMHeadModel for this configuration."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        **_REQUIRED,
        "vocab_size": config.n_vocab,
        "n_positions": config.n_ctx,
        "n_embd": config.n_embd,
        "n_head": config.n_head,
        "n_layer": config.n_layer,
        "n_inner": None,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.drop_rate),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), config.n_vocab - 1),
        "tie_word_embeddings": config.tied_head,
        "qkv_bias": config.qkv_bias,
    }


def config_from_dict(entries: Mapping[str, Any], origin: str) -> GPTConfig:
    """The configuration that a config.json describes; raises InputError for another architecture."""
    for key, value in _REQUIRED.items():
        if entries.get(key, value) != value:
            raise InputError(f"{origin}: {key} is {entries[key]!r}; GPT-2 has {value!r}")
    try:
        return GPTConfig(
            n_vocab=entries["vocab_size"],
            n_ctx=entries["n_positions"],
            n_embd=entries["n_embd"],
            n_head=entries["n_head"],
            n_layer=entries["n_layer"],
            drop_rate=entries.get("resid_pdrop", 0.0),
            qkv_bias=entries.get("qkv_bias", True),
            tied_head=entries.get("tie_word_embeddings", True),
        )
    except KeyError as error:
        raise InputError(f"{origin}: {error} is missing; is this the config.json of a GPT-2?") from None


def write(folder: Path, config: GPTConfig, arrays: Mapping[str, np.ndarray]) -> None:
    """Write config.json and model.safetensors; `arrays` are in the huggingface format."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {
        name if name == "lm_head.weight" else _PREFIX + name: np.ascontiguousarray(a) for name, a in arrays.items()
    }
    save_file(named, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config_to_dict(config), indent=2) + "\n")


def read(path: str | Path) -> tuple[GPTConfig, dict[str, np.ndarray]]:
    """(configuration, arrays in the huggingface format) of a folder.

    Names may carry the `transformer.` prefix or not. Raises InputError that names the file.
    """
    folder = Path(path)
    config_path, weights_path = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    for needed in (config_path, weights_path):
        if not needed.is_file():
            raise InputError(f"{needed} is missing; give a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        entries = json.loads(config_path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{config_path} is not valid JSON ({error})") from None
    if not isinstance(entries, dict):
        raise InputError(f"{config_path} must hold a JSON object")
    config = config_from_dict(entries, str(config_path))
    try:
        stored = load_file(weights_path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{weights_path} cannot be read as safetensors ({error}); fetch or save it again") from None
    arrays = {name.removeprefix(_PREFIX): array for name, array in stored.items()}
    if len(arrays) < len(stored):
        raise InputError(f"{weights_path}: some tensors are there twice, with and without {_PREFIX!r}")
    head, embedding = arrays.get("lm_head.weight"), arrays.get("wte.weight")
    if config.tied_head and head is not None and embedding is not None and np.array_equal(head, embedding):
        del arrays["lm_head.weight"]  # a tied head stored twice
    return config, arrays
