"""One model over many devices: a mesh, and which of its axes each axis of a parameter is divided along.

The rules are by axis letter (parity/config.py), applied from outside: the model knows no mesh, and XLA puts the
collectives in. `data`: copies of the model, each with its part of the batch. `fsdp`: parameters and optimizer
divided along D, gathered where they are used; the batch is divided along it too. `tensor`: heads, MLP and
vocabulary divided, activations summed.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
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
BATCH = ("data", "fsdp")
"""A batch's rows"""


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """How many devices lie along each axis of the mesh; `data=2,fsdp=2,tensor=2` on the command line."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    @classmethod
    def parse(cls, text: str) -> "MeshShape":
        """Raises InputError for what is not of the form `data=2,fsdp=2,tensor=2`, in any order, any left out."""
        known = {field.name for field in dataclasses.fields(cls)}
        found: dict[str, int] = {}
        for part in text.split(","):
            name, _, size = part.strip().partition("=")
            if name not in known or name in found or not size.isdecimal() or int(size) < 1:
                raise InputError(f"--mesh {text!r}: write data=2,fsdp=2,tensor=2, each a count of devices, once")
            found[name] = int(size)
        return cls(**found)

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in dataclasses.asdict(self).items())

    @property
    def size(self) -> int:
        return self.data * self.fsdp * self.tensor

    def check(self, config: GPTConfig, micro_size: int) -> None:
        """Raise InputError unless the model and its micro-batches can be divided so."""
        for letter, name, size in (("D", "n_embd", self.fsdp), ("N", "n_head", self.tensor)):
            if config.axes[letter] % size:
                raise InputError(f"--mesh: {name}={config.axes[letter]} is not divisible by {RULES[letter]}={size}")
        if micro_size % (self.data * self.fsdp):
            raise InputError(
                f"--mesh: micro-batches of {micro_size} windows are not divisible by data x fsdp = "
                f"{self.data * self.fsdp}; change --batch-size or --accumulate"
            )


def make_mesh(shape: MeshShape, device_kind: str | None = None) -> Mesh:
    """A mesh over the first devices of a kind; several processes use all they have.

    Raises InputError where there are too few, or some process would have none of its devices in it.
    """
    devices = sorted(jax.devices(device_kind), key=lambda device: (device.process_index, device.id))
    if shape.size > len(devices) or (jax.process_count() > 1 and shape.size < len(devices)):
        there = f"{len(devices)} ({devices[0].platform})"
        if jax.process_count() > 1:
            there += f" in {jax.process_count()} processes, which use all of them"
        raise InputError(f"--mesh needs {shape.size} devices, there are {there}")
    sizes = (shape.data, shape.fsdp, shape.tensor)
    return Mesh(np.asarray(devices[: shape.size]).reshape(sizes), ("data", "fsdp", "tensor"))


def partition_spec(row: Row, config: GPTConfig, mesh: Mesh) -> P:
    """Along which axis of the mesh each axis of a parameter of gpt_jax is divided.

    A vocabulary that cannot be divided evenly (50,257 is odd) stays whole.
    """
    letters = row.axes["flax"].split()
    along = [
        RULES[letter] if letter in RULES and _divides(letter, config, dict(mesh.shape)) else None for letter in letters
    ]
    return P(*([None] if row.per_layer else []), *along)


def shardings(tree: Any, config: GPTConfig, mesh: Mesh, name_of: Callable[[tuple], str]) -> Any:
    """A NamedSharding for each leaf of a model, an optimizer's state, or both; `name_of` its path.

    A leaf is divided as the parameter that its name ends with; others (counts) are on every device.
    """
    specs = {row.flax: partition_spec(row, config, mesh) for row in weights.rows(config)}

    def one(path: tuple, _: Any) -> NamedSharding:
        name = name_of(path)
        found = [s for flax, s in specs.items() if name == flax or name.endswith("." + flax)]
        return NamedSharding(mesh, found[0] if found else P())

    return jax.tree_util.tree_map_with_path(one, tree)


def shard_activations(mesh: Mesh | None) -> contextlib.AbstractContextManager[None]:
    """Within it, models that are traced have their activations divided: rows, heads and the MLP, but never D.

    Left to itself, XLA may follow the parameters' `fsdp` into D and gather the batch instead: right, but with
    all activations of all rows on each device.
    """
    if mesh is None:
        return contextlib.nullcontext()
    along = {"B": BATCH, "N": RULES["N"], "F": RULES["F"]}

    def constrain(axes: str, x: Array) -> Array:
        divided = NamedSharding(mesh, P(*[along.get(letter) for letter in axes.split()]))
        return jax.lax.with_sharding_constraint(x, divided)

    return taps.constraining(constrain)


def device_put_tree(tree: Any, placed: Any) -> Any:
    """Arrays that every process has, divided as `placed` says; a process puts its own parts on its devices."""

    def one(leaf: Any, sharding: NamedSharding) -> Array:
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(one, tree, placed)


def _same(tree: Any) -> Any:
    return tree  # a function with a name, so that gather() compiles once


def gather(tree: Any, mesh: Mesh) -> Any:
    """The arrays whole, on one of this process's devices; every process takes part."""
    whole = jax.jit(_same, out_shardings=NamedSharding(mesh, P()))(tree)
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), whole)


def local_rows(size: int, mesh: Mesh) -> slice:
    """Which of a batch's `size` rows lie on this process's devices, which are neighbours in the mesh."""
    places = NamedSharding(mesh, P(BATCH)).addressable_devices_indices_map((size,)).values()
    bounds = [place[0].indices(size) for place in places if place is not None]
    return slice(min(first for first, *_ in bounds), max(last for _, last, _ in bounds))


def bytes_per_device(config: GPTConfig, shape: MeshShape, itemsize: int = 4) -> int:
    """Bytes of the parameters that each device holds, by the rules above."""
    sizes = dataclasses.asdict(shape)
    total = 0
    for row in weights.rows(config):
        letters = row.axes["flax"].split()
        counts = [config.axes[letter] for letter in letters]
        divided = math.prod(sizes[RULES[x]] for x in letters if x in RULES and _divides(x, config, sizes))
        total += math.prod(counts) // divided * (config.n_layer if row.per_layer else 1)
    return total * itemsize


def _divides(letter: str, config: GPTConfig, sizes: dict[str, int]) -> bool:
    return config.axes[letter] % sizes[RULES[letter]] == 0
