"""A model divided into the part that is trained and the part that is frozen; gpt_torch sets requires_grad instead.

Both parts are pytrees of the model's own structure. The trainable one has no values where a parameter is frozen, so
that gradients and optimizer state, which have its structure, hold nothing for what is not trained. The frozen one has
none where a parameter is trained in all layers.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from gpt_jax.model import GPTModel
from parity.weights import Row


def parameter_name(path: tuple) -> str:
    """Return the name of a leaf in the flax column of the weight table, for example `trf_blocks.norm1.scale`."""
    return jax.tree_util.keystr(path).strip(".").removesuffix(".value")


def split(model: GPTModel, table: Sequence[Row]) -> tuple[GPTModel, GPTModel]:
    """Divide a model; join() undoes it.

    Args:
        model: The model.
        table: The rows of the parameters that are trained; a row that is limited to some layers trains those alone.

    Returns:
        (the trainable part, the frozen part). In the trainable part a stack has the trained layers alone; in the frozen
        part it has all layers.
    """
    trained = {row.flax: row.layers for row in table}

    def trainable(path: tuple, leaf: Any) -> Any:
        name = parameter_name(path)
        if name not in trained:
            return None
        layers = trained[name]
        return leaf if layers is None else leaf[np.asarray(layers)]

    def frozen(path: tuple, leaf: Any) -> Any:
        name = parameter_name(path)
        return None if name in trained and trained[name] is None else leaf

    return jax.tree_util.tree_map_with_path(trainable, model), jax.tree_util.tree_map_with_path(frozen, model)


def join(trainable: GPTModel, frozen: GPTModel | None, table: Sequence[Row]) -> GPTModel:
    """Return the model of which split() made these parts; without a frozen part, everything is trained."""
    if frozen is None:
        return trainable
    layers = {row.flax: row.layers for row in table}

    def leaf(path: tuple, own: Any, other: Any) -> Any:
        if own is None or other is None:
            return other if own is None else own
        return other.at[np.asarray(layers[parameter_name(path)])].set(own)

    return jax.tree_util.tree_map_with_path(leaf, trainable, frozen, is_leaf=lambda node: node is None)
