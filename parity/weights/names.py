"""Names of tensors as training programs store them, converted to the names of the table.

Wrappers of PyTorch models add to every name (torch.compile `_orig_mod.`, DataParallel `module.`), programs that hold
a model as an attribute add the attribute's name, and models of the notebook have separate matrices for query, key and
value.
"""

import functools
import re
from collections.abc import Iterable, Mapping

import numpy as np

from parity.config import PRESETS, GPTConfig
from parity.errors import InputError, printable
from parity.weights.lazy import LazyTensor

# The mask, which is not a parameter: transformers' and the notebook's.
BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias|trf_blocks\.\d+\.att\.mask")
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_POSITION_EMBEDDINGS = ("wpe.weight", "pos_emb.weight", "pos_emb.embedding")
_NOTEBOOK_QUERY = re.compile(r"trf_blocks\.(\d+)\.att\.W_query\.(weight|bias)")
_NOTEBOOK_LAYERS = {".ff.layers.0.": ".ff.in_proj.", ".ff.layers.2.": ".ff.out_proj."}


def without_prefixes(stored: Iterable[str]) -> dict[str, str]:
    """Return {stored name: name without the names of wrappers and without a prefix that all have}.

    The prefix is what precedes the name of the position embedding. The output head may be outside a part of it: in
    transformers' files the prefix is `transformer.`, and the head is called `lm_head.weight`.
    """
    names = {name: ".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in stored}
    parents = {"transformer."}
    found = [re.fullmatch(rf"(.*\.)?{re.escape(end)}", name) for name in names.values() for end in _POSITION_EMBEDDINGS]
    prefixes = {match[1] or "" for match in found if match}
    if len(prefixes) == 1:
        parts = prefixes.pop().split(".")[:-1]
        parents |= {".".join(parts[:count]) + "." for count in range(1, len(parts) + 1)}
    longest_first = sorted(parents, key=len, reverse=True)
    return {
        name: cleaned.removeprefix(next((parent for parent in longest_first if cleaned.startswith(parent)), ""))
        for name, cleaned in names.items()
    }


def format_of(names: Iterable[str]) -> str:
    """Return the format that names without prefixes are in."""
    known = {"tok_emb.weight": "torch", "out_head.weight": "torch", "tok_emb.embedding": "flax"}
    return next((known[name] for name in names if name in known), "huggingface")


def join_query_key_value(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Return a notebook model's tensors in the torch format; those of any other model are returned as they are."""
    joined = {}
    for name, tensor in tensors.items():
        for theirs, ours in _NOTEBOOK_LAYERS.items():
            name = name.replace(theirs, ours)
        joined[name] = tensor
    for query in filter(_NOTEBOOK_QUERY.fullmatch, tensors):
        parts = [joined.get(query.replace("W_query", part)) for part in ("W_query", "W_key", "W_value")]
        if any(part is None or part.shape != joined[query].shape for part in parts):
            continue  # stays as it is, which `parity.weights.check` then reports
        present = [part for part in parts if part is not None]
        for part in present:
            del joined[part.name]
        name = query.replace("W_query", "qkv_proj")
        first, *other = present[0].shape
        read = functools.partial(_joined, present)
        joined[name] = LazyTensor(name, (3 * first, *other), present[0].dtype, read)
    return joined


def _joined(parts: list[LazyTensor]) -> np.ndarray:
    return np.concatenate([np.asarray(part) for part in parts])


def notebook_config(tensors: Mapping[str, LazyTensor], origin: str) -> GPTConfig:
    """Return the configuration of a notebook model's tensors in the torch format, from their shapes.

    The weights do not determine the number of heads. It is taken from OpenAI's model of the same width and depth.

    Raises:
        InputError: If there is no such model, or the tensors are not those of a notebook model.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    tokens, positions = shapes.get("tok_emb.weight", ()), shapes.get("pos_emb.weight", ())
    n_layer = len({name.split(".")[1] for name in shapes if name.startswith("trf_blocks.")})
    if len(tokens) != 2 or len(positions) != 2:
        raise InputError(f"{origin}: a config.json must be beside the weights; it says which model they belong to")
    sizes = {(preset.n_embd, preset.n_layer): preset.n_head for preset in PRESETS.values() if preset.n_vocab == 50257}
    n_head = sizes.get((tokens[1], n_layer))
    if n_head is None:
        raise InputError(
            f"{origin}: a model of width {tokens[1]} and {n_layer} layers may have any number of heads; write the "
            'model\'s configuration ({"vocab_size": ..., "n_heads": ..., ...}) to a config.json beside it'
        )
    return GPTConfig(
        n_vocab=tokens[0],
        n_ctx=positions[0],
        n_embd=tokens[1],
        n_head=n_head,
        n_layer=n_layer,
        qkv_bias="trf_blocks.0.att.qkv_proj.bias" in shapes,
        tied_head="out_head.weight" not in shapes,
    )


def refuse_nanogpt(tensors: Mapping[str, LazyTensor], origin: str) -> None:
    """Raise InputError for a model of nanoGPT, whose names are transformers' and whose matrices are [out, in]."""
    shape = tensors["h.0.mlp.c_fc.weight"].shape if "h.0.mlp.c_fc.weight" in tensors else ()
    if len(shape) == 2 and shape[0] == 4 * shape[1]:
        raise InputError(
            f"{origin}: this is a model of nanoGPT, which is not supported: it has the exact GELU, not GPT-2's tanh "
            "approximation. If you changed that, transpose the matrices of the layers and save them with a config.json"
        )


def unique(stored: Mapping[str, str], origin: str) -> dict[str, str]:
    """Return {name: stored name} of the parameters in {stored name: name}.

    Raises InputError for a name that is stored twice.
    """
    parameters: dict[str, str] = {}
    for stored_name, name in stored.items():
        if BUFFER.fullmatch(name):
            continue
        if name in parameters:
            raise InputError(f"{origin}: {printable(name, 120)} is stored a second time; save the model again")
        parameters[name] = stored_name
    return parameters
