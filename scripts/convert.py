"""Convert GPT-2 weights from any form to any other, through the one table.

    python scripts/convert.py 124M out/ --to huggingface
    python scripts/convert.py runs/NAME/checkpoints/000600 out/ --to openai --verify

OUT gets a manifest.json: name, shape, axes, dtype and sha256 of every tensor.
"""

import dataclasses
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from parity import weights
from parity.cli import parse
from parity.comparison.compare import compare
from parity.config import GPTConfig
from parity.errors import InputError, exit_with_message
from parity.weights import huggingface, openai
from parity.weights.load import read_folder

# The same two files of the tokenizer go by other names.
_VOCABULARY = {"openai": ("encoder.json", "vocab.bpe"), "huggingface": ("vocab.json", "merges.txt")}


@dataclasses.dataclass(frozen=True)
class Args:
    source: tyro.conf.Positional[str]
    """A size (124M, ...), OpenAI's folder, Hugging Face's folder, or a checkpoint of ours."""
    out: tyro.conf.Positional[Path]
    """A folder that does not exist yet, or is empty."""
    to: Literal["openai", "huggingface", "torch", "flax"] = "huggingface"
    """openai: a TensorFlow bundle; the others: safetensors in transformers' names, or in those of our models."""
    verify: bool = False
    """Load both afterwards and compare their logits."""


def main() -> None:
    args = parse(Args, __doc__)
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise InputError(f"{args.out} is not an empty folder; name another")
    config, arrays, source = read_folder(args.source)
    found = dict(weights.convert(arrays, source, "huggingface", config, np.float32, origin=args.source))
    if not config.qkv_bias and args.to in _VOCABULARY:  # these know no GPT-2 without it; 0 is the same function
        config = dataclasses.replace(config, qkv_bias=True)
        shapes = weights.shapes(config, "huggingface")
        found |= {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if name not in found}
    for name, array in found.items():
        weights.warn_if_not_finite(name, array, args.source)
    converted = dict(weights.convert(found, "huggingface", args.to, config))
    if args.to == "openai":
        openai.write(args.out, config, converted)
    else:
        huggingface.write(args.out, config, converted, args.to)
    write_manifest(args.out, args.to, config, converted)
    ours_and_theirs = (_VOCABULARY.get(name, _VOCABULARY["huggingface"]) for name in (source, args.to))
    for ours, theirs in zip(*ours_and_theirs, strict=True):
        if (file := Path(args.source) / ours).is_file():
            shutil.copyfile(file, args.out / theirs)
    sys.stdout.write(f"{args.out}: {len(converted)} tensors, {weights.n_params(config):,} parameters\n")
    if args.verify:
        verify(args.source, args.out)


def write_manifest(folder: Path, format: str, config: GPTConfig, converted: dict[str, np.ndarray]) -> None:
    axes = {name: row.pattern(format) for row in weights.rows(config) for name in row.names(format, config)}
    entries = {
        name: {
            "shape": list(array.shape),
            "axes": axes[name],
            "dtype": str(array.dtype),
            "sha256": hashlib.sha256(np.ascontiguousarray(array)).hexdigest(),
        }
        for name, array in sorted(converted.items())
    }
    (folder / "manifest.json").write_text(json.dumps({"format": format, "tensors": entries}, indent=1) + "\n")


def verify(source: str, out: Path) -> None:
    """Raise InputError unless both give the same logits in torch."""
    import torch

    import gpt_torch

    one, other = (gpt_torch.load_pretrained(path) for path in (source, out))
    tokens = np.random.default_rng(0).integers(0, one.config.n_vocab, (1, min(64, one.config.n_ctx)))
    with torch.inference_mode():
        a, b = (model(torch.from_numpy(tokens)).numpy() for model in (one, other))
    result = compare("logits", b, a, 1e-6)
    sys.stdout.write(f"verified: {result}\n")
    if not result.ok:
        raise InputError(f"{out} computes something else than {source}: {result}")


if __name__ == "__main__":
    with exit_with_message():
        main()
