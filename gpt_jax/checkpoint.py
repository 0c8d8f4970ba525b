"""A train state on disk: orbax for all of it, and model.safetensors that either backend reads."""

import logging
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jax import Array

from gpt_jax.model import GPTModel
from gpt_jax.pretrained import save_pretrained
from parity.errors import InputError
from parity.training import checkpoints
from parity.training.optimizer_state import ORBAX_FOLDER


def save(folder: Path, model: GPTModel, arrays: dict[str, Array]) -> None:
    """Write `arrays` (orbax) and the model's weights (safetensors) into an existing folder; waits until written.

    Of several processes each writes its parts of `arrays`, and the first one the model. Raises OSError where the
    disk does not take them.
    """
    checkpoints.require_space(folder, 4 * sum(leaf.nbytes for leaf in jax.tree.leaves(model)))
    with ocp.StandardCheckpointer() as checkpointer:
        logger = logging.getLogger("absl")  # there orbax writes the stack of an error that is raised too
        before, logger.disabled = logger.disabled, True
        try:
            checkpointer.save(folder.absolute() / ORBAX_FOLDER, arrays)
            checkpointer.wait_until_finished()
        except ValueError as error:  # tensorstore's word for a full disk
            raise OSError(str(error).splitlines()[0]) from error
        finally:
            logger.disabled = before
    if jax.process_index() == 0:
        save_pretrained(model, folder)


def restore(folder: Path, like: dict[str, Array]) -> dict[str, Array]:
    """The arrays saved in `folder`; raises InputError unless names, shapes and dtypes are those of `like`."""
    with ocp.StandardCheckpointer() as checkpointer:
        path = folder.absolute() / ORBAX_FOLDER
        try:
            stored = checkpointer.metadata(path).item_metadata
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{path} is no train state of gpt_jax ({error})") from None
        found = {name: (tuple(stored[name].shape), stored[name].dtype) for name in stored}
        wanted = {name: (array.shape, array.dtype) for name, array in like.items()}
        different = [
            f"{name} is {found.get(name)} there, {wanted.get(name)} here"
            for name in sorted(found.keys() | wanted.keys())
            if found.get(name) != wanted.get(name)
        ]
        if different:
            raise InputError(f"{path} does not fit this run: {'; '.join(different)}")
        return checkpointer.restore(path, jax.tree.map(ocp.utils.to_shape_dtype_struct, like))
