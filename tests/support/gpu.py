"""Programs for GPUs that are not here."""

import functools
from importlib.metadata import PackageNotFoundError, version

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from gpt_jax.decoding import DecodingModel
from gpt_jax.generation_loop import FlatModel, StaticOptions, _cached_loop, _start, cache_growth
from gpt_jax.gpu_targets import COMPILER_OPTIONS, target
from gpt_jax.model import GPTModel, cast
from gpt_jax.sharding import MeshShape
from parity.generation import prepare
from parity.sampling import seen_tokens


def has_cuda_plugin():
    """Whether the extra cuda13 is installed; it needs no GPU."""
    try:
        return bool(version("jax-cuda13-plugin"))
    except PackageNotFoundError:
        return False


def compile_decoding(config, batch_size, n_prompt, options, n_slots=None, gpu="H100", dtype="bfloat16"):
    """Compile the loop over tokens for a GPU, with caches of `n_slots`, by default those of the first tokens.

    With XLA's own kernels for the products: for a few rows they read the weights as they are, and cuBLAS does not.
    """
    device = SingleDeviceSharding(target(gpu, MeshShape()))
    request = prepare(config, [[0] * n_prompt] * batch_size, config.n_ctx - n_prompt, options)
    static = StaticOptions(request.active, request.return_logprobs)
    decoder = jax.eval_shape(lambda: DecodingModel(cast(GPTModel(config, None), dtype), 1))
    weights = FlatModel.of(decoder)
    growth = cache_growth(decoder, batch_size)
    length = n_slots or min(request.cache_length, n_prompt // growth * growth + growth)
    inputs = jax.tree.map(jnp.asarray, request.inputs)
    seen = seen_tokens(request.prompts, config.n_vocab) if request.active.repetition_penalty else None
    prompts = jnp.asarray(request.tokens), seen
    state = jax.eval_shape(functools.partial(_start, cache_length=length, static=static), weights, *prompts, inputs)
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        (weights, state, inputs, jnp.int32(0)),
    )
    return _cached_loop.lower(*arguments, static=static).compile(
        {**COMPILER_OPTIONS, "xla_gpu_enable_triton_gemm": True}
    )
