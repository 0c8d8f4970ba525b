"""Log-probabilities of given tokens in JAX; gpt_torch/scoring.py has the same functions.

Three programs compute them: the model, the choice of the positions that are scored, and the output head on a chunk of
those. The costly two have few shapes each, because lengths and numbers of positions do not multiply.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt_jax import sharding
from gpt_jax.arrays import check_ids
from gpt_jax.loss import tiling_for
from gpt_jax.model import GPTModel, head_logits
from gpt_jax.weights import config_of, parameters
from parity.errors import InputError
from parity.evaluation.batches import Layout, TokenLogprobs, check_scoring, chunk_sizes


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
        A named tuple of arrays, each [B, last - first]: `logprobs`, the log-probabilities of the tokens in nats,
        float32 (float64 if the parameters are); `is_greedy`, whether the token is the most likely one, bool; `margins`,
        its logit minus the largest logit of any other token; and `top_ids` and `top_logprobs`, the most likely tokens
        in descending order and their log-probabilities, [B, last - first, top].

    Raises:
        InputError: If T exceeds n_ctx + 1, an id is outside the vocabulary, or first, last or top is out of range.
            Under jax.jit the ids are unknown, so the log-probability of an id outside the vocabulary is NaN.
    """
    config = config_of(model)
    positions = check_scoring(config, np.shape(tokens), first, last, top)
    parameters(model)  # raises for a DecodingModel
    inputs, targets = jnp.asarray(tokens)[:, :-1], jnp.asarray(tokens)[:, 1:]
    check_ids(inputs, config)
    check_ids(targets, config)
    B, K = len(tokens), len(positions)
    rows, columns = np.repeat(np.arange(B), K)[None], np.tile(positions, B)[None]  # each [1, B K]
    scored = targets[:, positions.start : positions.stop].reshape(1, -1)
    parts = zip(*_chunks(model, (inputs,), rows, columns, scored, top), strict=True)
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
        parameters(model)  # raises for a DecodingModel
        if mesh is not None:
            if mesh.size != mesh.shape["data"]:
                raise InputError("--mesh: evaluation shards only the rows of a batch; give data=N and no other axis")
            model = sharding.device_put_tree(model, jax.tree.map(lambda _: NamedSharding(mesh, P()), model))
        self.can_share = model.attention == "explicit"
        """Whether several continuations of a context can be in one row; cuDNN's kernel has no such mask."""
        self.model = model
        self._mesh = mesh
        self.n_batches = 1
        """Number of batches that are computed at the same time."""
        self.n_shards = 1 if mesh is None else mesh.size
        """The number of rows of a batch must be a multiple of this."""
        self.tokens_per_batch = 2**10 if _platform(model) == "cpu" else 2**15
        """Number of tokens per batch, with padding, with which this device is fast."""

    def __call__(self, layouts: Sequence[Layout], top: int = 0) -> list[TokenLogprobs]:
        """Score the positions of batches; all processes must call this with the same arguments.

        Args:
            layouts: The batches.
            top: See token_logprobs().

        Returns:
            For each batch NumPy arrays [R].
        """
        return [self._score(layout, top) for layout in layouts]

    def _score(self, layout: Layout, top: int) -> TokenLogprobs:
        """Score a batch."""
        check_ids(jnp.asarray(layout.tokens), self.config)
        n_rows = len(layout.tokens) // self.n_shards
        counts = np.bincount(layout.rows // n_rows, minlength=self.n_shards)  # positions of each device
        is_position = np.arange(counts.max()) < counts[:, None]  # [devices, positions of the device with most]
        rows, columns, targets = np.zeros((3, *is_position.shape), np.int32)
        rows[is_position], columns[is_position], targets[is_position] = (
            layout.rows % n_rows,
            layout.columns,
            layout.targets,
        )
        arrays = (layout.tokens, *((layout.positions, layout.segments) if layout.is_shared else ()))
        parts = zip(*_chunks(self.model, arrays, rows, columns, targets, top, self._mesh), strict=True)
        flat = (np.concatenate(list(map(np.asarray, arrays)), axis=1) for arrays in parts)
        return TokenLogprobs(*(array[:, : is_position.shape[1]][is_position] for array in flat))


def _chunks(
    model: GPTModel,
    arrays: tuple[Any, ...],
    rows: np.ndarray,
    columns: np.ndarray,
    targets: Any,
    top: int,
    mesh: Mesh | None = None,
) -> Iterator[TokenLogprobs]:
    """Yield the results of one chunk of the positions after another, until there are at least R.

    Args:
        model: The model, on the mesh if there is one.
        arrays: Token ids [B, T], and positions and segments if rows share contexts; see Layout.
        rows: Row of each position among the rows of its device, int [devices, R].
        columns: Column of each position, int [devices, R].
        targets: The token that is scored at each position, int [devices, R].
        top: See token_logprobs().
        mesh: Devices along the axis `data`.

    Yields:
        Arrays [devices, size of the chunk].
    """
    programs = _compiled(mesh)
    # By default JAX rounds the factors of float32 products on some devices.
    with jax.default_matmul_precision(jax.config.jax_default_matmul_precision or "highest"):  # type: ignore[attr-defined]
        arrays = tuple(_shard(array, mesh) for array in arrays)
        x = programs.shared(model, *arrays) if len(arrays) > 1 else programs.hidden(model, *arrays)  # [B, T, D]
        start = 0
        for size in chunk_sizes(rows.shape[1], model.config.n_vocab, tiling_for(_platform(model)).largest_chunk):
            padding = ((0, 0), (0, max(0, start + size - rows.shape[1])))
            part = slice(start, start + size)
            start += size
            chunk_rows, chunk_columns = (
                _shard(np.pad(array[:, part], padding).astype(np.int32).ravel(), mesh) for array in (rows, columns)
            )
            pad = jnp.pad if isinstance(targets, Array) else np.pad
            chunk_targets = _shard(pad(targets[:, part], padding).ravel(), mesh)
            chunk = programs.logprobs(model, programs.take(x, chunk_rows, chunk_columns), chunk_targets, top)
            if mesh is not None:
                chunk = sharding.gather(chunk, mesh)
            yield TokenLogprobs(*(array.reshape(len(rows), size, *array.shape[1:]) for array in chunk))


def _hidden(model: GPTModel, tokens: Array) -> Array:
    return model.hidden(tokens)


def _shared_hidden(model: GPTModel, tokens: Array, positions: Array, segments: Array) -> Array:
    """Return the input of the output head [B, T, D], for rows in which several continuations share a context."""
    slots = jnp.arange(tokens.shape[1], dtype=segments.dtype)  # [T]
    causal = (slots[None, :] <= slots[:, None])[None]  # [1, T, S]
    queries, keys = segments[:, :, None], segments[:, None, :]
    mask = causal & ((keys == 0) | (keys == queries))  # [B, T, S]
    x = model.tok_emb(tokens) + model.pos_emb(positions)  # [B, T, D]
    x = model._layers(x, mask[:, None], None)  # [B, T, D]
    return model.final_norm(x)  # [B, T, D]


def _take(x: Array, rows: Array, columns: Array) -> Array:
    """x [B, T, D] -> [R, D]"""
    return x[rows, columns]


def _logprobs(model: GPTModel, x: Array, targets: Array, top: int) -> TokenLogprobs:
    """x [R, D], targets [R] -> arrays [R]"""
    logits = head_logits(model, x)  # [R, V]
    ids, wanted = jnp.arange(logits.shape[1], dtype=targets.dtype)[None], targets[:, None]
    # Not argmax(), which XLA on a CPU computes one element after another.
    before = jnp.where(ids < wanted, logits, -jnp.inf).max(axis=-1, keepdims=True)  # [R, 1]
    after = jnp.where(ids > wanted, logits, -jnp.inf).max(axis=-1, keepdims=True)  # [R, 1]
    is_valid = (wanted >= 0) & (wanted < logits.shape[1])
    target_logits = jnp.where(is_valid, jnp.take_along_axis(logits, wanted, axis=-1), jnp.nan)  # [R, 1]
    largest = jnp.maximum(jnp.maximum(before, after), target_logits)  # [R, 1]
    log_total = jnp.log(jnp.exp(logits - largest).sum(axis=-1, keepdims=True))  # [R, 1]
    top_logits, top_ids = jax.lax.top_k(logits, top)  # the first of equal elements first
    return TokenLogprobs(
        logprobs=(target_logits - largest - log_total)[:, 0],  # the large numbers first, so that float32 loses less
        is_greedy=((target_logits > before) & (target_logits >= after))[:, 0],
        margins=(target_logits - jnp.maximum(before, after))[:, 0],
        top_ids=top_ids,
        top_logprobs=top_logits - largest - log_total,
    )


class _Programs(NamedTuple):
    hidden: Callable[..., Array]
    shared: Callable[..., Array]
    take: Callable[..., Array]
    logprobs: Callable[..., TokenLogprobs]


@functools.cache
def _compiled(mesh: Mesh | None) -> _Programs:
    """Return the functions above, compiled for the devices of a mesh, each of which runs them by itself."""
    if mesh is None:
        return _Programs(
            jax.jit(_hidden), jax.jit(_shared_hidden), jax.jit(_take), jax.jit(_logprobs, static_argnums=3)
        )
    replicated, rows = P(), P("data")
    on_mesh = functools.partial(jax.shard_map, mesh=mesh, out_specs=rows)

    def logprobs(model: GPTModel, x: Array, targets: Array, top: int) -> TokenLogprobs:
        return on_mesh(functools.partial(_logprobs, top=top), in_specs=(replicated, rows, rows))(model, x, targets)

    return _Programs(
        jax.jit(on_mesh(_hidden, in_specs=(replicated, rows))),
        jax.jit(on_mesh(_shared_hidden, in_specs=(replicated, rows, rows, rows))),
        jax.jit(on_mesh(_take, in_specs=(rows, rows, rows))),
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
