"""Tokenizers: GPT-2's byte-level BPE from a local vocab.bpe, and plain bytes."""

import codecs
import functools
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from parity.data.merges import VOCAB_BPE_SHA256, read_ranks
from parity.errors import InputError
from parity.storage.paths import cache_folder

VOCAB_BPE = "vocab.bpe"
"""OpenAI's name of the file with GPT-2's merges."""

END_OF_TEXT = "<|endoftext|>"
"""The special token of both tokenizers; GPT-2 puts it between documents."""

# How GPT-2 splits text before merging (openai/gpt-2 src/encoder.py): contractions, words, numbers, the rest, space.
_SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
"""What \\s matches in the pattern: Unicode's White_Space. Python's own \\s also matches U+001C to U+001F."""

# Runs of white space that are encoded separately if tiktoken refuses a text. It cannot match about a million of them.
_LONG_RUN = re.compile(f"[{WHITE_SPACE}]{{1000,}}")

AllowedSpecial = Literal["all"] | Collection[str]
"""Special tokens that are recognized in a text: "all", or a collection of them."""


class Tokenizer(Protocol):
    """The interface of a tokenizer."""

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
            return list(_utf8(text))
        first, *others = text.split(END_OF_TEXT)
        ids = list(_utf8(first))
        for part in others:
            ids += [self.eos_id, *_utf8(part)]
        return ids

    def encode_array(self, text: str) -> np.ndarray:
        """See `Tokenizer.encode_array`."""
        return np.frombuffer(_utf8(text), np.uint8).astype(np.uint16)

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
        self._new_encoding = functools.partial(
            tiktoken.Encoding,
            name="gpt2",
            mergeable_ranks=read_ranks(Path(vocab_bpe)),
            special_tokens={END_OF_TEXT: self.eos_id},
            explicit_n_vocab=self.n_vocab,
        )
        self.encoding = self._new_encoding(pat_str=_SPLIT_PATTERN)

    @functools.cached_property
    def _unsplit(self) -> Any:
        """The encoding without the pattern, which merges a text as one word."""
        return self._new_encoding(pat_str=r"(?s:.+)")

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.vocab_bpe,)  # reads the vocabulary once per process, instead of sending it along

    def encode(self, text: str, allowed_special: AllowedSpecial = ()) -> list[int]:
        """See `Tokenizer.encode`."""
        special = _special_tokens(allowed_special)
        text = replace_surrogates(text)
        try:
            return self.encoding.encode(text, allowed_special=special, disallowed_special=())
        except ValueError:
            first, *others = text.split(END_OF_TEXT) if special else [text]
            ids = self._encode_around_runs(first).tolist()
            for part in others:
                ids += [self.eos_id, *self._encode_around_runs(part).tolist()]
            return ids

    def encode_array(self, text: str) -> np.ndarray:
        """See `Tokenizer.encode_array`."""
        text = replace_surrogates(text)
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)
        except ValueError:
            return self._encode_around_runs(text)

    def _encode_around_runs(self, text: str) -> np.ndarray:
        """Encode a text with more white space in one place than tiktoken's regular expressions can match."""
        parts, begin = [], 0
        for run in _LONG_RUN.finditer(text):
            # The pattern's match of white space leaves its last character to what follows.
            end = run.end() - (run.end() < len(text))
            parts += [(self.encoding, text[begin : run.start()]), (self._unsplit, text[run.start() : end])]
            begin = end
        parts.append((self.encoding, text[begin:]))
        ids = [encoding.encode_to_numpy(part, disallowed_special=()).astype(np.uint16) for encoding, part in parts]
        return np.concatenate(ids)

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """See `Tokenizer.token_bytes`."""
        _check_id(id, self.n_vocab)
        return self.encoding.decode_single_token_bytes(id)


@functools.cache
def _reopen(vocab_bpe: Path) -> GPT2Tokenizer:
    """Return the tokenizer in another process, perhaps on a machine with the vocabulary in another place."""
    tokenizer = load_tokenizer("gpt2", vocab_bpe if vocab_bpe.is_file() else None)
    assert isinstance(tokenizer, GPT2Tokenizer)
    return tokenizer


def replace_surrogates(text: str) -> str:
    """Return a text that UTF-8 can encode: pairs of surrogates are joined, and others become U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _utf8(text: str) -> bytes:
    return replace_surrogates(text).encode("utf-8")


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


def load_tokenizer(name: str, vocab_bpe: str | Path | None = None) -> Tokenizer:
    """Return a tokenizer by its name.

    Args:
        name: "gpt2" or "bytes".
        vocab_bpe: Path of OpenAI's vocab.bpe, or of a merges.txt or tokenizer.json of transformers with the same
            merges, for "gpt2". By default that in the cache folder, or of a downloaded model. If there is none, it is
            downloaded into the cache folder (0.5 MB), unless GPT_PARITY_OFFLINE forbids it.

    Raises:
        InputError: For an unknown name, and if the vocabulary is damaged or cannot be downloaded.
    """
    if name == "bytes":
        return ByteTokenizer()
    if name != "gpt2":
        raise InputError(f"unknown tokenizer {name!r}; choose bytes or gpt2")
    if vocab_bpe is not None:
        return GPT2Tokenizer(vocab_bpe)
    default = cache_folder() / VOCAB_BPE
    for path in [default, *sorted((cache_folder() / "models").glob(f"*/{VOCAB_BPE}"))]:
        if path.is_file():
            return GPT2Tokenizer(path)
    return GPT2Tokenizer(_download_vocabulary(default))


def _download_vocabulary(target: Path) -> Path:
    from parity.storage.download import RemoteFile, fetch, openai_addresses  # here, because it brings an HTTP client

    try:
        return fetch(
            RemoteFile(VOCAB_BPE, sha256=VOCAB_BPE_SHA256), target, openai_addresses(f"124M/{VOCAB_BPE}"), tries=2
        )
    except InputError as error:
        raise InputError(
            f"the gpt2 tokenizer needs OpenAI's {VOCAB_BPE}: pass --vocab-bpe PATH, put the file at {target}, or use "
            f"--tokenizer bytes ({error})"
        ) from None


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
