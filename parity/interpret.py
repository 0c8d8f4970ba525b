"""Interpretability methods for the activations that `run_with_cache` of either backend returns.

Activations are {name: array} with the names of parity/taps; weights are in the huggingface format, as
`export_weights` returns them. Everything is computed in NumPy and float64.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from parity.arrays import as_numpy
from parity.config import LAYER_NORM_EPS, GPTConfig
from parity.errors import InputError
from parity.figures import new_figure
from parity.reference import Weights, as_float64, layer_norm, output_head

Activations = Mapping[str, Any]
"""{name: array of any framework}, as `run_with_cache` returns them."""


def residual_names(config: GPTConfig) -> list[str]:
    """Return the names of the residual stream before the first layer and after each layer.

    Args:
        config: Configuration of the model.
    """
    return ["embed", *(f"blocks.{i}.resid_post" for i in range(config.n_layer))]


def logit_lens(config: GPTConfig, weights: Weights, cache: Activations) -> dict[str, np.ndarray]:
    """Decode the residual stream after each layer with the output head: the logit lens (nostalgebraist 2020).

    Args:
        config: Configuration of the model.
        weights: Weights in the huggingface format.
        cache: Activations that include those of `residual_names`.

    Returns:
        {name of the residual stream: logits float64 [B, T, V] if the model ended there}; the last ones are the
        model's logits.

    Raises:
        InputError: If activations are missing.
    """
    head = output_head(weights)  # [V, D]
    scale, shift = as_float64(weights["ln_f.weight"]), as_float64(weights["ln_f.bias"])
    residuals = _select(cache, residual_names(config))
    return {name: layer_norm(x, scale, shift) @ head.T for name, x in residuals.items()}


def direct_logit_attribution(
    config: GPTConfig, weights: Weights, cache: Activations, token: int, minus: int | None = None
) -> dict[str, np.ndarray]:
    """Split the logit of a token into the contributions of the model's components.

    The final residual stream is the sum of the outputs of all components (Elhage et al. 2021). With the divisor of the
    last LayerNorm held at its value, the logit is a sum as well.

    Args:
        config: Configuration of the model.
        weights: Weights in the huggingface format.
        cache: Activations that include "embed" and attn.out and mlp.out of each layer.
        token: The token whose logit is split.
        minus: If given, the difference of the logits of `token` and of this token is split.

    Returns:
        {component: contribution float64 [B, T]}. The components are "embed", "blocks.i.attn.out" and "blocks.i.mlp.out"
        of each layer i, and "ln_f.bias". The contributions add up to the logit.

    Raises:
        InputError: If activations are missing, or a token is outside the vocabulary.
    """
    for name, id in (("token", token), ("minus", 0 if minus is None else minus)):
        if not 0 <= id < config.n_vocab:
            raise InputError(f"{name}: token id {id} is outside the vocabulary 0..{config.n_vocab - 1}")
    names = ["embed"]
    for i in range(config.n_layer):
        names += [f"blocks.{i}.attn.out", f"blocks.{i}.mlp.out"]
    outputs = _select(cache, names)
    head = output_head(weights)  # [V, D]
    direction = head[token] - (0 if minus is None else head[minus])  # [D]
    final = np.sum(list(outputs.values()), axis=0)  # [B, T, D]
    std = np.sqrt(final.var(axis=-1, keepdims=True) + LAYER_NORM_EPS)
    scaled_direction = as_float64(weights["ln_f.weight"]) * direction
    contributions = {
        name: ((x - x.mean(axis=-1, keepdims=True)) / std) @ scaled_direction for name, x in outputs.items()
    }
    bias = as_float64(weights["ln_f.bias"]) @ direction
    contributions["ln_f.bias"] = np.broadcast_to(bias, final.shape[:2])
    return contributions


def patching_sweep(
    run: Callable[[dict[str, Any]], np.ndarray],
    clean: Activations,
    corrupted: Activations,
    names: Iterable[str],
    metric: Callable[[np.ndarray], float],
) -> dict[str, np.ndarray]:
    """Measure where a corrupted run is repaired by activations of a clean run (activation patching, Meng et al. 2022).

    Args:
        run: patches -> logits [B, T, V] of the corrupted input, for example by `run_with_patches`.
        clean: Activations of the clean run.
        corrupted: Activations of the corrupted run, of the same shapes.
        names: Activations to patch; their second axis must be the position, [B, T, ...].
        metric: logits [B, T, V] -> score.

    Returns:
        {name: scores float64 [T]}; entry t is the score when the clean activation replaces the corrupted one at
        position t.

    Raises:
        InputError: If activations are missing, or those of both runs differ in shape.
    """
    names = list(names)
    clean_arrays, corrupted_arrays = (_select(cache, names, dtype=None) for cache in (clean, corrupted))
    sweep = {}
    for name in names:
        source, target = clean_arrays[name], corrupted_arrays[name]
        if source.shape != target.shape:
            raise InputError(
                f"{name}: the clean run has shape {list(source.shape)}, the corrupted run {list(target.shape)}"
            )
        scores = np.empty(target.shape[1])
        for position in range(len(scores)):
            patched = target.copy()
            patched[:, position] = source[:, position]
            scores[position] = metric(as_numpy(run({name: patched})))
        sweep[name] = scores
    return sweep


def induction_scores(config: GPTConfig, cache: Activations, period: int) -> np.ndarray:
    """Measure how much each head attends to the token that followed the last occurrence of its token.

    A head that does so completely has score 1: a perfect induction head (Olsson et al. 2022).

    Args:
        config: Configuration of the model.
        cache: Activations that include the attention pattern of each layer, for an input that repeats itself.
        period: Number of positions after which the input repeats itself.

    Returns:
        Scores float64 [L, N]: the mean of the pattern from each position of a repetition to the one `period` - 1
        before it.

    Raises:
        InputError: If activations are missing, or the period leaves no repetition.
    """
    patterns = _select(cache, [f"blocks.{i}.attn.pattern" for i in range(config.n_layer)])
    T = next(iter(patterns.values())).shape[-1]
    if not 1 <= period < T:
        raise InputError(f"period must be in 1..{T - 1}, so that {T} positions contain a repetition, got {period}")
    positions = np.arange(period, T)
    return np.stack([x[:, :, positions, positions - period + 1].mean(axis=(0, 2)) for x in patterns.values()])


def plot_attention(path: str | Path, pattern: np.ndarray, labels: Sequence[str] = (), title: str = "") -> Path:
    """Plot the attention pattern of one layer, one panel per head, with queries from top to bottom.

    Args:
        path: File to write; its suffix selects the format.
        pattern: Attention pattern [N, T, S] of any floating-point dtype.
        labels: Labels of the positions, such as their tokens; none by default.
        title: Title of the figure.

    Returns:
        The path.

    Raises:
        InputError: For a pattern of another number of axes, and for another number of labels than positions.
    """
    pattern = as_numpy(pattern, np.float64)
    if pattern.ndim != 3:
        raise InputError(
            f"pattern must have axes [N, T, S], got shape {list(pattern.shape)}; select a row of the batch"
        )
    heads, T, S = pattern.shape
    if len(labels) and not len(labels) == T == S:
        raise InputError(f"labels: {len(labels)} for {T} queries and {S} keys; give one per position, or none")
    columns = min(4, heads)
    rows = -(-heads // columns)
    figure = new_figure(figsize=(3 * columns, 3 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    literally = {"parse_math": False}  # a token may hold dollar signs
    for head, axes in enumerate(panels.flat):
        axes.set_visible(head < heads)
        if head < heads:
            axes.imshow(pattern[head], vmin=0, vmax=1, cmap="viridis")
            axes.set_title(f"head {head}", fontsize=9)
            axes.set_xticks(range(S) if len(labels) else [], labels, rotation=90, fontsize=6, **literally)
            axes.set_yticks(range(T) if len(labels) else [], labels, fontsize=6, **literally)
    figure.suptitle(title, **literally)
    figure.savefig(path, dpi=110)
    return Path(path)


def _select(cache: Activations, names: Sequence[str], dtype: Any = np.float64) -> dict[str, np.ndarray]:
    if missing := [name for name in names if name not in cache]:
        raise InputError(f"the cache has no {', '.join(missing)}; request them from run_with_cache")
    return {name: as_numpy(cache[name], dtype) for name in names}
