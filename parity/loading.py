"""Load the model and the tokenizer that the options --run and --model name."""

from pathlib import Path
from typing import Any

from parity.data.tokenizer import Tokenizer, load_tokenizer
from parity.data.tokenizer_files import own_vocabulary
from parity.errors import InputError
from parity.training.runs import RunFolder, read_run
from parity.weights.load import find_folder


def load_model_and_tokenizer(
    backend: Any,
    run: Path | None = None,
    model: str | None = None,
    vocab_bpe: Path | None = None,
    checkpoint: str = "newest",
    device: Any = None,
) -> tuple[Any, Tokenizer, Path]:
    """Load a model of a training run, or of a size or folder, and the tokenizer that it was trained with.

    Args:
        backend: The package gpt_torch or gpt_jax.
        run: Run folder of a training script. Give either `run` or `model`.
        model: OpenAI's model of a size ("124M"), or a folder with weights.
        vocab_bpe: OpenAI's vocab.bpe, for the gpt2 tokenizer. By default the vocabulary in the model's folder, or that
            in the cache. A tokenizer in the model's folder must be GPT-2's in any case.
        checkpoint: Which checkpoint of the run: "newest" (the newest intact one), "best" (lowest validation loss), or
            the number of a step.
        device: A device of the backend. By default the backend's own default.

    Returns:
        (GPTModel of the backend, tokenizer, folder that the weights were read from).

    Raises:
        InputError: Unless exactly one of `run` and `model` is given, and if files are missing or damaged or the
            tokenizer has more tokens than the model.
    """
    if (run is None) == (model is None):
        raise InputError("give either --run, a run folder, or --model, a size or a folder with weights")
    if run is not None:
        run_folder = RunFolder(run)
        config = run_folder.config()
        if "train" not in config:
            raise InputError(f"--run {run}: this is no run of a training script; for a folder with weights use --model")
        tokenizer = load_tokenizer(read_run(run_folder).settings.tokenizer, vocab_bpe)
        folder = _checkpoint(run_folder, checkpoint)
    else:
        folder = find_folder(model or "")
        own = own_vocabulary(folder)
        tokenizer = load_tokenizer("gpt2", vocab_bpe or own)
    loaded = backend.load_pretrained(folder, device=device)
    if tokenizer.n_vocab > loaded.config.n_vocab:
        raise InputError(
            f"the {tokenizer.name} tokenizer has {tokenizer.n_vocab} tokens, but the model in {folder} has only "
            f"{loaded.config.n_vocab}; they do not belong together"
        )
    return loaded, tokenizer, folder


def _checkpoint(run: RunFolder, which: str) -> Path:
    if which == "newest":
        return run.newest_intact()
    if which == "best" and (best := run.metrics.best_step()) is not None:
        return run.intact(best)
    if which.isascii() and which.isdecimal() and len(which) < 10:
        return run.intact(int(which))
    raise InputError(
        f"--checkpoint {which:.40}: give newest, best (for a run with evaluations), or the number of a step"
    )
