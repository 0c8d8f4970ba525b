"""Load a corpus by name or path as token arrays for training and validation."""

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from parity.data import documents, shard_index
from parity.data.remote_corpus import open_prepared
from parity.data.shard_cache import RemoteTokens
from parity.data.token_files import TokenFile, Tokens, stated_vocabulary
from parity.data.tokenizer import END_OF_TEXT, ByteTokenizer, Tokenizer
from parity.data.tokenizer_files import own_vocabulary
from parity.errors import InputError
from parity.storage.download import RemoteFile, fetch
from parity.storage.paths import cache_folder
from parity.storage.remote import is_address

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

_VALIDATION = {"val", "valid", "validation", "eval", "evaluation", "dev"}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Token ids of a corpus, split into training and validation."""

    name: str
    train: list[Tokens]
    """The ids [length] of each shard."""
    validation: list[Tokens]
    """The ids [length] of each shard."""
    sha256: str
    """Hash of the documents, of the sha256 of prepared shards, or of the names and sizes of other token files;
    config.json records it."""
    is_verified: bool = False
    """Whether all tokens are compared with this hash when they are fetched, so that none needs to be sampled."""

    @property
    def n_tokens(self) -> tuple[int, int]:
        """Number of training tokens and of validation tokens."""
        return sum(map(len, self.train)), sum(map(len, self.validation))


def load_corpus(name: str, tokenizer: Tokenizer, validation_fraction: float = 0.1) -> Corpus:
    """Load a corpus by name or from a path.

    Args:
        name: One of CORPORA (python-docs is part of Python; the others are downloaded once), or the path of a
            file or folder that scripts/prepare_data.py reads (text, JSON or Parquet), a folder that it wrote, here or
            at an address (s3://, gs://, https://), a .bin token file, or a folder with train*.bin and val*.bin (in the
            format of nanoGPT or llm.c).
        tokenizer: Encodes text; token files are read as they are.
        validation_fraction: Fraction at the end of the text, or of the last token file, that is held out for
            validation, unless the corpus has validation files of its own.

    Raises:
        InputError: If the corpus is missing, empty, damaged or not UTF-8; the message names the file.
    """
    if not 0 < validation_fraction < 1:
        raise InputError(f"validation_fraction must be between 0 and 1, got {validation_fraction}")
    if is_address(name):
        return _prepared(name, tokenizer, validation_fraction)
    path = Path(name)
    if name in DOWNLOADS or name == EMBEDDED or not path.exists():
        return _from_text(name, _named_text(name), tokenizer, validation_fraction)
    if shard_index.is_prepared(path):
        return _prepared(str(path), tokenizer, validation_fraction)
    bins = [path] if path.suffix == ".bin" and path.is_file() else sorted(path.glob("*.bin"))
    if not bins:
        return _from_documents(path, tokenizer, validation_fraction)
    _check_vocabulary(path if path.is_dir() else path.parent, tokenizer)
    train: list[Path] = []
    validation: list[Path] = []
    for file in bins:
        (validation if path.is_dir() and _is_validation(file) else train).append(file)
    if not train:
        raise InputError(f"folder {path} contains validation tokens only; add train*.bin")
    content = [(file.name, file.stat().st_size) for file in bins]
    return _from_shards(
        name, _token_files(train, tokenizer), _token_files(validation, tokenizer), content, validation_fraction
    )


def _check_vocabulary(folder: Path, tokenizer: Tokenizer) -> None:
    """Raise InputError if the token files of a folder have another vocabulary than the tokenizer's beside them."""
    for name in ("meta.pkl", "meta.json"):  # of nanoGPT's preparations with a vocabulary of characters
        if (folder / name).exists():
            raise InputError(
                f"{folder / name} is the vocabulary of the token files beside it, and not that of the {tokenizer.name} "
                f"tokenizer; train on the text instead, or move {name} away if their ids are those of {tokenizer.name}"
            )
    vocabulary = own_vocabulary(folder)
    if vocabulary is not None and tokenizer.name != "gpt2":
        raise InputError(f"{vocabulary} is GPT-2's vocabulary, but the run has --tokenizer {tokenizer.name}")


def _is_validation(file: Path) -> bool:
    """Whether a token file is for validation, by the words in its name."""
    words = set(re.split("[^a-z]+", file.stem.lower()))
    if "test" in words or ("train" in words and words & _VALIDATION):
        raise InputError(
            f"{file} is neither clearly for training nor for validation; name the files train*.bin and val*.bin, and "
            "move others away"
        )
    return bool(words & _VALIDATION)


def _prepared(name: str, tokenizer: Tokenizer, validation_fraction: float) -> Corpus:
    """Load a folder that scripts/prepare_data.py wrote, or one at an address."""
    shards: Mapping[str, Sequence[TokenFile | RemoteTokens]]
    if is_address(name):
        name, index, shards = open_prepared(name, tokenizer.n_vocab)
    else:
        index = shard_index.read_index(Path(name))
    if index["tokenizer"] != tokenizer.name:
        raise InputError(
            f"corpus {name} was prepared with the {index['tokenizer']} tokenizer, the run has {tokenizer.name}; "
            f"use --tokenizer {index['tokenizer']}"
        )
    entries = {split: index["splits"][split]["done"] for split in shard_index.SPLITS}
    hashes = [entry["sha256"] for split in shard_index.SPLITS for entry in entries[split]]
    if not is_address(name):
        paths = {split: [Path(name) / entry["name"] for entry in entries[split]] for split in entries}
        shards = {split: _token_files(paths[split], tokenizer, tokenizer.n_vocab) for split in paths}
    train, validation = (shards[split] for split in shard_index.SPLITS)
    return _from_shards(name, train, validation, hashes, validation_fraction)


def _token_files(files: Sequence[Path], tokenizer: Tokenizer, id_limit: int | None = None) -> list[TokenFile]:
    for file in files:
        if (n_vocab := stated_vocabulary(file)) not in (None, tokenizer.n_vocab):
            raise InputError(
                f"{file} was prepared with a tokenizer of {n_vocab} tokens, but {tokenizer.name} has "
                f"{tokenizer.n_vocab}; choose the right --tokenizer"
            )
    return [TokenFile(file, id_limit=id_limit) for file in files]


def _from_shards(
    name: str,
    train: Sequence[TokenFile | RemoteTokens],
    validation: Sequence[TokenFile | RemoteTokens],
    content: list,
    validation_fraction: float,
) -> Corpus:
    """Return a corpus, whose sha256 is that of `content`, a list that represents what is in the files."""
    if not validation:
        *first, last = train
        cut = int(len(last) * (1 - validation_fraction))
        train, validation = [*first, last.part(slice(cut))], [last.part(slice(cut, None))]
    sha256 = hashlib.sha256(repr(content).encode()).hexdigest()
    return Corpus(name, list(train), list(validation), sha256, is_verified=is_address(name))


def _from_documents(path: Path, tokenizer: Tokenizer, validation_fraction: float) -> Corpus:
    """Tokenize the files that prepare_shards would read, to the same tokens."""
    files = documents.find_files([path])
    pieces = list(documents.pieces(files, cut_anywhere=isinstance(tokenizer, ByteTokenizer)))
    if not any(piece.text.strip() for piece in pieces):
        raise InputError(f"corpus {path} is empty")
    # Training gets as many tokens as the first characters have; a token that crosses the place is for validation.
    left = int(sum(len(piece.text) for piece in pieces) * (1 - validation_fraction))
    ids, n_train, sha256 = [], 0, hashlib.sha256()
    for piece in pieces:
        ids.append(documents.encode(piece, tokenizer))
        if left >= len(piece.text):
            n_train += len(ids[-1])
        elif left > 0:
            n_train += min(len(tokenizer.encode_array(piece.text[:left])), len(ids[-1]) - 1)
        left -= len(piece.text)
        sha256.update(piece.text.encode())
        if piece.ends and piece is not pieces[-1]:
            sha256.update(f"{END_OF_TEXT}\0".encode())
    tokens = np.concatenate(ids)
    return Corpus(str(path), [tokens[:n_train]], [tokens[n_train:]], sha256.hexdigest())


def _from_text(name: str, text: str, tokenizer: Tokenizer, validation_fraction: float) -> Corpus:
    if not text.strip():
        raise InputError(f"corpus {name} is empty")
    cut = int(len(text) * (1 - validation_fraction))
    train, validation = (tokenizer.encode_array(part) for part in (text[:cut], text[cut:]))
    return Corpus(name, [train], [validation], hashlib.sha256(text.encode()).hexdigest())


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
    return cached.read_text(encoding="utf-8")
