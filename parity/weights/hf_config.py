"""config.json of Hugging Face's transformers, to and from GPTConfig.

The keys are those of transformers' GPT2Config, and two of our own: qkv_bias and weights_format. transformers keeps
keys that it does not know, and ignores them.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from parity.config import LAYER_NORM_EPS, NOTEBOOK_NAMES, GPTConfig, as_config
from parity.errors import InputError, printable

# The sizes: {key of config.json: (field of GPTConfig, the name that transformers accepts for the key as well)}.
_SIZES = {
    "vocab_size": ("n_vocab", None),
    "n_positions": ("n_ctx", "max_position_embeddings"),
    "n_embd": ("n_embd", "hidden_size"),
    "n_head": ("n_head", "num_attention_heads"),
    "n_layer": ("n_layer", "num_hidden_layers"),
}
_DROPOUTS = ("attn_pdrop", "embd_pdrop", "resid_pdrop")
_DEFAULT_DROPOUT = 0.1  # transformers' value for a dropout that config.json does not state
# Keys that change the function that a model computes, and the values that mean GPT-2's; the first is transformers'
# default. The five names of the activation are one function. reorder_and_upcast_attn is absent because it only
# changes the order of the operations.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh", "gelu_accurate"),
    "layer_norm_epsilon": (LAYER_NORM_EPS,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False, None),
    "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
    "quantization_config": (None, {}),
    "auto_map": (None, {}),
}
_WRITTEN = ("model_type", "activation_function", "layer_norm_epsilon", "scale_attn_weights")


def config_to_dict(config: GPTConfig, eos_id: int | None = None) -> dict[str, Any]:
    """Return the entries of config.json of transformers' GPT2LMHeadModel for a configuration.

    Args:
        config: The configuration.
        eos_id: Id of the tokenizer's end-of-text token; see `end_of_text_id`.
    """
    return {
        "architectures": ["GPT2LMHeadModel"],
        **{key: _REQUIRED[key][0] for key in _WRITTEN},
        "scale_attn_by_inverse_layer_idx": False,
        **{key: getattr(config, field) for key, (field, _) in _SIZES.items()},
        "n_inner": None,
        **dict.fromkeys(_DROPOUTS, config.drop_rate),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), end_of_text_id(config, eos_id)),
        "tie_word_embeddings": config.tied_head,
        "qkv_bias": config.qkv_bias,
    }


def end_of_text_id(config: GPTConfig, of_tokenizer: int | None = None) -> int | None:
    """Return the end-of-text id to write for a model.

    That is the one that its own files state (`config.eos_id`), otherwise the tokenizer's (`of_tokenizer`), otherwise
    that of the tokenizer that the vocabulary's size suggests; None, which ends no text, if it suggests none.
    """
    if config.eos_id is not None:
        return config.eos_id
    return _usual_end_of_text_id(config.n_vocab) if of_tokenizer is None else of_tokenizer


def _usual_end_of_text_id(n_vocab: int) -> int | None:
    """50256 for GPT-2's vocabulary and for larger ones, which are GPT-2's with padding or added tokens; 256 for the 257
    tokens of the bytes tokenizer; and None for any other."""
    return 50256 if n_vocab >= 50257 else 256 if n_vocab == 257 else None


def _stated_end_of_text_id(entries: Mapping[str, Any], n_vocab: Any) -> int | None:
    """The id of a config.json, if it is not the usual one, nor the last id, which version 0.1.0 always wrote."""
    id = entries.get("eos_token_id")
    written_by_us = "weights_format" in entries and id == n_vocab - 1
    is_id = type(id) is int and 0 <= id < n_vocab and not written_by_us and id != _usual_end_of_text_id(n_vocab)
    return id if is_id else None


def config_from_dict(entries: Mapping[str, Any], origin: str) -> GPTConfig:
    """Return the configuration that the entries of a config.json describe.

    Args:
        entries: The entries of config.json: transformers' keys, or those of the notebook's configuration.
        origin: Path of the file, for messages.

    Raises:
        InputError: If an entry is missing, out of range, or describes a model that computes another function.
    """
    try:
        if NOTEBOOK_NAMES.keys() - {"vocab_size"} & entries.keys() and "n_embd" not in entries:
            return as_config(entries)
        for key, values in _REQUIRED.items():
            if key in entries and entries[key] not in values:
                raise InputError(f"{key} is {_shown(entries[key])}, which is not supported; GPT-2 has {values[0]!r}")
        sizes = {field: _size(entries, key, other) for key, (field, other) in _SIZES.items()}
        n_inner = entries.get("n_inner")
        if n_inner is not None and n_inner != 4 * sizes["n_embd"]:
            raise InputError(f"n_inner is {_shown(n_inner)}, which is not supported; GPT-2 has 4 * n_embd")
        config = GPTConfig(
            **sizes,
            drop_rate=_dropout(entries),
            qkv_bias=entries.get("qkv_bias", True),
            tied_head=entries.get("tie_word_embeddings", True),
        )
        return dataclasses.replace(config, eos_id=_stated_end_of_text_id(entries, config.n_vocab))
    except InputError as error:
        raise InputError(f"{origin}: {_with_keys(str(error))}") from None


def _size(entries: Mapping[str, Any], key: str, other: str | None) -> Any:
    values = [entries[name] for name in (key, other) if name is not None and name in entries]
    if not values:
        raise InputError(f"{key} is missing; is this the config.json of a GPT-2?")
    if len(values) == 2 and values[0] != values[1]:
        raise InputError(f"{key} is {_shown(values[0])}, but {other} is {_shown(values[1])}; they mean the same")
    return values[0]


def _dropout(entries: Mapping[str, Any]) -> Any:
    rates = {key: entries.get(key, _DEFAULT_DROPOUT) for key in _DROPOUTS}
    for key, rate in rates.items():
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
            raise InputError(f"{key} must be a number in [0, 1), got {_shown(rate)}")
    if len(set(rates.values())) > 1:
        raise InputError(
            f"{', '.join(f'{key} is {rate}' for key, rate in rates.items())}, which is not supported: a model has one "
            "dropout rate; set all three to the one to train with (it does not matter for generating text)"
        )
    return rates["resid_pdrop"]


def _shown(value: Any) -> str:
    return printable(repr(value), 80)


def _with_keys(message: str) -> str:
    """A message of GPTConfig with the keys of config.json in place of its fields."""
    names = {field: key for key, (field, _) in _SIZES.items()} | {"tied_head": "tie_word_embeddings"}
    pattern = rf"\b({'|'.join(names)})\b"
    return re.sub(pattern, lambda match: names[match[0]], message.removeprefix("config: "))
