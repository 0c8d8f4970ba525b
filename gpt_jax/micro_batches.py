"""The largest micro-batch whose training step fits a device: --accumulate auto."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
from jax.sharding import Mesh

from gpt_jax.lowering import StepOptions, lower_train_step, memory_bytes, platform_of
from gpt_jax.memory import memory
from gpt_jax.sharding import MeshShape
from parity.config import GPTConfig
from parity.errors import InputError
from parity.training.processes import ALONE, Processes
from parity.training.settings import TrainSettings

RESERVED = 0.75
"""Part of a GPU's memory that JAX reserves, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise."""
USABLE = 0.97
"""Part of that memory that a step may take; fragmentation and libraries take the rest."""
_TOLERANCE = 1.1
"""A micro-batch whose estimate exceeds the limit by less than this is compiled, because the estimate may be wrong."""


def memory_limit(devices: Sequence[jax.Device]) -> int | None:
    """Return the bytes that JAX may allocate on each device of this process; None if they do not report it, as CPUs.

    On a GPU this is the part that JAX reserves; see RESERVED.
    """
    own = (device for device in devices if device.process_index == jax.process_index())
    return min((device.memory_stats() or {}).get("bytes_limit", 0) for device in own) or None


def possible_numbers(batch_size: int, shape: MeshShape) -> list[int]:
    """Return the numbers of micro-batches that divide a batch evenly over a mesh, in ascending order.

    Raises:
        InputError: If there is none.
    """
    rows = shape.data * shape.fsdp
    if batch_size % rows:
        raise InputError(f"--mesh: batches of {batch_size} windows are not divisible by data x fsdp = {rows}")
    return [number for number in range(1, batch_size // rows + 1) if batch_size // rows % number == 0]


def choose_micro_batch(
    config: GPTConfig,
    settings: TrainSettings,
    options: StepOptions,
    devices: Mesh | jax.Device,
    limit: int,
    processes: Processes = ALONE,
    report: Callable[[str], object] = lambda text: None,
) -> tuple[TrainSettings, int]:
    """Find the largest micro-batch whose compiled step fits the devices. All processes of a run must call this.

    The estimate of memory() decides where the search begins, and the memory of compiled programs where it ends. Trainer
    compiles the same programs, so that a persistent compilation cache has them when the training starts.

    Args:
        config: The model's configuration.
        settings: Settings of the run; their `accumulate` is not used.
        options: Attention, unroll and remat.
        devices: The mesh, or the single device.
        limit: Bytes that JAX may allocate on each device; the smallest of all processes counts.
        processes: The processes of the run.
        report: Called with a line of text before each compilation.

    Returns:
        The settings with the number of micro-batches, and the bytes that the step takes on each device.

    Raises:
        InputError: If not even the smallest micro-batch fits.
    """
    shape = MeshShape(**devices.shape) if isinstance(devices, Mesh) else MeshShape()
    numbers = possible_numbers(settings.batch_size, shape)
    limit = -processes.all_reduce_max(-limit)

    def estimate(number: int) -> int:
        micro_size = settings.batch_size // number
        return memory(
            config, shape, micro_size, settings.dtype, options.remat, options.attention, platform_of(devices)
        ).total

    def compile_step(number: int) -> int:
        report(f"compiling  the step with {settings.batch_size // number} windows per micro-batch, to see if it fits")
        lowered = lower_train_step(config, dataclasses.replace(settings, accumulate=number), options, devices)
        try:
            needed = memory_bytes(lowered.compile())
        except jax.errors.JaxRuntimeError as error:  # the compiler tries kernels on the device
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            needed = 2**61
        return processes.all_reduce_max(needed)

    number, needed = search({number: estimate(number) for number in numbers}, compile_step, int(USABLE * limit))
    if needed > USABLE * limit:
        hint = "" if options.remat == "all" else "--remat all, "
        raise InputError(
            f"the step takes {needed / 1e9:.2f} GB with {settings.batch_size // number} windows per micro-batch, and "
            f"JAX may allocate {limit / 1e9:.2f} GB on each device; use {hint}a mesh with fsdp, or a smaller model"
        )
    return dataclasses.replace(settings, accumulate=number), needed


def search(estimates: Mapping[int, int], compile_step: Callable[[int], int], limit: int) -> tuple[int, int]:
    """Find the smallest number of micro-batches whose step takes at most `limit` bytes.

    Args:
        estimates: {number of micro-batches: estimated bytes}, in ascending order of the numbers.
        compile_step: Returns the bytes that the compiled step takes.
        limit: Bytes of memory.

    Returns:
        The number and the bytes of its step; the largest number, and more bytes than the limit, if none fits.
    """
    numbers = list(estimates)
    index = next((i for i, number in enumerate(numbers) if estimates[number] <= limit), len(numbers) - 1)
    needed = compile_step(numbers[index])
    if needed > limit:
        while needed > limit and index + 1 < len(numbers):
            index += 1
            needed = compile_step(numbers[index])
        return numbers[index], needed
    while index > 0:  # as long as the estimate, corrected by what is known, promises that more fits
        correction = needed / estimates[numbers[index]]
        if correction * estimates[numbers[index - 1]] > _TOLERANCE * limit:
            break
        larger = compile_step(numbers[index - 1])
        if larger > limit:
            break
        index, needed = index - 1, larger
    return numbers[index], needed
