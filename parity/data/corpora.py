"""Load a corpus by name or path as token arrays for training and validation."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from parity.data import shards
from parity.data.token_files import read_bin
from parity.data.tokenizer import Tokenizer
from parity.errors import InputError
from parity.storage.download import RemoteFile, fetch
from parity.storage.paths import cache_folder

EMBEDDED = "python-docs"
"""The text of Python's own help, which every Python installation contains."""

# name: (address, file that it serves)
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


CORPORA = (EMBEDDED, *DOWNLOADS)
"""Names that load_corpus accepts besides paths."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Token ids of a corpus, split into training and validation."""

    name: str
    train: list[np.ndarray]
    """One array of ids [length] per shard."""
    validation: list[np.ndarray]
    """One array of ids [length] per shard."""
    sha256: str
    """Hash of the text, or of the names and sizes of the token files; config.json records it."""

    @property
    def n_tokens(self) -> tuple[int, int]:
        """Number of training tokens and of validation tokens."""
        return sum(map(len, self.train)), sum(map(len, self.validation))


def load_corpus(name: str, tokenizer: Tokenizer, validation_fraction: float = 0.1) -> Corpus:
    """Load a corpus by name or from a path.

    Args:
        name: One of CORPORA (python-docs is part of Python; the others are downloaded once), or the path of a
            UTF-8 text file, a folder of .txt files, a folder written by scripts/prepare_data.py, a .bin token file,
            or a folder with train*.bin and val*.bin (in the format of nanoGPT or llm.c).
        tokenizer: Encodes text; token files are read as they are.
        validation_fraction: Fraction at the end of the text, or of the last token file, that is held out for
            validation, unless the corpus has validation files of its own.

    Raises:
        InputError: If the corpus is missing, empty, damaged or not UTF-8; the message names the file.
    """
    if not 0 < validation_fraction < 1:
        raise InputError(f"validation_fraction must be between 0 and 1, got {validation_fraction}")
    path = Path(name)
    if name in DOWNLOADS or name == EMBEDDED or not path.exists():
        return _from_text(name, _named_text(name), tokenizer, validation_fraction)
    if path.is_file() and path.suffix != ".bin":
        return _from_text(name, _read_text(path), tokenizer, validation_fraction)
    if shards.is_prepared(path):
        return _prepared(path, tokenizer, validation_fraction)
    bins = [path] if path.is_file() else sorted(path.glob("*.bin"))
    if not bins:
        files = sorted(path.rglob("*.txt"))
        if not files:
            raise InputError(f"folder {path} contains neither .txt nor .bin files")
        return _from_text(name, "\n\n".join(map(_read_text, files)), tokenizer, validation_fraction)
    validation = [file for file in bins if "val" in file.stem]
    train = [file for file in bins if "val" not in file.stem]
    if not train:
        raise InputError(f"folder {path} contains validation tokens only; add train*.bin")
    return _from_bins(name, train, validation, [(file.name, file.stat().st_size) for file in bins], validation_fraction)


def _prepared(path: Path, tokenizer: Tokenizer, validation_fraction: float) -> Corpus:
    """Load a folder that scripts/prepare_data.py wrote."""
    index = shards.read_index(path)
    if index["tokenizer"] != tokenizer.name:
        raise InputError(
            f"corpus {path} was prepared with the {index['tokenizer']} tokenizer, the run has {tokenizer.name}; "
            f"use --tokenizer {index['tokenizer']}"
        )
    train, validation = ([shard["name"] for shard in index["splits"][split]["done"]] for split in shards.SPLITS)
    hashes = [shard["sha256"] for split in shards.SPLITS for shard in index["splits"][split]["done"]]
    return _from_bins(str(path), [path / n for n in train], [path / n for n in validation], hashes, validation_fraction)


def _from_bins(
    name: str, train: list[Path], validation: list[Path], content: list, validation_fraction: float
) -> Corpus:
    """Load .bin files; the sha256 of the corpus is that of `content`, a list that represents what is in the files."""
    train_shards, validation_shards = ([read_bin(file) for file in files] for files in (train, validation))
    if not validation_shards:
        *train_shards, last = train_shards
        cut = int(len(last) * (1 - validation_fraction))
        train_shards, validation_shards = [*train_shards, last[:cut]], [last[cut:]]
    return Corpus(name, train_shards, validation_shards, hashlib.sha256(repr(content).encode()).hexdigest())


def _from_text(name: str, text: str, tokenizer: Tokenizer, validation_fraction: float) -> Corpus:
    if not text.strip():
        raise InputError(f"corpus {name} is empty")
    cut = int(len(text) * (1 - validation_fraction))
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
            raise InputError(
                f"this Python has no module pydoc_data, so {EMBEDDED} is missing; use a file instead"
            ) from None
        return "\n\n".join(topics[topic] for topic in sorted(topics))
    if name not in DOWNLOADS:
        raise InputError(f"corpus {name!r} is not a file or folder, nor one of {', '.join(CORPORA)}")
    address, file = DOWNLOADS[name]
    try:
        cached = fetch(file, cache_folder() / file.name, [address])
    except InputError as error:
        raise InputError(f"{error}; without a network, use the embedded {EMBEDDED} or a text file") from None
    return _read_text(cached)
