"""What the processes of a run, and the parts of a run that is resumed, must have in common besides their options."""

import contextlib
import hashlib
import importlib.util
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from parity.data.token_files import Tokens
from parity.training.initial import weights_folder

_PACKAGES = ("parity", "gpt_jax", "gpt_torch")
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "torch", "numpy", "orbax-checkpoint", "tiktoken")
# Files that downloads leave beside the weights; they differ between machines.
_OF_DOWNLOADS = (".lock", ".part", ".etag", ".verified")
# Arrays up to this size are hashed as a whole; of larger ones both ends and evenly spaced pieces of a page each.
_WHOLE_BYTES, _PIECE_BYTES, _PIECES = 2**24, 2**12, 1024


def code_sha256() -> str:
    """Return the hash of the source files of this project's packages that are installed."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        for root in map(Path, (spec and spec.submodule_search_locations) or ()):
            for file in sorted(root.rglob("*.py")):
                digest.update(f"{package}/{file.relative_to(root).as_posix()}\0".encode())
                digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def library_versions() -> dict[str, str]:
    """Return {package: version} of the libraries that both backends build on, without those that are missing."""
    versions = {}
    for name in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):  # of the backend that is not installed
            versions[name] = version(name)
    return versions


def sampled_sha256(arrays: Iterable[Tokens]) -> str:
    """Return a hash of one-dimensional arrays, in memory or in files, which reads little of a large one.

    An array of up to 16 MiB is read as a whole; of a larger one both ends and 1,024 pieces of 4 KiB between them.
    """
    digest = hashlib.sha256()
    for array in arrays:
        dtype = array[:0].dtype
        digest.update(f"{dtype.newbyteorder('<').str} {len(array)}\n".encode())
        if len(array) * dtype.itemsize <= _WHOLE_BYTES:
            digest.update(array[:].tobytes())
            continue
        length = _PIECE_BYTES // dtype.itemsize
        for start in np.linspace(0, len(array) - length, _PIECES, dtype=np.int64):
            digest.update(array[start : start + length].tobytes())
    return digest.hexdigest()


def environment() -> dict[str, Any]:
    """Return what env.json records of this process."""
    return {
        "process": f"{os.getpid()} on {platform.node()}",
        "command": sys.argv,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "versions": library_versions(),
        "code": code_sha256(),
    }


def process_facts(init_from: str | None) -> dict[str, str]:
    """Return what all processes of a run must have in common besides options and data, by names for a message.

    Args:
        init_from: The weights that the run starts from; see weights_folder().
    """
    main = getattr(sys.modules["__main__"], "__file__", None)
    script = Path(main) if main else None
    imported = {name: number for name, number in library_versions().items() if name.partition("-")[0] in sys.modules}
    return {
        "code of gpt-parity": code_sha256(),
        "training scripts": _file_sha256([script] if script and script.is_file() else []),
        "versions of Python": platform.python_version(),
        **{f"versions of {name}": number for name, number in imported.items()},
        "weights in --init-from": "" if init_from is None else _weights_sha256(weights_folder(init_from)),
    }


def environment_changes(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """Describe how code and versions differ from those in the env.json of the process that ran before.

    Args:
        before: The content of env.json, of any version of this project, or of a damaged file.
        now: The same entries of this process.
    """
    changes = []
    if isinstance(before.get("code"), str) and before["code"] != now["code"]:
        changes.append("the code of gpt-parity has changed")
    if isinstance(before.get("python"), str) and before["python"] != now["python"]:
        changes.append(f"Python was {before['python']} and is now {now['python']}")
    old, new = before.get("versions"), now["versions"]
    if isinstance(old, dict) and isinstance(new, dict):
        changes += [
            f"{name} was {old[name]} and is now {new.get(name, 'not installed')}"
            for name in sorted(old)
            if isinstance(name, str) and old[name] != new.get(name, "not installed")
        ]
    return changes


def _weights_sha256(path: Path) -> str:
    """Return a sampled hash of a file with weights, or of the files in a folder with weights."""
    if not path.is_dir():
        return _file_sha256([path])
    return _file_sha256(sorted(file for file in path.iterdir() if file.is_file() and file.suffix not in _OF_DOWNLOADS))


def _file_sha256(files: list[Path]) -> str:
    contents = [np.memmap(file, np.uint8, mode="r") for file in files if file.stat().st_size]
    return hashlib.sha256(
        f"{[(file.name, file.stat().st_size) for file in files]} {sampled_sha256(contents)}".encode()
    ).hexdigest()
