"""The weights that a training run starts from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from parity.config import GPTConfig
from parity.data import tokenizer_files
from parity.storage.paths import user_path
from parity.training import checkpoints
from parity.training.runs import RunFolder, read_run
from parity.training.settings import TrainSettings
from parity.weights import initial_weights
from parity.weights.load import find_folder, read_folder


class InitialArrays(NamedTuple):
    """Arguments of a backend's `load_weights`."""

    arrays: Mapping[str, Any]
    format: str
    origin: str


def weights_folder(init_from: str | Path) -> Path:
    """Return the folder with the weights that `--init-from` names.

    Args:
        init_from: One of OpenAI's sizes ("124M", downloaded if necessary), a folder with weights in any known format,
            or a run folder, which stands for its newest intact checkpoint.

    Raises:
        InputError: If there is no such folder, or the run has no intact checkpoint.
    """
    init_from = user_path(init_from)
    run = RunFolder(init_from)
    if not run.checkpoints.is_dir():
        return find_folder(init_from)
    return run.newest_intact() if run.config_file.exists() else checkpoints.newest_intact(run.checkpoints)


def own_tokenizer(init_from: str | Path) -> Literal["bytes", "gpt2"] | None:
    """Return the tokenizer of the weights that `--init-from` names, or None if nothing says which it is.

    Raises:
        InputError: If it is neither the bytes tokenizer nor GPT-2's.
    """
    run = RunFolder(Path(init_from))
    if run.config_file.is_file() and run.checkpoints.is_dir():
        return read_run(run).settings.tokenizer
    return tokenizer_files.own_tokenizer(weights_folder(init_from))


def initial_arrays(config: GPTConfig, settings: TrainSettings, init_from: str | Path | None = None) -> InitialArrays:
    """Return the weights that `init_from` names (see weights_folder), or by default those of the settings' seed."""
    if init_from is None:
        return InitialArrays(initial_weights(config, settings.seed, scheme=settings.init_scheme), "huggingface", "seed")
    _, arrays, format = read_folder(weights_folder(init_from))
    return InitialArrays(arrays, format, str(init_from))
