"""Adapters in the files of peft: adapter_config.json and adapter_model.safetensors."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from parity.config import SIZES, GPTConfig
from parity.errors import InputError, printable
from parity.storage import manifest
from parity.storage.atomic import replace_text
from parity.storage.json import read_object
from parity.weights import huggingface
from parity.weights.adapters import LINEARS, PARTS, PREFIX, LoraConfig, adapted_linears, adapter_rows
from parity.weights.classifier import HEAD, refuse_classifier
from parity.weights.table import check

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
HUB_NAMES = dict(zip(SIZES, ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"), strict=True))
"""{size: the name of OpenAI's model on Hugging Face's hub}, which peft looks a base up by."""
_HEAD_PREFIX = PREFIX.removesuffix("transformer.")
_HUB_OWNER = "openai-community/"
# Keys that do not change the function of an adapter that exists.
_IRRELEVANT = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_version", "revision",
    "task_type", "runtime_config", "fan_in_fan_out", "megatron_core", "qalora_group_size",
}  # fmt: skip
_KNOWN = {"peft_type", "r", "lora_alpha", "target_modules", "use_rslora", "bias", "init_lora_weights"}
# Ways to initialize an adapter that leave the base as it is; others, such as pissa, change it.
_INITIALIZATIONS = (None, True, False, "gaussian", "orthogonal")
_TARGETS, _BASE_SHA256 = "targets", "base_sha256"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter with what its files say about its base."""

    lora: LoraConfig
    arrays: Mapping[str, Any]
    """{peft's name: array}; an array of a file is read when it is used."""
    base: str | None = None
    """The base: a size such as "124M", or a path."""
    base_sha256: str | None = None
    """digest.weights_sha256() of the base; None where it was not recorded, as by peft."""
    origin: str = "adapter"
    """Where the adapter comes from, for messages."""
    head: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """{name in the huggingface format: array} of the head of a classifier, which is trained with its adapter."""

    def check(self, config: GPTConfig) -> None:
        """Raise InputError unless the adapter fits a model."""
        shapes = {name: tuple(array.shape) for name, array in self.arrays.items()}
        check(shapes, config, "huggingface", self.origin, adapter_rows(self.lora))


def write(folder: Path, config: GPTConfig, adapter: Adapter) -> None:
    """Write adapter_config.json and adapter_model.safetensors.

    Args:
        folder: The folder, which is made if it does not exist.
        config: Configuration of the base.
        adapter: The adapter; `origin` is not written.

    Raises:
        InputError: If the adapter does not fit the configuration.
    """
    adapter.check(config)
    manifest.forget(folder)
    folder.mkdir(parents=True, exist_ok=True)
    base = _HUB_OWNER + HUB_NAMES[adapter.base] if adapter.base in SIZES else adapter.base
    entries = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if adapter.head else "CAUSAL_LM",
        "base_model_name_or_path": base,
        **_function_keys(adapter.lora),
        "lora_dropout": adapter.lora.dropout,
        "bias": "none",
        "fan_in_fan_out": True,  # transformers' matrices are [in, out]
        "inference_mode": True,
    }
    if adapter.head:
        entries["modules_to_save"] = [HEAD]
    # peft ignores the metadata. Without them, q and v adapted one by one read as one adapter of twice the rank.
    metadata = {"format": "pt", _TARGETS: ",".join(adapter.lora.targets)}
    if adapter.base_sha256 is not None:
        metadata[_BASE_SHA256] = adapter.base_sha256
    arrays = {name: np.asarray(array) for name, array in adapter.arrays.items()}
    arrays |= {_HEAD_PREFIX + name: np.asarray(array) for name, array in adapter.head.items()}
    huggingface.save_tensors(folder / WEIGHTS_FILE, arrays, metadata)
    replace_text(folder / CONFIG_FILE, json.dumps(entries, indent=2) + "\n")


def _function_keys(lora: LoraConfig) -> dict[str, Any]:
    """The keys of adapter_config.json that determine the function of an adapter."""
    linears = adapted_linears(lora)
    paths = {linear.path("huggingface").removeprefix("h.{}."): linear for linear in linears}
    rank = min(linear.rank for linear in linears)
    others = {path: linear.rank for path, linear in paths.items() if linear.rank != rank}
    return {
        "r": rank,
        "lora_alpha": _alpha(lora, rank),
        "target_modules": list(paths),
        "use_rslora": lora.rslora,
        "rank_pattern": others,
        "alpha_pattern": {path: _alpha(lora, other) for path, other in others.items()},
    }


def _alpha(lora: LoraConfig, rank: int) -> float:
    """The alpha with which an adapter of this rank has the factor lora.scale."""
    return lora.alpha * (rank / lora.rank) ** (0.5 if lora.rslora else 1)


def read(folder: Path, with_head: bool = False) -> Adapter:
    """Read an adapter that peft or either backend wrote.

    Args:
        folder: The folder with adapter_config.json and adapter_model.safetensors.
        with_head: Whether a classifier's adapter is wanted, and not a language model's.

    Raises:
        InputError: If a file is missing or damaged, or the configuration describes something that is not implemented;
            the message names the key.
    """
    if not with_head:
        refuse_classifier(folder)
    file = folder / CONFIG_FILE
    entries = read_object(file, hint=f"give a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    if not (folder / WEIGHTS_FILE).is_file():
        raise InputError(f"{folder / WEIGHTS_FILE} is missing; save the adapter as safetensors")
    stored, metadata = huggingface.read_tensors(folder / WEIGHTS_FILE)
    head: dict[str, Any] = {}
    if with_head:
        head = {n.removeprefix(_HEAD_PREFIX): a for n, a in stored.items() if n.startswith(f"{_HEAD_PREFIX}{HEAD}.")}
        if entries.pop("modules_to_save", None) != [HEAD]:
            raise InputError(f'{file}: modules_to_save must be ["{HEAD}"], the head of the classifier')
    tensors = {name: tensor for name, tensor in stored.items() if name.removeprefix(_HEAD_PREFIX) not in head}
    try:
        lora = _lora(entries, metadata, tensors)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    base = entries.get("base_model_name_or_path")
    sizes = {name: size for size, hub in HUB_NAMES.items() for name in (hub, _HUB_OWNER + hub)}
    base = sizes.get(base, base) if isinstance(base, str) and base else None
    return Adapter(lora, tensors, base, metadata.get(_BASE_SHA256), str(folder), head)


def _lora(entries: Mapping[str, Any], metadata: Mapping[str, str], tensors: Mapping[str, Any]) -> LoraConfig:
    """Return the options of an adapter; raises InputError with a message without the file's name."""
    if entries.get("peft_type") != "LORA":
        raise InputError(f"peft_type is {_shown(entries.get('peft_type'))}, which is not supported; LORA is")
    if entries.get("bias", "none") != "none":
        raise InputError(f"bias is {_shown(entries['bias'])}, which is not supported; only none is")
    initialization = entries.get("init_lora_weights")
    if not isinstance(initialization, str | bool | None) or initialization not in _INITIALIZATIONS:
        raise InputError(f"init_lora_weights is {_shown(initialization)}, which changes the base and is not supported")
    options = {
        "rank": entries.get("r", 8),
        "alpha": entries.get("lora_alpha", 8),
        "dropout": entries.get("lora_dropout", 0.0),
        "rslora": bool(entries.get("use_rslora", False)),
    }
    patterns: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}}
    if _TARGETS in metadata:  # of an adapter that this project wrote
        lora = _with_targets(options, tuple(metadata[_TARGETS].split(",")))
        written = _function_keys(lora)
        patterns = {key: written[key] for key in patterns}
        if entries.get("target_modules") != written["target_modules"]:
            raise InputError(
                f"target_modules is {_shown(entries.get('target_modules'))}, but {WEIGHTS_FILE} says that the targets "
                f"are {', '.join(lora.targets)}"
            )
    else:
        lora = LoraConfig(**options, targets=_targets(entries.get("target_modules"), tensors))
    for key, value in entries.items():
        if value and key not in _IRRELEVANT | _KNOWN and value != patterns.get(key):
            raise InputError(f"{key} is {_shown(value)}, which is not supported; only an adapter without it is")
    return lora


def _with_targets(options: dict[str, Any], targets: tuple[str, ...]) -> LoraConfig:
    """Undo what _function_keys() does to rank and alpha where only parts of one matrix are adapted."""
    n_parts = len(targets) if set(targets) <= set(PARTS) else 1
    rank, alpha = options["rank"], options["alpha"]
    if n_parts > 1 and type(rank) is int and rank % n_parts:
        raise InputError(f"r is {rank}, which is not divisible by the number of targets, {', '.join(targets)}")
    if n_parts > 1 and type(rank) is int and isinstance(alpha, int | float):
        options = {**options, "rank": rank // n_parts, "alpha": alpha / n_parts ** (0.5 if options["rslora"] else 1)}
    return LoraConfig(**options, targets=targets)


def _targets(modules: Any, tensors: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the targets that peft's target_modules stand for: ends of names, or a pattern for whole names."""
    if not isinstance(modules, str) and not (isinstance(modules, list) and all(isinstance(m, str) for m in modules)):
        raise InputError(f"target_modules is {_shown(modules)}; it must be a list of names or a pattern")
    layers = {int(match[1]) for name in tensors if (match := re.match(re.escape(PREFIX) + r"h\.(\d{1,4})\.", name))}
    names = {target: [f"transformer.{path.format(layer)}" for layer in layers] for target, path in LINEARS.items()}
    if modules == "all-linear":
        modules = list(LINEARS.values())
        modules = [path.removeprefix("h.{}.") for path in modules]

    def matches(name: str) -> bool:
        if isinstance(modules, str):
            return re.fullmatch(modules, name) is not None
        return any(name == module or name.endswith(f".{module}") for module in modules)

    adapted = {target: sum(map(matches, of_layers)) for target, of_layers in names.items()}
    known = [name for of_layers in names.values() for name in of_layers]
    strange = [] if isinstance(modules, str) else [
        module for module in modules if not any(name.endswith(f".{module}") or name == module for name in known)
    ]  # fmt: skip
    partial = [target for target, count in adapted.items() if 0 < count < len(layers)]
    if strange or partial or not any(adapted.values()):
        raise InputError(
            f"target_modules is {_shown(modules)}, which is not supported; an adapter may be on "
            f"{', '.join(path.removeprefix('h.{}.') for path in LINEARS.values())} of all layers"
        )
    return tuple(target for target, count in adapted.items() if count)


def _shown(value: Any) -> str:
    return printable(repr(value), 80)
