"""The seven files that OpenAI published of each model size: names, lengths, hashes and mirrors."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from parity.config import PRESETS, SIZES
from parity.console import PlainConsole
from parity.errors import InputError
from parity.storage.download import RemoteFile, fetch, openai_addresses
from parity.storage.paths import cache_folder
from parity.weights import openai
from parity.weights.leveldb import DamageError
from parity.weights.table import check, n_params
from parity.weights.tensor_bundle import check_shard, decode_message, parse_index

DATA = "model.ckpt.data-00000-of-00001"


# OpenAI publishes no hashes. Those of encoder.json and vocab.bpe are also pinned by tiktoken; those of `checkpoint`
# and hparams.json follow from their known content; the others were taken from public repositories.
_SHA256 = {
    "checkpoint": "dd1b025d2e155283f5e300ce95bf6d5b6bc0f7fe010db73daa6975eb896ab9cb",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "hparams.json": "d9d56e4121c427164e0c55c6f03c08e1daf9002b9b672825112d19097b680318",
    "model.ckpt.index": "71916f763f9746f9b2a06b12d91996cf1084ae008d0424543d39391c5f2dc687",
    DATA: "2060c885360cc0cf41d7a6dbc4d24b5127aae20260c8b5ae521b5a6578407118",
    "model.ckpt.meta": "4668c448fa11531fd6700460487f73e82d3272960cea942252f8744bf225c77b",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
_SAME_FOR_ALL = {"checkpoint": 77, "encoder.json": 1_042_301, "vocab.bpe": 456_318}
_LENGTHS = {
    "124M": {"hparams.json": 90, "model.ckpt.index": 5_215, "model.ckpt.meta": 471_155},
    "355M": {"hparams.json": 91, "model.ckpt.index": 10_399, "model.ckpt.meta": 926_519},
}


_INDEX = "model.ckpt.index"
_MAX_META_BYTES = 2**26  # that of the 124M model has 0.5 MB


def model_files(size: str) -> list[RemoteFile]:
    """Return the seven files of a model size, in the order to download; raise InputError for an unknown one."""
    if size not in SIZES:
        raise InputError(f"unknown model {size!r}; OpenAI published {', '.join(SIZES)}")
    sizes = {**_SAME_FOR_ALL, **_LENGTHS.get(size, {}), DATA: 4 * n_params(PRESETS[size])}
    hashes = _SHA256 if size == "124M" else {name: _SHA256[name] for name in _SAME_FOR_ALL}
    checks: dict[str, Callable[[Path], None]] = {
        "hparams.json": functools.partial(_check_hparams, size),
        _INDEX: functools.partial(_check_index, size),
        DATA: _check_data,
        "model.ckpt.meta": _check_meta,
    }
    return [RemoteFile(name, sizes.get(name), hashes.get(name), checks.get(name)) for name in _SHA256]


def _check_hparams(size: str, file: Path) -> None:
    if openai.read_hparams(file) != PRESETS[size]:
        raise InputError(f"{file} describes another model than {size}")


def _check_index(size: str, file: Path) -> None:
    entries = parse_index(file, file.with_name(openai.PREFIX))
    check({name: entry.shape for name, entry in entries.items()}, PRESETS[size], "openai", str(file))


def _check_data(file: Path) -> None:
    """Compare every tensor with its checksum in the index, which is downloaded before the data."""
    index = file.with_name(_INDEX)
    check_shard(file, parse_index(index, file.with_name(openai.PREFIX)).values())


def _check_meta(file: Path) -> None:
    """Check that a file may be TensorFlow's MetaGraphDef (core/protobuf/meta_graph.proto), which is not used here."""
    try:
        fields = decode_message(file.read_bytes()) if file.stat().st_size <= _MAX_META_BYTES else {}
    except DamageError:
        fields = {}
    information, graph, saver = 1, 2, 3
    is_meta_graph = {information, graph, saver} <= fields.keys() and max(fields) < 16
    if not is_meta_graph or not all(isinstance(value, bytes) for values in fields.values() for value in values):
        raise InputError(f"{file} is not the description of a TensorFlow graph")


def download_model(
    size: str,
    folder: Path | None = None,
    base_urls: Sequence[str] = (),
    offline: bool | None = None,
    recheck: bool = False,
) -> Path:
    """Download OpenAI's files of a model, except those that are already there, which are checked.

    Args:
        size: One of parity.config.SIZES.
        folder: Where to store the files; by default models/SIZE in the cache folder.
        base_urls: Addresses of folders that hold SIZE/NAME, in the order to try; by default GPT_PARITY_BASE_URL if it
            is set, otherwise OPENAI_MIRRORS.
        offline: Whether to forbid downloads; by default as GPT_PARITY_OFFLINE says.
        recheck: Whether to read existing files even if they have not changed since they were last checked.

    Returns:
        The folder.

    Raises:
        InputError: If a file cannot be downloaded; the message lists every address with its failure. Also if a file
            exists but is not OpenAI's.
    """
    folder = folder or cache_folder() / "models" / size
    columns = (TextColumn("{task.description:32}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    files = model_files(size)
    with Progress(*columns, TimeRemainingColumn(), console=PlainConsole(stderr=True, lossy=True)) as progress:
        for remote in files:
            bar = progress.add_task(remote.name, total=remote.size)
            addresses = openai_addresses(f"{size}/{remote.name}", base_urls)
            show = functools.partial(_show, progress, bar)
            fetch(remote, folder / remote.name, addresses, offline, show, recheck=recheck)
    return folder


def _show(progress: Progress, bar: TaskID, received: int) -> None:
    progress.update(bar, completed=received)
