"""The sections of a parity report, from the first activation to the sampled tokens.

Activations and cached decoding are measured against parity/reference.py, which is NumPy in float64. Gradients
and training are measured against gpt_torch in float64: the NumPy reference has no backward pass, and the error
bounds need rounding errors that are added during one. tests/test_gradient_parity.py checks those gradients
against the NumPy reference by a complex step. Only these two sections need PyTorch.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np

from parity.comparison.case import Case
from parity.comparison.error_bounds import (
    SAFETY,
    UNIT_ROUNDOFF,
    Bounds,
    Rounding,
    activation_bounds,
    propagated_errors,
    sum_rounding,
)
from parity.comparison.implementation import Implementation, open_implementation
from parity.comparison.protocol import Batch, Compute, Weights
from parity.comparison.report import Row, make_row
from parity.errors import InputError
from parity.training.settings import TrainSettings

Section = Literal["activations", "gradients", "training", "decoding", "samples"]
SECTIONS: tuple[Section, ...] = get_args(Section)
ROW_SECTIONS: dict[Section, set[str]] = {
    "activations": {"activations"},
    "gradients": {"gradients"},
    "training": {"AdamW updates", "losses"},
    "decoding": {"cached decoding"},
    "samples": {"sampled tokens"},
}
"""The sections of the rows that each section of the report consists of."""


def compare_implementations(
    a: Implementation,
    b: Implementation,
    case: Case,
    settings: TrainSettings,
    sections: Sequence[Section] = SECTIONS,
) -> Iterator[Row]:
    """Yield the rows of the sections whose functions both implementations offer.

    Args:
        a: The first implementation.
        b: The second implementation.
        case: The input of both.
        settings: Settings of the training section.
        sections: The sections to compare.

    Raises:
        InputError: If the implementations have no activation in common, or if gradients or training are to be
            compared and PyTorch is not installed.
    """

    def offered(function: str) -> bool:
        return a.offers(function) and b.offers(function)

    if "activations" in sections:
        yield from activations(a, b, case)
    known = None
    if "gradients" in sections and offered("loss_and_gradients"):
        known = gradient_bounds(case)
        yield from gradients(a, b, case, known)
    # The trainers compute on the CPU here, and in float32 or float64.
    if "training" in sections and offered("train") and case.dtype != "bfloat16" and case.compute.device == "cpu":
        yield from updates(a, b, case, settings, known or gradient_bounds(case))
    if "decoding" in sections:
        for implementation in (a, b):
            if implementation.offers("cached_logits"):
                yield cached_decoding(implementation, case)
    if "samples" in sections and offered("generate"):
        yield from samples(a, b, case)


def activations(a: Implementation, b: Implementation, case: Case) -> Iterator[Row]:
    """Compare every named activation that both implementations have."""
    in_a, in_b = (side.activations(case.config, case.weights, case.inputs, case.names, case.compute) for side in (a, b))
    names = [name for name in case.names if name in in_a and name in in_b]
    if not names:
        raise InputError(f"{a.name} and {b.name} have no activation in common; both must return 'logits' at least")
    exact, bounds = activation_bounds(case.config, case.weights, case.inputs, case.dtype, names)
    for name in names:
        yield make_row("activations", name, in_a[name], in_b[name], exact[name], bounds[name])


def gradients(a: Implementation, b: Implementation, case: Case, known: Bounds) -> Iterator[Row]:
    """Compare the loss and the gradient of every parameter; `known` is the result of gradient_bounds."""

    def compute(side: Implementation) -> dict[str, Any]:
        loss, by_name = side.loss_and_gradients(case.config, case.weights, case.inputs, case.targets, case.compute)
        return {"loss": np.float64(loss), **by_name}

    in_a, in_b = compute(a), compute(b)
    exact, bounds = known
    for name in exact:
        yield make_row("gradients", name, in_a[name], in_b[name], exact[name], bounds[name])


def gradient_bounds(case: Case) -> Bounds:
    """Compute the loss and all gradients in float64, and their error bounds."""
    reference = open_implementation("torch", case.config)
    weights = {name: np.asarray(array, np.float64) for name, array in case.weights.items()}

    def compute(noise: dict[str, Rounding]) -> dict[str, Any]:
        with reference.perturbed(case.config, noise):
            loss, by_name = reference.loss_and_gradients(
                case.config, weights, case.inputs, case.targets, Compute("float64", "cpu")
            )
        return {"loss": np.float64(loss), **by_name}

    exact, bounds = propagated_errors(case.config, case.dtype, case.inputs.shape[1], compute)
    over_tokens = SAFETY * sum_rounding(case.dtype, case.inputs.size)  # a parameter's gradient sums over B and T
    for name in exact:
        bounds[name] += over_tokens * float(np.sqrt(np.mean(np.square(exact[name]))))
    bounds["loss"] += _loss_rounding(exact["loss"], case)
    return exact, bounds


def _loss_rounding(loss: Any, case: Case) -> float:
    """Bound the rounding of the log-sum-exp and the mean, which are not activations, by a few roundings of the loss."""
    return 2 * SAFETY * UNIT_ROUNDOFF[case.dtype] * float(loss)


def updates(a: Implementation, b: Implementation, case: Case, settings: TrainSettings, known: Bounds) -> Iterator[Row]:
    """Compare AdamW's first update of every parameter, and the losses of the first steps.

    The first update is lr * (g / (|g| + eps) + decay). An error d of the gradient therefore moves it by at most
    lr * d / (|g| + eps), and by 2 lr where the sign of g is within the error; storing the parameter rounds once
    more. The losses are bounded by float64 runs with rounding errors added. `known` is the result of
    gradient_bounds.
    """
    settings = dataclasses.replace(settings, dtype="float64" if case.dtype == "float64" else "float32")
    reference = open_implementation("torch", case.config)
    float64_weights = {name: np.asarray(array, np.float64) for name, array in case.weights.items()}
    float64_settings = dataclasses.replace(settings, dtype="float64")

    def reference_run(noise: dict[str, Rounding]) -> dict[str, np.ndarray]:
        with reference.perturbed(case.config, noise):
            losses, first = _train(reference, case, float64_weights, float64_settings)
        by_step = {_loss_name(step): loss for step, loss in enumerate(losses)}
        return by_step if noise else by_step | {f"update {name}": array for name, array in first.items()}

    (losses_a, first_a), (losses_b, first_b) = (_train(side, case, case.weights, settings) for side in (a, b))
    exact, bounds = propagated_errors(case.config, case.dtype, case.inputs.shape[1], reference_run)
    exact_gradients, gradient_errors = known
    norm = np.sqrt(sum(np.square(g).sum() for name, g in exact_gradients.items() if name != "loss"))
    clip = min(1.0, settings.clip / norm)  # gradients are clipped before AdamW
    for name in first_a:
        gradient = np.abs(exact_gradients[name]) * clip
        moved = np.minimum(2.0, gradient_errors[name] * clip / (gradient + settings.eps))
        stored = 4 * UNIT_ROUNDOFF[case.dtype] * (np.abs(float64_weights[name]) + settings.lr)
        allowed = settings.lr * moved + stored  # of each element
        yield _update_row(name, first_a[name], first_b[name], exact[f"update {name}"], allowed)
    for step, (loss_a, loss_b) in enumerate(zip(losses_a, losses_b, strict=True)):
        name = _loss_name(step)
        bound = bounds[name] + _loss_rounding(exact[name], case)
        yield make_row("losses", name, loss_a, loss_b, exact[name], bound)


def _loss_name(step: int) -> str:
    return f"loss of step {step}"


def _train(
    side: Implementation, case: Case, weights: Weights, settings: TrainSettings
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Train on the same batch for a few steps; return (loss of each step, {name: first update})."""
    shape = (1, *case.inputs.shape)
    batches = [Batch(case.inputs.reshape(shape), case.targets.reshape(shape), settings.lr)] * case.steps
    first: dict[str, np.ndarray] = {}

    def after_step(new: dict[str, np.ndarray]) -> None:
        if not first:
            first.update({n: np.asarray(new[n], np.float64) - np.asarray(weights[n], np.float64) for n in new})

    metrics = side.train(case.config, weights, settings, batches, after_step)
    return np.array([loss for loss, _ in metrics]), first


def _update_row(name: str, a: np.ndarray, b: np.ndarray, exact: np.ndarray, allowed: np.ndarray) -> Row:
    """Return the row of the element with the largest error relative to its own bound."""
    shares = np.maximum(np.abs(a - exact), np.abs(b - exact)) / allowed
    worst = np.unravel_index(shares.argmax(), shares.shape)
    difference = np.abs(a - b)
    return Row(
        "AdamW updates",
        name,
        float(difference[worst]),
        float(difference.mean()),
        float(np.abs(a - exact)[worst]),
        float(np.abs(b - exact)[worst]),
        float(allowed[worst]),
        f"largest share at {[int(i) for i in worst]}",
    )


def cached_decoding(side: Implementation, case: Case) -> Row:
    """Compare one implementation's logits from the key-value cache with its own uncached logits."""
    tokens = case.inputs[:1]
    start = max(1, tokens.shape[1] - 16)
    with_cache = side.cached_logits(case.config, case.weights, tokens, start, case.compute)
    without = side.activations(case.config, case.weights, tokens, ["logits"], case.compute)["logits"][:, start:]
    exact, bounds = activation_bounds(case.config, case.weights, tokens, case.dtype, ["logits"])
    return make_row("cached decoding", side.name, with_cache, without, exact["logits"][:, start:], bounds["logits"])


def samples(a: Implementation, b: Implementation, case: Case) -> Iterator[Row]:
    """Compare tokens that both sample with the same seed; no difference is allowed."""
    prompts = [ids[: max(1, len(ids) // 2)].tolist() for ids in case.inputs[:2]]
    filtered: dict[str, Any] = {"temperature": 0.8, "top_k": min(50, case.config.n_vocab), "top_p": 0.95}
    for name, options in {"greedy": {"temperature": 0.0}, "temperature, top-k and top-p": filtered}.items():
        options = {**options, "max_new_tokens": case.new_tokens, "seed": 1, "overflow": "stop"}
        rows_a, rows_b = (side.generate(case.config, case.weights, prompts, case.compute, **options) for side in (a, b))
        count = sum(len(row) - len(prompt) for row, prompt in zip(rows_a, prompts, strict=True))
        differing = [
            (number, position)
            for number, (row_a, row_b) in enumerate(zip(rows_a, rows_b, strict=True))
            for position in range(max(len(row_a), len(row_b)))
            if row_a[position : position + 1] != row_b[position : position + 1]
        ]
        detail = f"{len(differing)} of {count} tokens differ"
        if differing:
            detail += f", the first in row {differing[0][0]} at position {differing[0][1]}"
        share = len(differing) / max(1, count)
        yield Row("sampled tokens", name, float(len(differing)), share, None, None, 0.0, detail)
