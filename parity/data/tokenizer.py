"""Tokenizers: GPT-2's byte-level BPE from a local vocab.bpe, and plain bytes.

Both have n_vocab, eos_id, encode, decode and token_bytes. Text of a special token is ordinary text
unless it is named in `allowed_special`; decoding never fails on a character cut in the middle.
"""

import codecs
import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tiktoken

from parity.errors import InputError
from parity.storage.download import cache_folder

END_OF_TEXT = "<|endoftext|>"
# The file that OpenAI published; tiktoken pins the same hash.
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
# How GPT-2 cuts text before merging (openai/gpt-2 src/encoder.py): contractions, words, numbers, rest, space.
_PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Tokenizer(Protocol):
    name: str
    n_vocab: int
    eos_id: int

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]: ...
    def encode_array(self, text: str) -> np.ndarray:
        """Ids uint16 [length] of ordinary text: encode() for much text, without the interpreter's lock."""

    def decode(self, ids: Iterable[int]) -> str: ...
    def token_bytes(self, id: int) -> bytes: ...


class ByteTokenizer:
    """The 256 bytes of UTF-8, and the end of text as id 256."""

    name = "bytes"
    n_vocab = 257
    eos_id = 256

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        if END_OF_TEXT not in allowed_special:
            return list(text.encode("utf-8"))
        ids: list[int] = []
        for number, part in enumerate(text.split(END_OF_TEXT)):
            ids += ([self.eos_id] if number else []) + list(part.encode("utf-8"))
        return ids

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint16)

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, id: int) -> bytes:
        if not 0 <= id < self.n_vocab:
            raise InputError(f"token id {id} is outside the vocabulary 0..{self.n_vocab - 1}")
        return END_OF_TEXT.encode() if id == self.eos_id else bytes([id])


class GPT2Tokenizer:
    """GPT-2's 50,257 tokens, run by tiktoken on ranks read from `vocab_bpe`; no network.

    Raises InputError for a missing, damaged or different file.
    """

    name = "gpt2"
    n_vocab = 50257
    eos_id = 50256

    def __init__(self, vocab_bpe: str | Path):
        self.encoding = tiktoken.Encoding(
            name="gpt2",
            pat_str=_PIECES,
            mergeable_ranks=_read_ranks(Path(vocab_bpe)),
            special_tokens={END_OF_TEXT: self.eos_id},
            explicit_n_vocab=self.n_vocab,
        )

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        return self.encoding.encode(text, allowed_special=set(allowed_special), disallowed_special=())

    def encode_array(self, text: str) -> np.ndarray:
        return self.encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, id: int) -> bytes:
        if not 0 <= id < self.n_vocab:
            raise InputError(f"token id {id} is outside the vocabulary 0..{self.n_vocab - 1}")
        return self.encoding.decode_single_token_bytes(id)


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Token bytes -> rank, from the merges: 256 bytes first, then one token a merge, in order."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"vocabulary {path} cannot be read ({error.strerror})") from None
    if hashlib.sha256(data).hexdigest() != VOCAB_BPE_SHA256:
        raise InputError(f"vocabulary {path} is not OpenAI's vocab.bpe (its sha256 differs); fetch it again")
    # OpenAI writes each byte as a printable character: those that print stand for themselves, and
    # come first; the others are counted on from 256.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    ranks = {bytes([byte]): rank for rank, byte in enumerate(printable + others)}
    for line in data.decode("utf-8").splitlines()[1:]:  # the first line is a version
        ranks.setdefault(bytes(byte_of[character] for character in line if character != " "), len(ranks))
    return ranks


def load_tokenizer(name: str, vocab_bpe: str | Path | None = None) -> Tokenizer:
    """ "bytes", or "gpt2" with its vocabulary from `vocab_bpe` or the cache folder.

    Raises InputError that lists the places looked at.
    """
    if name == "bytes":
        return ByteTokenizer()
    if name != "gpt2":
        raise InputError(f"unknown tokenizer {name!r}; choose bytes or gpt2")
    if vocab_bpe is not None:
        return GPT2Tokenizer(vocab_bpe)
    cached = cache_folder() / "vocab.bpe"
    of_models = sorted((cache_folder() / "models").glob("*/vocab.bpe"))
    for found in [cached, *of_models]:
        if found.is_file():
            return GPT2Tokenizer(found)
    raise InputError(
        f"the gpt2 tokenizer needs OpenAI's vocab.bpe: give --vocab-bpe PATH, or put it at {cached} "
        "(every GPT-2 checkpoint has it: scripts/download_gpt2.py 124M); or use --tokenizer bytes"
    )


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Text as the ids come, each character once it is complete."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for id in ids:
        yield decoder.decode(tokenizer.token_bytes(id))
    yield decoder.decode(b"", final=True)


def encode_prompt(tokenizer: Tokenizer, text: str) -> Sequence[int]:
    """Ids of a prompt; the empty prompt is the end-of-text token alone, as GPT-2 starts documents."""
    return tokenizer.encode(text) or [tokenizer.eos_id]
