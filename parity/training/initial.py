"""The weights that a training run starts from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from parity.config import SIZES, GPTConfig
from parity.data import tokenizer_files
from parity.errors import InputError
from parity.storage.paths import user_path
from parity.storage.remote import is_address
from parity.training import checkpoints
from parity.training.remote_runs import pull_checkpoint
from parity.training.runs import RunFolder, read_run
from parity.training.settings import TrainSettings
from parity.weights import initial_weights, peft_files
from parity.weights.adapters import LoraConfig
from parity.weights.classifier import CLASSIFIER_FILE, ClassifierConfig, refuse_classifier
from parity.weights.classifier_files import read_options
from parity.weights.digest import weights_sha256
from parity.weights.load import find_folder, read_folder


class InitialArrays(NamedTuple):
    """Arguments of a backend's `load_weights`."""

    arrays: Mapping[str, Any]
    format: str
    origin: str


class Base(NamedTuple):
    """The weights under an adapter."""

    name: str | None = None
    """One of OpenAI's sizes, or the path of the folder or file; None for weights that have no file."""
    sha256: str | None = None
    """See parity.weights.digest.weights_sha256."""


def weights_folder(init_from: str | Path) -> Path:
    """Return the folder with the weights that `--init-from` names.

    Args:
        init_from: One of OpenAI's sizes ("124M", downloaded if necessary), a folder with weights in any known format,
            or a run folder, or the address to which a run is mirrored, which stand for the newest intact checkpoint.

    Raises:
        InputError: If there is no such folder, or the run has no intact checkpoint.
    """
    if is_address(init_from):
        return pull_checkpoint(str(init_from))[1]
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
    run = pull_checkpoint(str(init_from))[0] if is_address(init_from) else RunFolder(Path(init_from))
    if run.config_file.is_file() and run.checkpoints.is_dir():
        return read_run(run).settings.tokenizer
    return tokenizer_files.own_tokenizer(weights_folder(init_from))


def initial_arrays(config: GPTConfig, settings: TrainSettings, init_from: str | Path | None = None) -> InitialArrays:
    """Return the weights that `init_from` names (see weights_folder), or by default those of the settings' seed."""
    if init_from is None:
        return InitialArrays(initial_weights(config, settings.seed, scheme=settings.init_scheme), "huggingface", "seed")
    _, arrays, format = read_folder(weights_folder(init_from))
    return InitialArrays(arrays, format, str(init_from))


def base_of(config: GPTConfig, initial: InitialArrays, init_from: str | Path | None) -> Base:
    """Return what an adapter's files record of the weights that it is trained on; this reads all of them."""
    sha256 = weights_sha256(config, initial.arrays, initial.format)
    if init_from is None or str(init_from) in SIZES:
        return Base(None if init_from is None else str(init_from), sha256)
    return Base(str(weights_folder(init_from).resolve()), sha256)


def check_base(folder: Path, lora: LoraConfig, base: Base) -> None:
    """Raise InputError unless a checkpoint holds an adapter with these options, trained on this base."""
    adapter = peft_files.read(folder, with_head=(folder / CLASSIFIER_FILE).is_file())
    if adapter.lora != lora:
        raise InputError(f"{folder} holds an adapter with other options: {adapter.lora}; this run has {lora}")
    if adapter.base_sha256 not in (None, base.sha256):
        raise InputError(
            f"{folder}: the adapter was trained on {adapter.base or 'other weights'} (sha256 {adapter.base_sha256}), "
            f"but the base {base.name or 'of this run'} has sha256 {base.sha256}; name the weights that it was "
            "trained on with --init-from"
        )


def check_classifier(folder: Path, classifier: ClassifierConfig | None) -> None:
    """Raise InputError unless a checkpoint holds a classifier with these options, or none if there are none."""
    if classifier is None:
        refuse_classifier(folder)
    elif (stored := read_options(folder)) != classifier:
        raise InputError(f"{folder} holds a classifier with other options: {stored}; this run has {classifier}")
