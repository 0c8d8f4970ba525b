"""Looking into a model by its named activations, in NumPy: what both backends' run_with_cache gives.

Activations are {name: array} by the names of parity/taps.py, weights in the huggingface format.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from parity.config import LAYER_NORM_EPS, GPTConfig
from parity.errors import InputError
from parity.reference import Weights, layer_norm, wide

Activations = Mapping[str, Any]


def residual_names(config: GPTConfig) -> list[str]:
    """The residual stream before the first layer and after each."""
    return ["embed", *(f"blocks.{i}.resid_post" for i in range(config.n_layer))]


def logit_lens(config: GPTConfig, weights: Weights, cache: Activations) -> dict[str, np.ndarray]:
    """{residual stream's name: logits [B, T, V]} if the model ended there (nostalgebraist 2020).

    The last entry is the model's own logits. Raises InputError for activations that are missing.
    """
    head = wide(weights.get("lm_head.weight", weights["wte.weight"]))  # [V, D]
    scale, shift = wide(weights["ln_f.weight"]), wide(weights["ln_f.bias"])
    return {
        name: layer_norm(np.asarray(x, np.float64), scale, shift) @ head.T
        for name, x in _take(cache, residual_names(config)).items()
    }


def direct_logit_attribution(
    config: GPTConfig, weights: Weights, cache: Activations, token: int, minus: int | None = None
) -> dict[str, np.ndarray]:
    """{component: its part [B, T] of the logit of `token`}; of the difference to that of `minus` where given.

    The final stream is a sum of what each component wrote (Elhage et al. 2021), so with LayerNorm's division
    taken as it came out, the logit is a sum too: of "embed", "blocks.i.attn.out", "blocks.i.mlp.out" and
    "ln_f.bias". Raises InputError for activations that are missing.
    """
    names = ["embed"]
    for i in range(config.n_layer):
        names += [f"blocks.{i}.attn.out", f"blocks.{i}.mlp.out"]
    parts = _take(cache, names)
    head = wide(weights.get("lm_head.weight", weights["wte.weight"]))
    direction = head[token] - (0 if minus is None else head[minus])  # [D]
    final = np.sum(list(parts.values()), axis=0)  # [B, T, D]
    std = np.sqrt(final.var(axis=-1, keepdims=True) + LAYER_NORM_EPS)
    read = wide(weights["ln_f.weight"]) * direction
    found = {name: ((x - x.mean(axis=-1, keepdims=True)) / std) @ read for name, x in parts.items()}
    found["ln_f.bias"] = np.broadcast_to(wide(weights["ln_f.bias"]) @ direction, final.shape[:2])
    return found


def patching_sweep(
    run: Callable[[dict[str, Any]], np.ndarray],
    clean: Activations,
    corrupted: Activations,
    names: Iterable[str],
    metric: Callable[[np.ndarray], float],
) -> dict[str, np.ndarray]:
    """{name: metric [T] of the corrupted run with the clean activation at one position} (Meng et al. 2022).

    `run(patches)`: logits [B, T, V] of the corrupted input, by run_with_patches, say. `names`: activations
    whose second axis is the position, [B, T, ...].
    """
    found = {}
    for name in names:
        there, here = np.asarray(corrupted[name]), np.asarray(clean[name])
        if there.shape != here.shape:
            raise InputError(f"{name}: the clean run has shape {list(here.shape)}, the corrupted {list(there.shape)}")
        scores = np.empty(there.shape[1])
        for position in range(len(scores)):
            mixed = there.copy()
            mixed[:, position] = here[:, position]
            scores[position] = metric(np.asarray(run({name: mixed})))
        found[name] = scores
    return found


def induction_scores(config: GPTConfig, cache: Activations, period: int) -> np.ndarray:
    """[L, N]: how much each head attends to what followed the last occurrence of its token (Olsson et al. 2022).

    The input repeats itself after `period` positions; the score is the mean of the pattern from a position of
    a repetition to the one period - 1 before it. 1 is a perfect induction head. Raises InputError for a
    period that leaves no repetition.
    """
    patterns = _take(cache, [f"blocks.{i}.attn.pattern" for i in range(config.n_layer)])
    T = next(iter(patterns.values())).shape[-1]
    if not 1 <= period < T:
        raise InputError(f"period must be in 1..{T - 1} to leave a repetition in {T} positions, got {period}")
    positions = np.arange(period, T)
    return np.stack([x[:, :, positions, positions - period + 1].mean(axis=(0, 2)) for x in patterns.values()])


def plot_attention(path: str | Path, pattern: np.ndarray, labels: Sequence[str] = (), title: str = "") -> Path:
    """Picture of one layer's pattern [N, T, S], a panel a head, queries downwards; `labels`: of the positions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    heads, T, S = np.shape(pattern)
    columns = min(4, heads)
    lines = -(-heads // columns)
    figure, panels = plt.subplots(
        lines, columns, figsize=(3 * columns, 3 * lines + 0.4), squeeze=False, layout="constrained"
    )
    for head, axes in enumerate(panels.flat):
        axes.set_visible(head < heads)
        if head < heads:
            axes.imshow(np.asarray(pattern)[head], vmin=0, vmax=1, cmap="viridis")
            axes.set_title(f"head {head}", fontsize=9)
            axes.set_xticks(range(S) if labels else [], labels, rotation=90, fontsize=6)
            axes.set_yticks(range(T) if labels else [], labels, fontsize=6)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return Path(path)


def _take(cache: Activations, names: Sequence[str]) -> dict[str, np.ndarray]:
    if missing := [name for name in names if name not in cache]:
        raise InputError(f"the cache has no {', '.join(missing)}; ask run_with_cache for them")
    return {name: np.asarray(cache[name], np.float64) for name in names}
