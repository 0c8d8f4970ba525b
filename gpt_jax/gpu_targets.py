"""GPUs that programs can be compiled for on a machine without one, with JAX's extra cuda13 installed."""

import dataclasses

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from gpt_jax.sharding import MESH_AXES, MeshShape
from parity.errors import InputError, check_choice, install_extras


@dataclasses.dataclass(frozen=True)
class GPU:
    """The figures of a GPU's data sheet that depend on its memory; the rest is the same for all of GPUS."""

    memory_bytes: int
    """Bytes of device memory that the driver reports."""
    bandwidth: float
    """Bytes per second between the device memory and the chip."""


GPUS = {"H100": GPU(84_942_979_072, 3.35e12), "H200": GPU(151_397_597_184, 4.8e12)}

# XLA's GpuTargetConfigProto, with the facts of the SXM modules of NVIDIA's Hopper generation (compute capability 9.0).
_HOPPER = """
gpu_device_info {{
  name: "NVIDIA {name}" cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  device_memory_size: {memory} memory_bandwidth: {bandwidth} l2_cache_size: 52428800
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.12.0"
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }} device_description_str: "NVIDIA {name}"
"""


COMPILER_OPTIONS: dict[str, str | bool] = {
    # XLA measures whether its own kernels or cuBLAS's multiply faster. Without a GPU it cannot measure.
    "xla_gpu_enable_triton_gemm": False,
    # Notes at each product the time of XLA's table of measured products, which roofline.read() uses.
    "xla_gpu_collect_cost_model_stats": True,
}
"""Options of lowered.compile() for a target()."""


def target(name: str, shape: MeshShape) -> Mesh | jax.Device:
    """Return descriptions of GPUs of one machine, for which jax.jit(...).lower(...).compile() compiles.

    They hold no arrays; their use is in the shardings of jax.ShapeDtypeStruct.

    Args:
        name: One of GPUS.
        shape: Number of GPUs along each axis of the mesh.

    Returns:
        The mesh, or for one GPU the device.

    Raises:
        InputError: For an unknown name, and if JAX's CUDA plugin is not installed.
    """
    check_choice("GPU", name, tuple(GPUS))
    gpu = GPUS[name]
    description = _HOPPER.format(name=name, memory=gpu.memory_bytes, bandwidth=int(gpu.bandwidth))
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology=f"1x1x{shape.size}", target_config=description
        )
    except Exception as error:  # of a type that depends on what is missing
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"no program can be compiled for an {name} here ({reason:.200}); it needs no GPU, but the extra cuda13: "
            f"{install_extras('jax,cuda13')}"
        ) from None
    if shape.size == 1:
        return topology.devices[0]
    return Mesh(np.reshape(topology.devices, (shape.data, shape.fsdp, shape.tensor)), MESH_AXES)
