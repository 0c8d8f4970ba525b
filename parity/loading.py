"""The model and tokenizer that a script is pointed at: a run of ours, or weights by size or folder."""

from pathlib import Path
from typing import Any

from parity.data.tokenizer import Tokenizer, load_tokenizer
from parity.errors import InputError
from parity.training import checkpoints
from parity.training.runs import RunFolder
from parity.weights.load import find_folder


def load(
    backend: Any,
    run: Path | None,
    model: str | None,
    vocab_bpe: Path | None = None,
    checkpoint: str = "newest",
) -> tuple[Any, Tokenizer, Path]:
    """(model, tokenizer, the folder its weights came from), by `backend`, which is gpt_torch or gpt_jax.

    `checkpoint` of a run: "newest" (intact), "best" (by validation loss) or a step.

    Raises InputError unless just one of `run` and `model` is given, and for what is missing or does not match.
    """
    if (run is None) == (model is None):
        raise InputError("give either --run, a run folder, or --model, a size or a folder with weights")
    if run is not None:
        opened = RunFolder(run)
        tokenizer = load_tokenizer(opened.config()["train"]["tokenizer"], vocab_bpe)
        folder = _checkpoint(opened, checkpoint)
    else:
        folder = find_folder(model or "")
        beside = folder / "vocab.bpe"
        tokenizer = load_tokenizer("gpt2", beside if vocab_bpe is None and beside.is_file() else vocab_bpe)
    loaded = backend.load_pretrained(folder)
    if tokenizer.n_vocab > loaded.config.n_vocab:
        sizes = f"{tokenizer.n_vocab} tokens, the model in {folder} {loaded.config.n_vocab}"
        raise InputError(f"the {tokenizer.name} tokenizer has {sizes}; they do not belong together")
    return loaded, tokenizer, folder


def _checkpoint(run: RunFolder, which: str) -> Path:
    if which == "newest":
        return checkpoints.newest_intact(run.checkpoints)
    best = run.best_step()
    if which == "best" and best is not None:
        return checkpoints.intact(run.checkpoints, best)
    if which.isdecimal():
        return checkpoints.intact(run.checkpoints, int(which))
    raise InputError(f"--checkpoint {which}: give newest, best (of a run that was evaluated), or a step's number")
