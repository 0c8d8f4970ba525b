"""A model sharded over many devices: the mesh, and the mesh axis along which each axis of a parameter is sharded.

The rules name axes by letter (parity/config.py) and are applied from outside: the model does not know the mesh, and XLA
inserts the collectives. The axes of the mesh are

    data    replicas of the model, each with its shard of the batch
    fsdp    parameters and optimizer state sharded along D and gathered where they are used; also shards the batch
    tensor  heads, MLP and vocabulary sharded; activations are summed by an all-reduce
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from parity import taps, weights
from parity.config import GPTConfig
from parity.errors import InputError
from parity.weights import Row

RULES = {"D": "fsdp", "N": "tensor", "F": "tensor", "V": "tensor"}
MESH_AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
"""The mesh axes that shard the rows of a batch."""


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Number of devices along each axis of the mesh; on the command line, `data=2,fsdp=2,tensor=2`."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    @classmethod
    def parse(cls, text: str) -> "MeshShape":
        """Parse a text such as `data=2,fsdp=2,tensor=2`. Axes may be in any order; an omitted axis has size 1.

        Raises:
            InputError: For a text of another form.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        sizes: dict[str, int] = {}
        for part in text.split(","):
            name, _, size = part.strip().partition("=")
            if name not in known or name in sizes or not size.isdecimal() or int(size) < 1:
                raise InputError(
                    f"--mesh {text!r}: write data=2,fsdp=2,tensor=2, each axis at most once with a number of devices"
                )
            sizes[name] = int(size)
        return cls(**sizes)

    @classmethod
    def chosen(cls, option: str | None) -> "MeshShape | None":
        """Return the shape that --mesh asks for: without the option that of all devices of several processes, or None
        for one device of one process.
        """
        if option is None and jax.process_count() == 1:
            return None
        return cls(jax.device_count()) if option is None else cls.parse(option)

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in dataclasses.asdict(self).items())

    @property
    def size(self) -> int:
        return self.data * self.fsdp * self.tensor

    def check(self, config: GPTConfig, micro_size: int) -> None:
        """Raise InputError unless the model, and micro-batches of `micro_size` windows, can be sharded evenly."""
        for letter, name, size in (("D", "n_embd", self.fsdp), ("N", "n_head", self.tensor)):
            if config.axes[letter] % size:
                raise InputError(f"--mesh: {name}={config.axes[letter]} is not divisible by {RULES[letter]}={size}")
        if micro_size % (self.data * self.fsdp):
            raise InputError(
                f"--mesh: micro-batches of {micro_size} windows are not divisible by data x fsdp = "
                f"{self.data * self.fsdp}; change --batch-size or --accumulate"
            )


def choose_mesh(
    option: str | None, config: GPTConfig, micro_size: int | None, platform: str
) -> tuple[Mesh | None, MeshShape, str]:
    """Return the mesh of a run, its shape, and what the summary says about it.

    Args:
        option: The text of --mesh; see MeshShape.chosen().
        config: The model.
        micro_size: Number of rows of a micro-batch; None if it will be chosen later.
        platform: JAX's name of the platform.

    Raises:
        InputError: If the model, the micro-batches or the devices do not fit the mesh.
    """
    shape = MeshShape.chosen(option)
    if shape is None:
        return None, MeshShape(), ""
    shape.check(config, micro_size or shape.data * shape.fsdp)
    info = f", {shape.size} of them: {shape}"
    if jax.process_count() > 1:
        info += f" in {jax.process_count()} processes"
    return make_mesh(shape, platform), shape, info


def make_mesh(shape: MeshShape, device_kind: str | None = None) -> Mesh:
    """Return a mesh over the first devices of a kind.

    Args:
        shape: Number of devices along each axis.
        device_kind: JAX's name of the platform; by default the platform that JAX prefers.

    Raises:
        InputError: If there are too few devices, or if several processes would leave some of theirs unused.
    """
    devices = sorted(jax.devices(device_kind), key=lambda device: (device.process_index, device.id))
    if shape.size > len(devices) or (jax.process_count() > 1 and shape.size < len(devices)):
        available = f"{len(devices)} ({devices[0].platform})"
        if jax.process_count() > 1:
            available += f" in {jax.process_count()} processes, which must use all of them"
        elif devices[0].platform == "cpu":
            available += f". JAX_NUM_CPU_DEVICES={shape.size} divides a CPU into as many"
        raise InputError(f"--mesh needs {shape.size} devices; available: {available}")
    sizes = (shape.data, shape.fsdp, shape.tensor)
    return Mesh(np.asarray(devices[: shape.size]).reshape(sizes), MESH_AXES)


def partition_spec(row: Row, config: GPTConfig, mesh: Mesh) -> P:
    """Return the mesh axis along which each axis of a gpt_jax parameter is sharded.

    A vocabulary that cannot be divided evenly (50,257 is odd) is replicated.
    """
    letters = row.axes["flax"].split()
    mesh_axes = [
        RULES[letter] if letter in RULES and _divides(letter, config, dict(mesh.shape)) else None for letter in letters
    ]
    return P(*([None] if row.per_layer else []), *mesh_axes)


def shardings(
    tree: Any, config: GPTConfig, mesh: Mesh, name_of: Callable[[tuple], str], table: Sequence[Row] | None = None
) -> Any:
    """Return a NamedSharding for each leaf of a model, an optimizer state, or both.

    Args:
        tree: The leaves; only their paths matter.
        config: The model's configuration.
        mesh: The mesh.
        name_of: Returns the dotted name of a leaf's path. A leaf is sharded like the parameter whose
            name its name ends with; other leaves, such as the optimizer's count, are replicated.
        table: The rows of the parameters, by default those of the model.
    """
    table = weights.rows(config) if table is None else table
    specs = {row.flax: partition_spec(row, config, mesh) for row in table}

    def leaf_sharding(path: tuple, _: Any) -> NamedSharding:
        name = name_of(path)
        matching = [spec for flax, spec in specs.items() if name == flax or name.endswith("." + flax)]
        return NamedSharding(mesh, matching[0] if matching else P())

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def shard_activations(mesh: Mesh | None) -> contextlib.AbstractContextManager[None]:
    """Within this context, models that are traced have their activations sharded along rows, heads and the MLP.

    D is not sharded. Left to itself, XLA may follow the `fsdp` sharding of the parameters into D and gather the batch
    instead, which is correct but puts the activations of all rows on every device.
    """
    if mesh is None:
        return contextlib.nullcontext()
    mesh_axes = {"B": BATCH, "N": RULES["N"], "F": RULES["F"]}

    def constrain(axes: str, x: Array) -> Array:
        spec = P(*[mesh_axes.get(letter) for letter in axes.split()])
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return taps.constraining(constrain)


def device_put_tree(tree: Any, tree_sharding: Any) -> Any:
    """Shard arrays of which every process has a complete copy; each process copies its shards to its devices.

    Args:
        tree: Arrays.
        tree_sharding: A NamedSharding for each of them.
    """

    def put(leaf: Any, sharding: NamedSharding) -> Array:
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, tree, tree_sharding)


def _identity(tree: Any) -> Any:
    return tree  # not a lambda in gather(): jax.jit caches compiled programs by function


def gather(tree: Any, mesh: Mesh) -> Any:
    """Return the unsharded arrays, on one device of this process. All processes must call this."""
    replicated = jax.jit(_identity, out_shardings=NamedSharding(mesh, P()))(tree)
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), replicated)


def local_rows(size: int, mesh: Mesh) -> slice:
    """Return the rows of a batch of `size` rows that lie on this process's devices; they are contiguous."""
    indices = NamedSharding(mesh, P(BATCH)).addressable_devices_indices_map((size,)).values()
    bounds = [index[0].indices(size) for index in indices if index is not None]
    return slice(min(first for first, *_ in bounds), max(last for _, last, _ in bounds))


def bytes_per_device(config: GPTConfig, shape: MeshShape, itemsize: int = 4) -> int:
    """Return the bytes of parameters that each device holds."""
    sizes = dataclasses.asdict(shape)
    total = 0
    for row in weights.rows(config):
        letters = row.axes["flax"].split()
        axis_sizes = [config.axes[letter] for letter in letters]
        shards = math.prod(sizes[RULES[x]] for x in letters if x in RULES and _divides(x, config, sizes))
        total += math.prod(axis_sizes) // shards * (config.n_layer if row.per_layer else 1)
    return total * itemsize


def _divides(letter: str, config: GPTConfig, sizes: dict[str, int]) -> bool:
    return config.axes[letter] % sizes[RULES[letter]] == 0
