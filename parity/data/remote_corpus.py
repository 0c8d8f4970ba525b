"""A prepared folder at an address."""

import hashlib
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

from parity.data import shard_index
from parity.data.shard_cache import (
    LIMIT_VARIABLE,
    RemoteTokens,
    Shard,
    ShardCache,
    corpora_folder,
)
from parity.errors import InputError
from parity.storage.atomic import replace_text
from parity.storage.remote import MissingError, Remote, open_remote
from parity.storage.retry import retrying


def open_prepared(address: str, id_limit: int) -> tuple[str, dict[str, Any], dict[str, list[RemoteTokens]]]:
    """Read the index of a prepared folder at an address; its shards are fetched when they are read.

    Args:
        address: The folder that scripts/prepare_data.py wrote, copied to an address.
        id_limit: A number that all ids of the shards are below.

    Returns:
        (the address for messages, the content of index.json, {split: its shards}).

    Raises:
        InputError: If there is no such folder, its preparation is unfinished, or the cache is smaller than a shard.
    """
    remote = open_remote(address)
    folder, index = _cached_index(remote)
    cache = ShardCache(remote, folder)
    limit = cache.limit
    splits = {
        split: [Shard(entry["name"], entry["tokens"], entry["sha256"]) for entry in index["splits"][split]["done"]]
        for split in shard_index.SPLITS
    }
    sizes = [shard.size for shards in splits.values() for shard in shards]
    if max(sizes, default=0) > limit:
        raise InputError(
            f"{remote.address} has shards of {max(sizes):,} bytes, but the cache {corpora_folder()} may take only "
            f"{limit:,}; make room, or raise {LIMIT_VARIABLE}"
        )
    if sum(sizes) > limit:
        warnings.warn(
            f"{remote.address} has {sum(sizes) / 1e9:,.1f} GB, but the cache {corpora_folder()} may take only "
            f"{limit / 1e9:,.1f} GB: shards will be fetched again and again, because each batch has windows from many "
            f"of them; make room, raise {LIMIT_VARIABLE}, or name another disk with GPT_PARITY_CACHE",
            stacklevel=2,
        )
    return (
        remote.address,
        index,
        {split: [RemoteTokens(cache, shard, id_limit) for shard in shards] for split, shards in splits.items()},
    )


def _cached_index(remote: Remote) -> tuple[Path, dict[str, Any]]:
    """Return the folder of the cache for the corpus, which holds its index.json, and the content of that."""
    try:
        content = retrying(remote.read, shard_index.INDEX)
    except MissingError as error:
        raise InputError(
            f"{error}; a corpus at an address is a folder that scripts/prepare_data.py wrote, copied as it is"
        ) from None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / shard_index.INDEX).write_bytes(content)
        try:
            index = shard_index.load_index(folder)
        except InputError as error:
            raise InputError(str(error).replace(str(folder), remote.address)) from None
    if not index["complete"]:
        raise InputError(
            f"{remote.address} is not fully prepared; finish it with scripts/prepare_data.py, and copy it again"
        )
    # Named by its content: another corpus at the same address has another folder, a copy at another address the same.
    folder = corpora_folder() / hashlib.sha256(content).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / shard_index.INDEX).exists():
        replace_text(folder / shard_index.INDEX, json.dumps(index, indent=1) + "\n", shared=True)
    return folder, index
