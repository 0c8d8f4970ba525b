"""Sources of every kind for preparations, and tokenizers that kill their process once."""

import gzip
import json
import os
import random
import signal
import threading
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from parity.data.tokenizer import END_OF_TEXT, ByteTokenizer

SETTINGS = {
    "no validation": {"validation_fraction": 0.0, "shard_tokens": 1000},
    "shards smaller than documents": {"validation_fraction": 0.3, "shard_tokens": 177},
    "one shard": {"validation_fraction": 0.05, "shard_tokens": 10**8},
    "shards larger than files": {"validation_fraction": 0.1, "shard_tokens": 9973},
    "as much for validation as for training": {"validation_fraction": 0.5, "shard_tokens": 499},
}
_WORDS = ["alpha", "beta", " gamma", "\n", "  ", "naïve", "日本", "x", ". ", '"q"', "\t"]


def write_mixed(folder):
    """Write files of several kinds, one of them without a document, and return the texts of all in order."""
    chance = random.Random(0)

    def texts(count):
        return ["".join(chance.choice(_WORDS) for _ in range(chance.randrange(40))) for _ in range(count)]

    folder.mkdir()
    documents = {
        name: texts(count) for name, count in [("a", 60), ("b", 50), ("c", 40), ("e", 30), ("f", 70), ("h", 1)]
    }
    lines = {name: "".join(json.dumps({"text": text}) + "\n" for text in texts) for name, texts in documents.items()}
    (folder / "a.jsonl").write_text(lines["a"])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines["b"].encode()))
    (folder / "c.txt").write_text(END_OF_TEXT.join(documents["c"]), encoding="utf-8")
    (folder / "d.txt").write_text("")
    (folder / "e.json").write_text(json.dumps([{"text": text} for text in documents["e"]]))
    pyarrow.parquet.write_table(pyarrow.table({"text": documents["f"]}), folder / "f.parquet")
    (folder / "g.txt.gz").write_bytes(gzip.compress(b"one long document\n" * 100))
    (folder / "h.ndjson").write_text(lines["h"])
    ordered = [documents[name] for name in "abcef"]
    return [text for texts in [*ordered, ["one long document\n" * 100], documents["h"]] for text in texts if text]


def split_tokens(texts, fraction, tokenizer):
    """Return the tokens of each split, by the rule of docs/reference/file-formats.md."""
    splits = {"train": [], "val": []}
    for number, text in enumerate(texts):
        is_validation = zlib.crc32(number.to_bytes(8, "little")) < fraction * 2**32
        splits["val" if is_validation else "train"] += [*tokenizer.encode(text), tokenizer.eos_id]
    return {split: np.array(ids, np.uint16) for split, ids in splits.items()}


def prepared_files(folder):
    """Return the content of every file of a prepared folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


class _KillingTokenizer(ByteTokenizer):
    """Kills its process at a chosen use, but only the first one that gets there.

    Args:
        marker: A file that is created at that moment.
        count: Number of the use within a piece of work.
    """

    def __init__(self, marker, count):
        self.marker, self.count = Path(marker), count

    def use(self):
        self.count -= 1
        if self.count == 0:
            try:
                self.marker.touch(exist_ok=False)
            except FileExistsError:
                return
            self.kill()

    def kill(self):
        os.kill(os.getpid(), signal.SIGKILL)


class KilledInFirstPass(_KillingTokenizer):
    def encode_array(self, text):
        self.use()
        return super().encode_array(text)


class KilledInSecondPass(_KillingTokenizer):
    @property
    def n_vocab(self):  # is read once per shard
        self.use()
        return 257


class _NodeKillingTokenizer:
    def kill(self):
        """Kill the process of Ray that has started this one, which ends the node."""
        os.kill(os.getppid(), signal.SIGKILL)
        super().kill()


class NodeKilledInFirstPass(_NodeKillingTokenizer, KilledInFirstPass):
    pass


class NodeKilledInSecondPass(_NodeKillingTokenizer, KilledInSecondPass):
    pass


def announce_and_wait():
    """Do work that never ends."""
    os.write(1, b"begun\n")  # in one piece, whatever buffers the output
    threading.Event().wait()
