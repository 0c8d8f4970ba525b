"""Tokenizer files in a model's folder: checking that they are those of GPT-2's tokenizer, and writing them.

OpenAI calls them encoder.json and vocab.bpe, transformers vocab.json and merges.txt, or all in one tokenizer.json.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from parity.data.merges import BYTE_CHARACTERS, VOCAB_BPE_SHA256, merges_text
from parity.data.tokenizer import (
    END_OF_TEXT,
    ByteTokenizer,
    GPT2Tokenizer,
    Tokenizer,
)
from parity.errors import InputError, printable
from parity.storage.json import LISTING, read_object

_MERGES = ("vocab.bpe", "merges.txt", "tokenizer.json")
_IDS = ("encoder.json", "vocab.json")
# Files of tokenizers of other kinds.
_FOREIGN = ("vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "tekken.json")
_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
_OTHER = (
    "does not belong to GPT-2's tokenizer; encode text with the model's own tokenizer, and call generate() with ids"
)


def own_vocabulary(folder: Path) -> Path | None:
    """Find the vocabulary of GPT-2's tokenizer beside a model.

    Args:
        folder: The model's folder, or a file in it.

    Returns:
        A file that `load_tokenizer` accepts as vocab_bpe; None if the folder has no tokenizer.

    Raises:
        InputError: If the folder has a tokenizer that encodes text differently from GPT-2's; the message names the
            file.
    """
    folder = folder if folder.is_dir() else folder.parent
    for name in _FOREIGN:
        if (folder / name).is_file():
            raise InputError(f"{folder / name} {_OTHER}")
    present = [folder / name for name in _MERGES if (folder / name).is_file()]
    for path in present:
        if hashlib.sha256(merges_text(path)).hexdigest() != VOCAB_BPE_SHA256:
            raise InputError(f"{path} {_OTHER}")
    for name in _IDS:
        if (folder / name).is_file():
            _check_ids(folder / name, read_object(folder / name, LISTING), present)
    added = _check_settings(folder)
    if added:
        names = ", ".join(printable(name, 40) for name in sorted(added)[:5])
        warnings.warn(f"{folder}: the added tokens ({names}) are not recognized in text", stacklevel=3)
    return present[0] if present else None


def own_tokenizer(folder: Path) -> Literal["bytes", "gpt2"] | None:
    """Return the name of the tokenizer beside a model, or None if there is none.

    Args:
        folder: The model's folder, or a file in it.

    Raises:
        InputError: If the folder has any other tokenizer; the message names the file.
    """
    file = (folder if folder.is_dir() else folder.parent) / "tokenizer.json"
    if file.is_file() and read_object(file, LISTING).get("model") == _bytes_as_json(ByteTokenizer())["model"]:
        return "bytes"
    return None if own_vocabulary(folder) is None else "gpt2"


def _check_ids(path: Path, ids: Mapping[str, Any], vocabularies: list[Path]) -> None:
    """Raise InputError unless {token: id} are the ids that GPT-2's merges give."""
    if not vocabularies:
        return
    encoding = GPT2Tokenizer(vocabularies[0]).encoding
    for rank in range(encoding.n_vocab - 1):
        text = "".join(map(BYTE_CHARACTERS.__getitem__, encoding.decode_single_token_bytes(rank)))
        if ids.get(text) != rank:
            raise InputError(f"{path} {_OTHER} (token {rank} has another id there)")


def _check_settings(folder: Path) -> set[str]:
    """Return the added tokens; raise InputError for settings with which text is encoded differently."""
    added: set[str] = set()
    path = folder / "tokenizer_config.json"
    if path.is_file():
        settings = read_object(path)
        if settings.get("tokenizer_class") not in _CLASSES or settings.get("auto_map"):
            raise InputError(f"{path}: the tokenizer {settings.get('tokenizer_class')!s:.80} {_OTHER}")
        for key in ("add_prefix_space", "add_bos_token", "add_eos_token", "do_lower_case"):
            if settings.get(key):
                raise InputError(f"{path}: {key} is {settings[key]!r:.80}, which {_OTHER}")
        decoder = settings.get("added_tokens_decoder")
        entries = decoder.values() if isinstance(decoder, dict) else []
        added |= {str(entry.get("content")) for entry in entries if isinstance(entry, dict)}
    path = folder / "tokenizer.json"
    if path.is_file():
        entries = read_object(path, LISTING)
        before = entries.get("pre_tokenizer")
        before = before if isinstance(before, dict) else {}
        if before.get("type") != "ByteLevel" or before.get("add_prefix_space") or entries.get("normalizer"):
            raise InputError(f"{path} {_OTHER} (it preprocesses text differently)")
        ids = entries["model"].get("vocab") if isinstance(entries.get("model"), dict) else None
        _check_ids(path, ids if isinstance(ids, dict) else {}, [path])
        tokens = entries.get("added_tokens")
        added |= {str(t.get("content")) for t in tokens if isinstance(t, dict)} if isinstance(tokens, list) else set()
    path = folder / "added_tokens.json"
    if path.is_file():
        added |= read_object(path, LISTING).keys()
    return added - {END_OF_TEXT}


def write_tokenizer(folder: Path, tokenizer: Tokenizer, n_ctx: int) -> None:
    """Write the files from which transformers' AutoTokenizer loads the same tokenizer.

    Args:
        folder: The folder of the model, which must exist.
        tokenizer: GPT-2's or the bytes tokenizer.
        n_ctx: Length of the model's context.
    """
    settings = {
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": n_ctx,
    }
    if isinstance(tokenizer, GPT2Tokenizer):
        ids = {_written(tokenizer, id): id for id in range(tokenizer.n_vocab - 1)} | {END_OF_TEXT: tokenizer.eos_id}
        (folder / "merges.txt").write_bytes(merges_text(tokenizer.vocab_bpe))
        (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
        settings["tokenizer_class"] = "GPT2Tokenizer"
    elif isinstance(tokenizer, ByteTokenizer):
        (folder / "tokenizer.json").write_text(json.dumps(_bytes_as_json(tokenizer)), encoding="utf-8")
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _written(tokenizer: Tokenizer, id: int) -> str:
    return "".join(map(BYTE_CHARACTERS.__getitem__, tokenizer.token_bytes(id)))


def _bytes_as_json(tokenizer: ByteTokenizer) -> dict[str, Any]:
    """The bytes tokenizer as a byte-level BPE without merges."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": tokenizer.eos_id, "content": END_OF_TEXT, **flags, "special": True}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {**{_written(tokenizer, id): id for id in range(256)}, END_OF_TEXT: tokenizer.eos_id},
            "merges": [],
        },
    }
