"""Tokenizers: GPT-2's byte-level BPE from a local vocab.bpe, and plain bytes."""

import codecs
import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from parity.errors import InputError
from parity.storage.json import LISTING, get_entry, read_object
from parity.storage.paths import cache_folder

END_OF_TEXT = "<|endoftext|>"
"""The special token of both tokenizers; GPT-2 puts it between documents."""

VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
"""Hash of the vocab.bpe that OpenAI published; tiktoken pins the same one."""

# How GPT-2 splits text before merging (openai/gpt-2 src/encoder.py): contractions, words, numbers, the rest, space.
_SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

AllowedSpecial = Literal["all"] | Collection[str]
"""Special tokens that are recognized in a text: "all", or a collection of them."""


class Tokenizer(Protocol):
    """What the project needs from a tokenizer."""

    name: str
    """Name by which `load_tokenizer` knows it."""
    n_vocab: int
    """Number of tokens."""
    eos_id: int
    """Id of the end-of-text token."""

    def encode(self, text: str, allowed_special: AllowedSpecial = ()) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: The text.
            allowed_special: Special tokens that are recognized in the text: "all", or a collection such as
                {"<|endoftext|>"}. The characters of any other special token are encoded as ordinary text.

        Raises:
            InputError: For a special token that the tokenizer does not have, and for any other string than "all".
        """

    def encode_array(self, text: str) -> np.ndarray:
        """Return the token ids of ordinary text, uint16 [T]; faster than `encode`, for long texts.

        GPT-2's tokenizer releases the interpreter's lock meanwhile.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids; an incomplete UTF-8 character becomes U+FFFD.

        Raises:
            InputError: For an id outside the vocabulary.
        """

    def token_bytes(self, id: int) -> bytes:
        """Return the UTF-8 bytes of one token, which may be a part of a character.

        Raises:
            InputError: For an id outside the vocabulary.
        """


class ByteTokenizer:
    """A tokenizer with the 256 bytes of UTF-8 as tokens, and the end of text as id 256."""

    name = "bytes"
    n_vocab = 257
    eos_id = 256

    def encode(self, text: str, allowed_special: AllowedSpecial = ()) -> list[int]:
        """See `Tokenizer.encode`."""
        if not _special_tokens(allowed_special):
            return list(text.encode("utf-8"))
        first, *others = text.split(END_OF_TEXT)
        ids = list(first.encode("utf-8"))
        for part in others:
            ids += [self.eos_id, *part.encode("utf-8")]
        return ids

    def encode_array(self, text: str) -> np.ndarray:
        """See `Tokenizer.encode_array`."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint16)

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """See `Tokenizer.token_bytes`."""
        _check_id(id, self.n_vocab)
        return END_OF_TEXT.encode() if id == self.eos_id else bytes([id])


class GPT2Tokenizer:
    """GPT-2's tokenizer of 50,257 tokens: tiktoken with the merges of a local vocab.bpe; it never uses the network.

    Args:
        vocab_bpe: Path of OpenAI's vocab.bpe.

    Raises:
        InputError: If the file is missing, or is not OpenAI's vocab.bpe.
    """

    name = "gpt2"
    n_vocab = 50257
    eos_id = 50256

    def __init__(self, vocab_bpe: str | Path):
        import tiktoken  # here, so that importing a backend does not load it

        self.vocab_bpe = Path(vocab_bpe)
        self.encoding = tiktoken.Encoding(
            name="gpt2",
            pat_str=_SPLIT_PATTERN,
            mergeable_ranks=_read_ranks(Path(vocab_bpe)),
            special_tokens={END_OF_TEXT: self.eos_id},
            explicit_n_vocab=self.n_vocab,
        )

    def encode(self, text: str, allowed_special: AllowedSpecial = ()) -> list[int]:
        """See `Tokenizer.encode`."""
        return self.encoding.encode(text, allowed_special=_special_tokens(allowed_special), disallowed_special=())

    def encode_array(self, text: str) -> np.ndarray:
        """See `Tokenizer.encode_array`."""
        return self.encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """See `Tokenizer.token_bytes`."""
        _check_id(id, self.n_vocab)
        return self.encoding.decode_single_token_bytes(id)


def _special_tokens(allowed_special: AllowedSpecial) -> set[str]:
    if allowed_special == "all":
        return {END_OF_TEXT}
    if isinstance(allowed_special, str):
        raise InputError(
            f'allowed_special must be "all" or a collection of special tokens such as {{"{END_OF_TEXT}"}}, '
            f"got the string {allowed_special!r}"
        )
    if unknown := sorted(set(allowed_special) - {END_OF_TEXT}):
        raise InputError(f"allowed_special: unknown special tokens {unknown}; the only one is {END_OF_TEXT}")
    return set(allowed_special)


def _check_id(id: int, n_vocab: int) -> None:
    if not 0 <= id < n_vocab:
        raise InputError(f"token id {id} is outside the vocabulary 0..{n_vocab - 1}")


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in OpenAI's files."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


BYTE_CHARACTERS = _byte_characters()
"""The character that stands for each byte in vocabularies: itself if it is printable, otherwise one from 256 on."""


def merges_text(path: Path) -> bytes:
    """Return the merges in a file in the form of OpenAI's vocab.bpe: a line with the version, then a merge per line.

    Args:
        path: OpenAI's vocab.bpe, merges.txt of transformers, which may have another first line and other line ends,
            or tokenizer.json, which contains the merges.

    Raises:
        InputError: If the file cannot be read, or a tokenizer.json has no merges.
    """
    if path.suffix == ".json":
        merges = get_entry(get_entry(read_object(path, LISTING), "model", dict, str(path)), "merges", list, str(path))
        try:
            lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
        except TypeError:
            raise InputError(f"vocabulary {path} is not the tokenizer.json of a BPE tokenizer") from None
    else:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"vocabulary {path} cannot be read ({error.strerror})") from None
        lines = data.decode("utf-8", errors="replace").replace("\r\n", "\n").removesuffix("\n").split("\n")
        lines = lines[1:] if lines[0].startswith("#version") else lines
    return "\n".join(["#version: 0.2", *lines, ""]).encode("utf-8", errors="replace")


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Return {bytes of a token: its rank}: first the 256 bytes, then one token per merge, in the order of the file."""
    data = merges_text(path)
    if hashlib.sha256(data).hexdigest() != VOCAB_BPE_SHA256:
        raise InputError(f"vocabulary {path} is not OpenAI's vocab.bpe (its sha256 differs); download it again")
    byte_of = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}
    themselves = [byte for byte in range(256) if BYTE_CHARACTERS[byte] == chr(byte)]  # these have the first ranks
    others = [byte for byte in range(256) if byte not in themselves]
    ranks = {bytes([byte]): rank for rank, byte in enumerate(themselves + others)}
    for line in data.decode("utf-8").splitlines()[1:]:  # the first line is a version
        ranks.setdefault(bytes(byte_of[character] for character in line if character != " "), len(ranks))
    return ranks


def load_tokenizer(name: str, vocab_bpe: str | Path | None = None) -> Tokenizer:
    """Return a tokenizer by its name.

    Args:
        name: "gpt2" or "bytes".
        vocab_bpe: Path of OpenAI's vocab.bpe, or of a merges.txt or tokenizer.json of transformers with the same
            merges, for "gpt2". By default it is looked for in the cache folder, where
            scripts/download_gpt2.py puts it.

    Raises:
        InputError: For an unknown name, and if the vocabulary is missing or damaged.
    """
    if name == "bytes":
        return ByteTokenizer()
    if name != "gpt2":
        raise InputError(f"unknown tokenizer {name!r}; choose bytes or gpt2")
    if vocab_bpe is not None:
        return GPT2Tokenizer(vocab_bpe)
    default = cache_folder() / "vocab.bpe"
    for path in [default, *sorted((cache_folder() / "models").glob("*/vocab.bpe"))]:
        if path.is_file():
            return GPT2Tokenizer(path)
    raise InputError(
        f"the gpt2 tokenizer needs OpenAI's vocab.bpe: pass --vocab-bpe PATH, or put the file at {default} "
        "(scripts/download_gpt2.py 124M downloads it with the model), or use --tokenizer bytes"
    )


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Yield the text of a model's token ids as they arrive, each character as soon as all of its bytes are known.

    Ids beyond the tokenizer's vocabulary have no text. Models whose vocabulary is padded, or that were given tokens of
    their own, may sample them.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for id in ids:
        if id < tokenizer.n_vocab:
            yield decoder.decode(tokenizer.token_bytes(id))
    yield decoder.decode(b"", final=True)


def encode_prompt(tokenizer: Tokenizer, text: str) -> Sequence[int]:
    """Return the token ids of a prompt; an empty prompt becomes the end-of-text token, which begins a document."""
    return tokenizer.encode(text) or [tokenizer.eos_id]
