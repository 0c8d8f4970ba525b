"""The train state on disk: an orbax folder with all of it, and the weights, which either backend can load."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax import Array

from parity.errors import InputError
from parity.training import checkpoints
from parity.training.optimizer_state import ORBAX_FOLDER, plain_path


def save(folder: Path, model: Any, arrays: dict[str, Array], write: Callable[[Any, Path], None]) -> None:
    """Write a train state, and return when all of it has been written.

    All processes of a run call this: each writes its shards of `arrays`, and the first one writes the model.

    Args:
        folder: An existing folder.
        model: What `write` writes: the model, or the part of it that is trained, unsharded.
        arrays: The train state by name; it becomes the folder state/.
        write: Writes the model into the folder, in files that either backend can load.

    Raises:
        OSError: If the disk has no room for it or refuses a write.
    """
    checkpoints.require_space(folder, sum(leaf.nbytes for leaf in jax.tree.leaves((model, arrays))))
    with plain_path(folder) as plain, ocp.StandardCheckpointer() as checkpointer:
        logger = logging.getLogger("absl")  # orbax logs the traceback of an error that it also raises
        before, logger.disabled = logger.disabled, True
        try:
            checkpointer.save(plain / ORBAX_FOLDER, arrays)
            checkpointer.wait_until_finished()
        except ValueError as error:  # what tensorstore raises on a full disk
            _wait_until_unchanged(folder)
            raise OSError(str(error).splitlines()[0]) from error
        finally:
            logger.disabled = before
    if jax.process_index() == 0:
        write(model, folder)


def _wait_until_unchanged(folder: Path, quiet: float = 1.0, deadline: float = 30.0) -> None:
    """Wait until nothing in a folder has changed for `quiet` seconds, at most `deadline` seconds.

    When one write fails, others of tensorstore's are still running on its threads, and nothing waits for them. They
    would recreate a folder that is deleted in the meantime.
    """
    last: dict[Path, int] = {}
    started = changed = time.monotonic()
    while time.monotonic() < min(changed + quiet, started + deadline):
        try:
            current = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        except FileNotFoundError:  # deleted while it was listed
            current = {}
        if current != last:
            last, changed = current, time.monotonic()
        time.sleep(quiet / 10)


def restore(folder: Path, like: dict[str, Array]) -> dict[str, Array]:
    """Return the arrays that save() wrote to `folder`, sharded like those of `like`.

    Raises:
        InputError: If there are none, or if their names, shapes or dtypes differ from those of `like`.
    """
    with plain_path(folder) as plain, ocp.StandardCheckpointer() as checkpointer:
        path = plain / ORBAX_FOLDER
        try:
            metadata = checkpointer.metadata(path).item_metadata
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{folder / ORBAX_FOLDER} is not a train state of gpt_jax ({error})") from None
        if metadata is None:
            raise InputError(f"{folder / ORBAX_FOLDER} is not a train state of gpt_jax (it has no metadata)")
        stored = {name: (tuple(metadata[name].shape), metadata[name].dtype) for name in metadata}
        expected = {name: (array.shape, array.dtype) for name, array in like.items()}
        # orbax would cast another dtype silently.
        if different := [
            f"{name} is {stored.get(name)} in the checkpoint, {expected.get(name)} in this run"
            for name in sorted(stored.keys() | expected.keys())
            if stored.get(name) != expected.get(name)
        ]:
            raise InputError(f"{folder / ORBAX_FOLDER} does not fit this run: {'; '.join(different)}")
        return checkpointer.restore(path, jax.tree.map(ocp.utils.to_shape_dtype_struct, like))
