"""A model with its tokenizer, of a training run or of weights: from Python, and from the options of a script."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

from parity.data.tokenizer import Tokenizer, load_tokenizer
from parity.data.tokenizer_files import own_vocabulary
from parity.errors import InputError
from parity.storage.remote import is_address
from parity.training.initial import weights_folder
from parity.training.remote_runs import choose_step, pull_checkpoint
from parity.training.runs import RunFolder, read_run
from parity.weights.load import base_folder, find_folder


class Loaded(NamedTuple):
    """What the options of `ModelArgs` name."""

    backend: Any
    """The package gpt_torch or gpt_jax."""
    device_info: str
    """The device that runs the model, and the version of the framework."""
    model: Any
    """A GPTModel of the backend."""
    tokenizer: Tokenizer
    folder: Path
    """Where the weights were read from."""


@dataclasses.dataclass(frozen=True)
class ModelArgs:
    """Options of the scripts that run a trained model."""

    run: str | None = None
    """Run folder of a training script, which has the model and its tokenizer, or the address to which --mirror copied
    it (its checkpoint is then copied into the cache folder). Give either --run or --model."""
    checkpoint: str = "newest"
    """Checkpoint of --run: newest (the newest intact one), best (lowest validation loss), or a step number."""
    model: str | None = None
    """Size of one of OpenAI's models, such as 124M (downloaded if necessary), a folder or file with weights, or the
    address of a mirrored run. The tokenizer is GPT-2's; a model of bytes needs --run."""
    adapter: Path | None = None
    """Folder with a LoRA adapter for the model, in the form of peft or of a checkpoint, or a run folder with adapters,
    which stands for its newest intact checkpoint. It is merged into the weights in float32. By default none."""
    backend: Literal["jax", "torch"] = "jax"
    """Framework that runs the model; both generate the same text."""
    device: Literal["auto", "cpu", "gpu", "cuda", "tpu", "mps"] = "auto"
    """Device that runs the model. auto takes an accelerator if the framework sees one; gpu and cuda are the same."""
    vocab_bpe: Path | None = None
    """OpenAI's vocab.bpe for the gpt2 tokenizer. By default the one in the model's folder, or else in the cache."""
    compilation_cache: bool = True
    """Keep the programs that JAX compiles in the cache folder, so that the next start need not compile them."""

    def load(self, classifier: bool = False) -> Loaded:
        """Load the model onto the device. Only the framework of the backend is imported.

        Args:
            classifier: Whether the model is a classifier, and not a language model.

        Raises:
            InputError: As load_model_and_tokenizer() does, and if the framework sees no such device.
        """
        backend = importlib.import_module(f"gpt_{self.backend}")
        devices = importlib.import_module(f"gpt_{self.backend}.devices")
        device = devices.choose_device(self.device)
        if self.backend == "jax":
            importlib.import_module("gpt_jax.compilation_cache").enable_compilation_cache(self.compilation_cache)
        loaded = load_model_and_tokenizer(
            backend, self.run, self.model, self.vocab_bpe, self.checkpoint, device, self.adapter, classifier
        )
        return Loaded(backend, devices.describe(device), *loaded)


def load_model_and_tokenizer(
    backend: Any,
    run: str | Path | None = None,
    model: str | Path | None = None,
    vocab_bpe: Path | None = None,
    checkpoint: str = "newest",
    device: Any = None,
    adapter: str | Path | None = None,
    classifier: bool = False,
) -> tuple[Any, Tokenizer, Path]:
    """Load a model from a training run, a size or a folder, and the tokenizer that it was trained with.

    Args:
        backend: The package gpt_torch or gpt_jax.
        run: Run folder of a training script, or the address to which it is mirrored. Give either `run` or `model`.
        model: Size of one of OpenAI's models ("124M"), which is downloaded into the cache once, a folder or file with
            weights, or the address of a mirrored run, which stands for its newest checkpoint.
        vocab_bpe: OpenAI's vocab.bpe, for the gpt2 tokenizer. By default the vocabulary in the model's folder, or that
            in the cache. A tokenizer in the model's folder must be GPT-2's in any case.
        checkpoint: Which checkpoint of the run: "newest" (the newest intact one), "best" (lowest validation loss), or
            the number of a step.
        device: A device of the backend. By default the backend's own default.
        adapter: A folder with a LoRA adapter, or a run folder with adapters, that is merged into the weights.
        classifier: Load a classifier, as a run of scripts/finetune.py leaves it, in place of a language model.

    Returns:
        (GPTModel of the backend, tokenizer, folder that the weights were read from).

    Raises:
        InputError: Unless exactly one of `run` and `model` is given, if a checkpoint of `model` or an adapter of a
            classifier is given, if files are missing or damaged, or if the tokenizer has more tokens than the model.
    """
    if (run is None) == (model is None):
        raise InputError("give either a run folder (--run), or a size or a folder with weights (--model)")
    if run is None and checkpoint != "newest":
        raise InputError(f"--checkpoint {checkpoint} chooses a checkpoint of --run; --model has only one")
    if classifier and adapter is not None:
        raise InputError(f"the adapter {adapter} is for a language model; a classifier contains its own adapter")
    if run is not None:
        run_folder, folder = _checkpoint(run, checkpoint)
        tokenizer = load_tokenizer(read_run(run_folder).settings.tokenizer, vocab_bpe)
    else:
        folder = pull_checkpoint(str(model))[1] if is_address(model) else find_folder(model or "")
        own = own_vocabulary(base_folder(folder))
        tokenizer = load_tokenizer("gpt2", vocab_bpe or own)
    if adapter is not None:
        adapter = weights_folder(adapter)
    if classifier:
        loaded = backend.load_classifier(folder, device=device)
    else:
        loaded = backend.load_pretrained(folder, device=device, adapter=adapter)
    if tokenizer.n_vocab > loaded.config.n_vocab:
        raise InputError(
            f"the {tokenizer.name} tokenizer has {tokenizer.n_vocab} tokens, but the model in {folder} has only "
            f"{loaded.config.n_vocab}; they do not belong together"
        )
    return loaded, tokenizer, folder


def _checkpoint(path: str | Path, which: str) -> tuple[RunFolder, Path]:
    """Return a run, here or at an address, and the folder of one of its checkpoints."""
    if is_address(path):
        return pull_checkpoint(str(path), which)
    run = RunFolder(Path(path))
    if "train" not in run.config():
        raise InputError(f"--run {path} is not a run of a training script; for a folder with weights use --model")
    return run, run.newest_intact() if which == "newest" else run.intact(choose_step(run, which))
