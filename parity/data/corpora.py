"""Corpora by name or path: token arrays for training and validation."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from parity.data import shards
from parity.data.token_files import read_bin
from parity.data.tokenizer import Tokenizer
from parity.errors import InputError
from parity.storage.download import RemoteFile, cache_folder, fetch

EMBEDDED = "python-docs"


# name: (address, what it serves)
DOWNLOADS = {
    # Edith Wharton, 1908; the notebook's corpus.
    "the-verdict": (
        "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch02/01_main-chapter-code/the-verdict.txt",
        RemoteFile("the-verdict.txt", 20_479, "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f"),
    ),
    "tiny-shakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        RemoteFile(
            "tiny-shakespeare.txt", 1_115_394, "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
        ),
    ),
}


@dataclasses.dataclass(frozen=True)
class Corpus:
    name: str
    train: list[np.ndarray]
    validation: list[np.ndarray]
    sha256: str
    """Of the text, or of the token files' names and sizes: what config.json records."""


def load_corpus(name: str, tokenizer: Tokenizer, validation_part: float = 0.1) -> Corpus:
    """A corpus by name, or from a path.

    Names: python-docs (the text of Python's own help, on every machine), the-verdict and
    tiny-shakespeare (downloaded once). A path: a UTF-8 text file, a folder of .txt files, a folder of
    scripts/prepare_data.py, a .bin file, or a folder with train*.bin and val*.bin (nanoGPT's or llm.c's).
    Where the corpus has no validation part of its own, the last `validation_part` of the text, or tokens, is it.
    Raises InputError that names what is missing, empty or not UTF-8.
    """
    if not 0 < validation_part < 1:
        raise InputError(f"validation part must be between 0 and 1, got {validation_part}")
    path = Path(name)
    if name in DOWNLOADS or name == EMBEDDED or not path.exists():
        return _from_text(name, _named_text(name), tokenizer, validation_part)
    if path.is_file() and path.suffix != ".bin":
        return _from_text(name, _read_text(path), tokenizer, validation_part)
    if (path / shards.INDEX).exists():
        return _prepared(path, tokenizer, validation_part)
    bins = [path] if path.is_file() else sorted(path.glob("*.bin"))
    if not bins:
        files = sorted(path.rglob("*.txt"))
        if not files:
            raise InputError(f"folder {path} holds neither .txt nor .bin files")
        return _from_text(name, "\n\n".join(map(_read_text, files)), tokenizer, validation_part)
    validation = [file for file in bins if "val" in file.stem]
    train = [file for file in bins if "val" not in file.stem]
    if not train:
        raise InputError(f"folder {path} holds validation tokens only; add train*.bin")
    return _from_bins(name, train, validation, [(file.name, file.stat().st_size) for file in bins], validation_part)


def _prepared(path: Path, tokenizer: Tokenizer, validation_part: float) -> Corpus:
    """A folder of scripts/prepare_data.py."""
    index = shards.read_index(path)
    if index["tokenizer"] != tokenizer.name:
        raise InputError(
            f"corpus {path} was prepared with the {index['tokenizer']} tokenizer, the run has {tokenizer.name}; "
            f"use --tokenizer {index['tokenizer']}"
        )
    train, validation = ([shard["name"] for shard in index["splits"][split]["done"]] for split in shards.SPLITS)
    hashes = [shard["sha256"] for split in shards.SPLITS for shard in index["splits"][split]["done"]]
    return _from_bins(str(path), [path / n for n in train], [path / n for n in validation], hashes, validation_part)


def _from_bins(name: str, train: list[Path], validation: list[Path], told: list, validation_part: float) -> Corpus:
    """`told`: what stands for the files' content in the corpus's sha256."""
    train_shards, validation_shards = ([read_bin(file) for file in files] for files in (train, validation))
    if not validation_shards:
        *train_shards, last = train_shards
        cut = int(len(last) * (1 - validation_part))
        train_shards, validation_shards = [*train_shards, last[:cut]], [last[cut:]]
    return Corpus(name, train_shards, validation_shards, hashlib.sha256(repr(told).encode()).hexdigest())


def _from_text(name: str, text: str, tokenizer: Tokenizer, validation_part: float) -> Corpus:
    if not text.strip():
        raise InputError(f"corpus {name} is empty")
    cut = int(len(text) * (1 - validation_part))
    ids = [np.array(tokenizer.encode(part), np.uint16) for part in (text[:cut], text[cut:])]
    return Corpus(name, ids[:1], ids[1:], hashlib.sha256(text.encode()).hexdigest())


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None


def _named_text(name: str) -> str:
    if name == EMBEDDED:
        try:
            from pydoc_data.topics import topics
        except ImportError:
            raise InputError(f"this Python came without pydoc_data, so {EMBEDDED} is missing; name a file") from None
        return "\n\n".join(topics[topic] for topic in sorted(topics))
    if name not in DOWNLOADS:
        raise InputError(f"corpus {name!r} is no file or folder, and not one of {', '.join([EMBEDDED, *DOWNLOADS])}")
    address, wanted = DOWNLOADS[name]
    try:
        cached = fetch(wanted, cache_folder() / wanted.name, [address])
    except InputError as error:
        raise InputError(f"{error}; without a network, use the embedded {EMBEDDED}, or name a text file") from None
    if hashlib.sha256(cached.read_bytes()).hexdigest() != wanted.sha256:
        raise InputError(f"{cached} is damaged (its sha256 differs); delete it and run again")
    return _read_text(cached)
