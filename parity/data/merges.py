"""GPT-2's merges: the files that contain them, and the tokens that they make."""

import hashlib
from pathlib import Path

from parity.errors import InputError
from parity.storage.json import LISTING, get_entry, read_object

VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
"""Hash of the vocab.bpe that OpenAI published; tiktoken pins the same one."""


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


def read_ranks(path: Path) -> dict[bytes, int]:
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
