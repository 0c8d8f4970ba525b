"""Convert GPT-2 weights from any format to any other.

    python scripts/convert.py 124M out/ --to huggingface
    python scripts/convert.py runs/NAME/checkpoints/000600 out/ --to openai --verify
    python scripts/convert.py 124M out/ --adapter path/to/adapter       # merged, in any format
    python scripts/convert.py runs/NAME out/ --to peft                  # the adapter of a run, alone

Writes the weights, the tokenizer's files if SOURCE has them, and manifest.json with the name, shape, axes, dtype and
sha256 of every tensor. With --to huggingface, OUT is complete for a model hub: it also gets generation_config.json, a
model card, and the tokenizer's files of a run.
"""

import dataclasses
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from parity import weights
from parity.cli import parse
from parity.comparison.compare import compare
from parity.comparison.implementation import read_weights
from parity.config import SIZES, GPTConfig
from parity.data.tokenizer import Tokenizer, load_tokenizer
from parity.data.tokenizer_files import write_tokenizer
from parity.errors import InputError, exit_with_message, install_extras
from parity.hub import write_hub_files
from parity.storage.atomic import staged_folder
from parity.storage.json import read_object
from parity.storage.manifest import MANIFEST, Manifest, file_hashes
from parity.storage.manifest import write as write_hashes
from parity.storage.remote import is_address
from parity.training.initial import weights_folder
from parity.training.remote_runs import pull_checkpoint
from parity.training.runs import RunFolder
from parity.weights import classifier_files, huggingface, openai, peft_files
from parity.weights.adapters import n_adapter_params
from parity.weights.classifier import CLASSIFIER_FILE
from parity.weights.load import base_folder, holds_adapter, read_folder

# The tokenizer's two files have the same content in both formats, under different names.
_VOCABULARY = {"openai": ("encoder.json", "vocab.bpe"), "huggingface": ("vocab.json", "merges.txt")}
_TRANSFORMERS_ONLY = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@dataclasses.dataclass(frozen=True)
class Args:
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """What to convert: a size such as 124M, a run folder or the address to which a run is mirrored (its newest intact
    checkpoint), a folder with OpenAI's files, Hugging Face's files or one checkpoint, or a single file with weights."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder to write, which must not exist yet or be empty. It appears when it is complete."""
    to: Literal["openai", "huggingface", "torch", "flax", "peft"] = "huggingface"
    """Format to write. openai is a TensorFlow checkpoint, as OpenAI published it. The others are safetensors files:
    huggingface with transformers' names, torch and flax with those of gpt_torch's and gpt_jax's parameters. In these an
    adapter is merged into its base; peft is the adapter alone, in the files of that library."""
    adapter: Path | None = None
    """Folder with a LoRA adapter for SOURCE, in the form of peft or of a checkpoint, or a run folder with adapters. By
    default the one in SOURCE, if SOURCE holds an adapter: it names its base."""
    verify: bool = False
    """Before OUT appears, compare the logits of random tokens: those of OUT by gpt_torch with those of SOURCE. If
    SOURCE has Hugging Face's config.json and transformers is installed, it computes the latter, as that file says."""


def main() -> None:
    args = parse(Args, __doc__)
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise InputError(f"{args.out} is not an empty folder; give another one")
    source = weights_folder(args.source)
    if (source / CLASSIFIER_FILE).is_file():
        write_classifier(args, source)
        return
    adapter = None if args.adapter is None else weights_folder(args.adapter)
    config, stored, from_format = read_folder(source, adapter)
    if args.to == "peft":
        write_adapter(args, source, adapter, config)
        return
    arrays = dict(weights.convert(stored, from_format, "huggingface", config, np.float32, origin=args.source))
    if args.to in _VOCABULARY:
        config, arrays = add_bias(config, arrays)
    for name, array in arrays.items():
        weights.warn_if_not_finite(name, array, args.source)
    converted = dict(weights.convert(arrays, "huggingface", args.to, config))
    tokenizer = run_tokenizer(args.source)
    with staged_folder(args.out) as folder:
        if args.to == "openai":
            openai.write(folder, config, converted)
        else:
            huggingface.write(folder, config, converted, args.to, None if tokenizer is None else tokenizer.eos_id)
        copy_vocabulary(base_folder(source), from_format, folder, args.to)
        if args.to == "huggingface":
            write_hub_files(folder, config, tokenizer)
        write_manifest(folder, args.to, config, converted)
        if args.verify:
            verify(source, adapter, folder, args.out)
    sys.stdout.write(f"{args.out}: {len(converted)} tensors, {weights.n_params(config):,} parameters\n")


def write_adapter(args: Args, source: Path, adapter: Path | None, config: GPTConfig) -> None:
    """Write the adapter of SOURCE or of --adapter in the files of peft."""
    if adapter is None and not holds_adapter(source):
        raise InputError(f"--to peft: {source} holds no adapter; name a folder or a run that does, or give --adapter")
    stored = peft_files.read(source if adapter is None else adapter)
    if adapter is not None:
        stored = dataclasses.replace(stored, base=args.source if args.source in SIZES else str(source.resolve()))
    with staged_folder(args.out) as folder:
        peft_files.write(folder, config, stored)
        if args.verify:
            verify(source, adapter, folder, args.out)
    sys.stdout.write(f"{args.out}: an adapter of {n_adapter_params(config, stored.lora):,} parameters\n")


def write_classifier(args: Args, source: Path) -> None:
    """Write a classifier, with its adapter merged, as transformers' GPT2ForSequenceClassification.

    Raises InputError if that model cannot hold it.
    """
    if args.to != "huggingface" or args.adapter is not None or args.verify:
        raise InputError(f"{source} holds a classifier: only --to huggingface can, without --adapter and --verify")
    stored = classifier_files.read(source)
    classifier_files.refuse_for_transformers(stored.classifier, str(source))
    arrays = dict(weights.convert(stored.arrays, stored.format, "huggingface", stored.config, np.float32))
    config, arrays = add_bias(stored.config, arrays)
    tokenizer = run_tokenizer(args.source)
    with staged_folder(args.out) as folder:
        classifier_files.write(folder, config, {**arrays, **stored.head}, stored.classifier)
        if tokenizer is not None:
            write_tokenizer(folder, tokenizer, config.n_ctx)
        write_hashes(folder, Manifest(file_hashes(folder)))
    sys.stdout.write(f"{args.out}: a classifier with the labels {', '.join(stored.classifier.labels)}\n")


def add_bias(config: GPTConfig, arrays: dict[str, np.ndarray]) -> tuple[GPTConfig, dict[str, np.ndarray]]:
    """Return a model of the same function with a bias of query, key and value, which some formats always have."""
    if config.qkv_bias:
        return config, arrays
    added = {n: np.zeros(shape, np.float32) for n, shape in with_bias(config).items() if n not in arrays}
    return dataclasses.replace(config, qkv_bias=True), {**arrays, **added}


def with_bias(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors, with a bias of query, key and value."""
    return weights.shapes(dataclasses.replace(config, qkv_bias=True), "huggingface")


def write_manifest(folder: Path, format: str, config: GPTConfig, arrays: dict[str, np.ndarray]) -> None:
    """Write manifest.json: the sha256 of the files, what each tensor is, and the sha256 of its bytes."""
    axes = {name: row.pattern(format) for row in weights.rows(config) for name in row.names(format, config)}
    entries = {
        name: {
            "shape": list(array.shape),
            "axes": axes[name],
            "dtype": str(array.dtype),
            "sha256": hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).hexdigest(),
        }
        for name, array in sorted(arrays.items())
    }
    weights_file = f"{openai.PREFIX}.data-00000-of-00001" if format == "openai" else huggingface.WEIGHTS_FILE
    written = {"format": format, "files": file_hashes(folder), "weights": weights_file, "tensors": entries}
    (folder / MANIFEST).write_text(json.dumps(written, indent=1) + "\n")


def copy_vocabulary(source: Path, from_format: str, out: Path, to_format: str) -> None:
    """Copy the tokenizer's files, if the source has them, under the names that the target format gives them."""
    source = source if source.is_dir() else source.parent
    if from_format != "openai" and to_format != "openai":
        for name in _TRANSFORMERS_ONLY:
            if (source / name).is_file():
                shutil.copyfile(source / name, out / name)
    names = (_VOCABULARY.get(format, _VOCABULARY["huggingface"]) for format in (from_format, to_format))
    for from_name, to_name in zip(*names, strict=True):
        if (source / from_name).is_file():
            shutil.copyfile(source / from_name, out / to_name)


def run_tokenizer(source: str) -> Tokenizer | None:
    """The tokenizer of a run; None for other sources, and if GPT-2's vocabulary is not at hand."""
    run = pull_checkpoint(source)[0] if is_address(source) else RunFolder(Path(source))
    if not run.checkpoints.is_dir():
        return None
    try:
        return load_tokenizer(run.config()["train"]["tokenizer"])
    except InputError as error:
        sys.stderr.write(f"without the tokenizer's files: {error}\n")
        return None


def transformers_logits(source: Path, config: GPTConfig, tokens: np.ndarray) -> np.ndarray | None:
    """The logits of transformers' model for the source's own config.json; None without that file or transformers."""
    file = source / "config.json"
    if not file.is_file() or read_object(file).get("weights_format", "huggingface") != "huggingface":
        return None
    try:
        import parity_hf
    except ModuleNotFoundError:
        return None
    arrays = read_weights(str(source))[1]
    return parity_hf.logits(config, add_bias(config, arrays)[1], tokens, folder=source)


def verify(source: Path, adapter: Path | None, written: Path, out: Path) -> None:
    """Raise InputError unless the source and the folder that was written for `out` compute the same logits."""
    try:
        import torch

        import gpt_torch
    except ModuleNotFoundError as error:
        raise InputError(f"--verify needs {error.name}, which is not installed: {install_extras('torch')}") from None

    before, after = gpt_torch.load_pretrained(source, adapter=adapter), gpt_torch.load_pretrained(written)
    config = before.config
    tokens = np.random.default_rng(0).integers(0, config.n_vocab, (1, min(64, config.n_ctx)))
    with torch.inference_mode():
        logits_before, logits_after = (model(torch.from_numpy(tokens)).numpy() for model in (before, after))
    theirs = transformers_logits(source, config, tokens) if adapter is None else None
    result = compare(
        "logits", logits_after, logits_before if theirs is None else theirs, 1e-6 if theirs is None else 2e-5
    )
    sys.stdout.write(f"verified against {'gpt_torch' if theirs is None else 'transformers'}: {result}\n")
    if not result.ok:
        raise InputError(f"{out} does not compute the same function as {source}: {result}")


if __name__ == "__main__":
    with exit_with_message():
        main()
