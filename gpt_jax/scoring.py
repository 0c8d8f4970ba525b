"""Log-probabilities of given tokens in JAX; gpt_torch/scoring.py has the same functions.

Three programs compute them: the model, the choice of the positions that are scored, and the output head on a chunk of
those. The costly two have few shapes each, because lengths and numbers of positions do not multiply.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt_jax import sharding
from gpt_jax.loss import tiling_for
from gpt_jax.model import GPTModel, check_ids, head_logits
from gpt_jax.weights import config_of
from parity.config import GPTConfig
from parity.errors import InputError
from parity.evaluation.batches import TokenLogprobs, check_scoring, chunk_sizes


def token_logprobs(
    model: GPTModel, tokens: Array, first: int | None = None, last: int | None = None, top: int = 0
) -> TokenLogprobs:
    """Return the log-probabilities that the model gives to tokens of a text, each after the tokens before it.

    The vocabulary is projected at the scored positions only, and never all of [B, T, V] is in memory. Dropout is off.
    The function compiles what it calls.

    Args:
        model: The model.
        tokens: Integer ids [B, T], where T is at most n_ctx + 1, because the last token of a row is only scored.
        first: The first position that is scored; by default 0. Position i scores tokens[:, i + 1].
        last: The position after the last one that is scored; by default T - 1, which scores all tokens but the first.
        top: Number of the most likely tokens to return for each position.

    Returns:
        Arrays [B, last - first]; see TokenLogprobs for each.

    Raises:
        InputError: If T exceeds n_ctx + 1, an id is outside the vocabulary, or first, last or top is out of range.
            Under jax.jit the ids are unknown, so the log-probability of an id outside the vocabulary is NaN.
    """
    config = config_of(model)
    positions = check_scoring(config, np.shape(tokens), first, last, top)
    check_all_ids(tokens, config)
    B, K = len(tokens), len(positions)
    rows, columns = np.repeat(np.arange(B), K)[None], np.tile(positions, B)[None]  # each [1, B K]
    parts = zip(*_chunks(model, jnp.asarray(tokens), rows, columns, top), strict=True)
    flat = (jnp.concatenate(arrays, axis=1)[0, : B * K] for arrays in parts)
    return TokenLogprobs(*(array.reshape(B, K, *array.shape[1:]) for array in flat))


class BatchScorer:
    """Scores the batches of parity.evaluation.scorer.Scorer. Each device of a mesh computes its share of the rows.

    Args:
        model: The model; all processes have the same.
        mesh: Devices along the axis `data` (gpt_jax/sharding.py), each of which holds the whole model. By default the
            model stays on its device.

    Raises:
        InputError: If the mesh has devices along another axis.
    """

    def __init__(self, model: GPTModel, mesh: Mesh | None = None):
        self.config = config_of(model)
        if mesh is not None:
            if mesh.size != mesh.shape["data"]:
                raise InputError("--mesh: evaluation shards only the rows of a batch; give data=N and no other axis")
            model = sharding.device_put_tree(model, jax.tree.map(lambda _: NamedSharding(mesh, P()), model))
        self.model = model
        self._mesh = mesh
        self.n_shards = 1 if mesh is None else mesh.size
        """The number of rows of a batch must be a multiple of this."""
        self.tokens_per_batch = 2**11 if _platform(model) == "cpu" else 2**15
        """Number of tokens per batch, with padding, with which this device is fast."""

    def __call__(self, tokens: np.ndarray, rows: np.ndarray, columns: np.ndarray, top: int = 0) -> TokenLogprobs:
        """Score positions of a batch; all processes must call this with the same arguments.

        Args:
            tokens: Integer ids [B, T]; see token_logprobs().
            rows: Row of each scored position, int [R], ascending.
            columns: Column of each scored position, int [R]; position i scores tokens[:, i + 1].
            top: See token_logprobs().

        Returns:
            NumPy arrays [R].
        """
        check_all_ids(tokens, self.config)
        n_rows = len(tokens) // self.n_shards
        counts = np.bincount(rows // n_rows, minlength=self.n_shards)  # positions of each device
        is_position = np.arange(counts.max()) < counts[:, None]  # [devices, positions of the device with most]
        local_rows, local_columns = np.zeros((2, *is_position.shape), np.int64)
        local_rows[is_position], local_columns[is_position] = rows % n_rows, columns
        parts = zip(*_chunks(self.model, tokens, local_rows, local_columns, top, self._mesh), strict=True)
        flat = (np.concatenate(list(map(np.asarray, arrays)), axis=1) for arrays in parts)
        return TokenLogprobs(*(array[:, : is_position.shape[1]][is_position] for array in flat))


def check_all_ids(tokens: Any, config: GPTConfig) -> None:
    """Raise InputError for an id [B, T] outside the vocabulary; T may be n_ctx + 1, as the last id is only scored."""
    check_ids(tokens[:, :-1], config)
    check_ids(tokens[:, 1:], config)


def _chunks(
    model: GPTModel, tokens: Any, rows: np.ndarray, columns: np.ndarray, top: int, mesh: Mesh | None = None
) -> Iterator[TokenLogprobs]:
    """Yield the results of one chunk of the positions after another, until there are at least R.

    Args:
        model: The model, on the mesh if there is one.
        tokens: Integer ids [B, T].
        rows: Row of each position among the rows of its device, int [devices, R].
        columns: Column of each position, int [devices, R].
        top: See token_logprobs().
        mesh: Devices along the axis `data`.

    Yields:
        Arrays [devices, size of the chunk].
    """
    programs = _compiled(mesh)
    # By default JAX rounds the factors of float32 products on some devices.
    with jax.default_matmul_precision(jax.config.jax_default_matmul_precision or "highest"):  # type: ignore[attr-defined]
        tokens = _shard(tokens, mesh)
        x = programs.hidden(model, tokens)  # [B, T - 1, D]
        start = 0
        for size in chunk_sizes(rows.shape[1], model.config.n_vocab, tiling_for(_platform(model)).largest_chunk):
            indices = (
                np.pad(array[:, start : start + size], ((0, 0), (0, max(0, start + size - rows.shape[1]))))
                for array in (rows, columns)
            )
            x_scored, targets = programs.take(x, tokens, *(_shard(a.astype(np.int32).ravel(), mesh) for a in indices))
            chunk = programs.logprobs(model, x_scored, targets, top)
            if mesh is not None:
                chunk = sharding.gather(chunk, mesh)
            yield TokenLogprobs(*(array.reshape(len(rows), size, *array.shape[1:]) for array in chunk))
            start += size


def _hidden(model: GPTModel, tokens: Array) -> Array:
    return model.hidden(tokens[:, :-1])


def _take(x: Array, tokens: Array, rows: Array, columns: Array) -> tuple[Array, Array]:
    """x [B, T - 1, D], tokens [B, T] -> x [R, D] at positions, and the tokens [R] that follow them."""
    return x[rows, columns], tokens[rows, columns + 1]


def _logprobs(model: GPTModel, x: Array, targets: Array, top: int) -> TokenLogprobs:
    """x [R, D], targets [R] -> arrays [R]"""
    logits = head_logits(model, x)  # [R, V]
    logits = logits - logits.max(axis=-1, keepdims=True)  # small numbers, so that float32 loses less
    log_total = jnp.log(jnp.exp(logits).sum(axis=-1, keepdims=True))  # [R, 1]
    is_target = jnp.arange(logits.shape[1], dtype=targets.dtype)[None] == targets[:, None]  # [R, V]
    target_logits = jnp.where(is_target, logits, -jnp.inf).max(axis=-1)  # [R]
    target_logits = jnp.where(is_target.any(axis=-1), target_logits, jnp.nan)
    others = jnp.where(is_target, -jnp.inf, logits).max(axis=-1)  # [R]
    top_logits, top_ids = jax.lax.top_k(logits, top)  # the first of equal elements first
    is_greedy = logits.argmax(axis=-1) == targets
    return TokenLogprobs(
        target_logits - log_total[:, 0], is_greedy, target_logits - others, top_ids, top_logits - log_total
    )


class _Programs(NamedTuple):
    hidden: Callable[..., Array]
    take: Callable[..., tuple[Array, Array]]
    logprobs: Callable[..., TokenLogprobs]


@functools.cache
def _compiled(mesh: Mesh | None) -> _Programs:
    """Return _hidden, _take and _logprobs, compiled for the devices of a mesh, each of which runs them by itself."""
    if mesh is None:
        return _Programs(jax.jit(_hidden), jax.jit(_take), jax.jit(_logprobs, static_argnums=3))
    replicated, rows = P(), P("data")
    on_mesh = functools.partial(jax.shard_map, mesh=mesh, out_specs=rows)

    def logprobs(model: GPTModel, x: Array, targets: Array, top: int) -> TokenLogprobs:
        return on_mesh(functools.partial(_logprobs, top=top), in_specs=(replicated, rows, rows))(model, x, targets)

    return _Programs(
        jax.jit(on_mesh(_hidden, in_specs=(replicated, rows))),
        jax.jit(on_mesh(_take, in_specs=(rows, rows, rows, rows))),
        jax.jit(logprobs, static_argnums=3),
    )


def _shard(array: Any, mesh: Mesh | None) -> Any:
    """Shard an array, of which every process has a complete copy, along its first axis."""
    return array if mesh is None else sharding.device_put_tree(array, NamedSharding(mesh, P("data")))


def _platform(model: GPTModel) -> str:
    """JAX's name of the platform that a model is on; that of the default device for a model that is traced."""
    leaf = jax.tree.leaves(model)[0]
    if isinstance(leaf, jax.core.Tracer):
        return jax.default_backend()
    return next(iter(leaf.devices())).platform
