"""The parity report: two implementations side by side, from the first activation to the sampled tokens.

Every row has the difference of the two, each one's distance from the float64 truth, and the bound that
rounding allows each (parity/error_bounds.py). A row passes if both keep within the bound, and their difference within
twice it; the first row that does not is where to look.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from parity import taps
from parity.comparison.compare import compare
from parity.comparison.error_bounds import (
    SAFETY,
    UNIT_ROUNDOFF,
    Rounding,
    activation_bounds,
    propagated_errors,
    sum_rounding,
)
from parity.comparison.protocol import Batch, Compute, Weights
from parity.config import GPTConfig
from parity.errors import InputError
from parity.training.settings import TrainSettings
from parity.weights.load import read_folder

Section = Literal["activations", "gradients", "training", "decoding", "samples"]
SECTIONS: tuple[Section, ...] = get_args(Section)


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison; errors are absolute, of the worst element."""

    section: str
    name: str
    between: float
    """|A - B|"""
    mean: float
    """mean |A - B|"""
    a: float | None
    """|A - truth|"""
    b: float | None
    bound: float
    """What rounding allows either"""
    detail: str = ""

    @property
    def share(self) -> float:
        """The largest of the errors over what is allowed it; above 1 fails, and so does NaN."""
        errors = [self.between / 2, *(e for e in (self.a, self.b) if e is not None)]
        if not np.isfinite(errors).all():
            return np.inf
        worst = max(errors)
        return worst / self.bound if self.bound else (np.inf if worst else 0.0)

    @property
    def ok(self) -> bool:
        return self.share <= 1

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "share": float(self.share), "ok": self.ok}


@dataclasses.dataclass(frozen=True)
class Case:
    """What the two are given."""

    config: GPTConfig
    weights: Weights
    tokens: np.ndarray
    """int32 [B, T + 1]: inputs, and targets one position on"""
    compute: Compute
    names: list[str]
    """Activations to compare"""
    steps: int = 5
    new_tokens: int = 32

    @property
    def inputs(self) -> np.ndarray:
        return self.tokens[:, :-1]

    @property
    def targets(self) -> np.ndarray:
        return self.tokens[:, 1:]

    @property
    def dtype(self) -> str:
        return self.compute.of(self.weights)


def has(method: str, *sides: Any) -> bool:
    return all(hasattr(side, method) for side in sides)


def row(section: str, name: str, a: np.ndarray, b: np.ndarray, truth: np.ndarray | None, bound: float) -> Row:
    between = compare(name, a, b, 1.0)
    if not np.isfinite(between.share):
        return Row(section, name, np.nan, np.nan, np.nan, np.nan, bound, "not finite")
    place = f"worst at {list(between.index)}: {between.got:.9g}, {between.want:.9g}"
    far_a, far_b = (None if truth is None else compare(name, side, truth, 1.0).error for side in (a, b))
    mean = float(np.abs(np.asarray(a, np.float64) - b).mean())
    return Row(section, name, between.error, mean, far_a, far_b, bound, place)


def activations(a: Any, b: Any, case: Case) -> Iterator[Row]:
    """Every named activation that both have."""
    found_a, found_b = (
        side.activations(case.config, case.weights, case.inputs, case.names, case.compute) for side in (a, b)
    )
    names = [name for name in case.names if name in found_a and name in found_b]
    if not names:
        raise InputError("the two sides have no activation in common; 'logits' at least must be in both")
    exact, bounds = activation_bounds(case.config, case.weights, case.inputs, case.dtype, names)
    for name in names:
        yield row("activations", name, found_a[name], found_b[name], exact[name], bounds[name])


Bounds = tuple[dict[str, np.ndarray], dict[str, float]]
"""(exact values, what rounding allows), by name"""


def gradients(a: Any, b: Any, truth: Any, case: Case, known: Bounds | None = None) -> Iterator[Row]:
    """The loss, and every gradient by name; `truth`: an implementation with gradients, run in float64.

    `known`: the bounds, where they were computed already.
    """
    (loss_a, found_a), (loss_b, found_b) = (
        side.loss_and_gradients(case.config, case.weights, case.inputs, case.targets, case.compute) for side in (a, b)
    )
    exact, bounds = known or _gradient_bounds(truth, case)
    found_a, found_b = ({"loss": np.float64(loss), **found} for loss, found in ((loss_a, found_a), (loss_b, found_b)))
    for name in exact:
        yield row("gradients", name, found_a[name], found_b[name], exact[name], bounds[name])


def _gradient_bounds(truth: Any, case: Case) -> Bounds:
    weights = {name: np.asarray(array, np.float64) for name, array in case.weights.items()}

    def run(patches: dict) -> dict[str, np.ndarray]:
        with taps.probe(case.config, (), _like_array(patches)):
            loss, found = truth.loss_and_gradients(
                case.config, weights, case.inputs, case.targets, Compute("float64", "cpu")
            )
        return {"loss": np.float64(loss), **found}

    exact, bounds = propagated_errors(case.config, case.dtype, case.inputs.shape[1], run)
    over_tokens = SAFETY * sum_rounding(case.dtype, case.inputs.size)  # parameters sum over B and T
    for name in exact:
        bounds[name] += over_tokens * float(np.sqrt(np.mean(np.square(exact[name]))))
    bounds["loss"] += _loss_rounding(exact["loss"], case)
    return exact, bounds


def _loss_rounding(loss: Any, case: Case) -> float:
    """Of the log-sum-exp and the mean, which no activation has: a few roundings of numbers of the loss's size."""
    return 2 * SAFETY * UNIT_ROUNDOFF[case.dtype] * float(loss)


def _like_array(patches: Mapping[str, Rounding]) -> dict[str, Callable]:
    """NumPy's noise for activations of torch, and for their gradients."""

    def one(patch: Rounding) -> Callable:
        def add(x: Any) -> Any:
            array = x.detach().numpy()
            x = x + x.new_tensor(patch(array) - array)
            if x.requires_grad:
                x.register_hook(lambda cotangent: cotangent.new_tensor(patch.backward(cotangent.numpy())))
            return x

        return add

    return {name: one(patch) for name, patch in patches.items()}


def updates(
    a: Any, b: Any, truth: Any, case: Case, settings: TrainSettings, known: Bounds | None = None
) -> Iterator[Row]:
    """AdamW's first update of every parameter, and the losses of a few steps from there.

    The first update is lr * (g / (|g| + eps) + decay), so an error d of the gradient moves it by at most
    lr * d / (|g| + eps), and by 2 lr where a sign is not known; storing the parameter rounds once more. Losses
    are bounded by a float64 run with rounding errors put in.
    """
    settings = dataclasses.replace(settings, dtype="float64" if case.dtype == "float64" else "float32")
    lr = settings.lr
    shape = (1, *case.inputs.shape)
    batches = [Batch(case.inputs.reshape(shape), case.targets.reshape(shape), lr)] * case.steps

    def train(side: Any, weights: Weights, settings: TrainSettings) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        first: dict[str, np.ndarray] = {}

        def after(new: dict[str, np.ndarray]) -> None:
            if not first:
                first.update({n: np.asarray(new[n], np.float64) - np.asarray(weights[n], np.float64) for n in new})

        metrics = side.train(case.config, weights, settings, batches, after)
        return np.array([loss for loss, _ in metrics]), first

    (losses_a, first_a), (losses_b, first_b) = (train(side, case.weights, settings) for side in (a, b))
    wide = {name: np.asarray(array, np.float64) for name, array in case.weights.items()}
    exact_gradients, gradient_bounds = known or _gradient_bounds(truth, case)
    exact_settings = dataclasses.replace(settings, dtype="float64")

    def run(patches: dict) -> dict[str, np.ndarray]:
        with taps.probe(case.config, (), _like_array(patches)):
            losses, first = train(truth, wide, exact_settings)
        return {f"loss after {step} updates": loss for step, loss in enumerate(losses)} | (
            {f"update {n}": array for n, array in first.items()} if not patches else {}
        )

    exact, bounds = propagated_errors(case.config, case.dtype, case.inputs.shape[1], run)
    u = UNIT_ROUNDOFF[case.dtype]
    norm = np.sqrt(sum(np.square(g).sum() for n, g in exact_gradients.items() if n != "loss"))
    scale = min(1.0, settings.clip / norm)  # the clip comes before AdamW
    for name in first_a:
        gradient = np.abs(exact_gradients[name]) * scale
        moved = np.minimum(2.0, gradient_bounds[name] * scale / (gradient + settings.eps))
        allowed = lr * moved + 4 * u * (np.abs(wide[name]) + lr)
        want = exact[f"update {name}"]
        shares = [np.abs(side - want) / allowed for side in (first_a[name], first_b[name])]
        worst = np.unravel_index(np.maximum(*shares).argmax(), want.shape)
        between = np.abs(first_a[name] - first_b[name])
        far_a, far_b = (float(np.abs(side[name] - want)[worst]) for side in (first_a, first_b))
        place = f"at {[int(i) for i in worst]}"
        bound = float(allowed[worst])
        yield Row("AdamW updates", name, float(between[worst]), float(between.mean()), far_a, far_b, bound, place)
    for step, (loss_a, loss_b) in enumerate(zip(losses_a, losses_b, strict=True)):
        name = f"loss after {step} updates"
        bound = bounds[name] + _loss_rounding(exact[name], case)
        yield row("losses", name, loss_a, loss_b, exact[name], bound)


def cached(side: Any, name: str, case: Case) -> Row:
    """Logits from the cache, one token at a time, against the uncached: of one implementation."""
    tokens = case.inputs[:1]
    start = max(1, tokens.shape[1] - 16)
    with_cache = side.cached_logits(case.config, case.weights, tokens, start, case.compute)
    without = side.logits(case.config, case.weights, tokens, case.compute)[:, start:]
    exact, bounds = activation_bounds(case.config, case.weights, tokens, case.dtype, ["logits"])
    return row("cached decoding", name, with_cache, without, exact["logits"][:, start:], bounds["logits"])


def sampled(a: Any, b: Any, case: Case) -> Iterator[Row]:
    """Tokens of both with the same seed; the bound is none."""
    prompts = [ids[: max(1, len(ids) // 2)].tolist() for ids in case.inputs[:2]]
    many: dict[str, Any] = {"temperature": 0.8, "top_k": min(50, case.config.n_vocab), "top_p": 0.95}
    for name, options in {"greedy": {"temperature": 0.0}, "temperature, top-k and top-p": many}.items():
        options = {**options, "max_new_tokens": case.new_tokens, "seed": 1, "overflow": "stop"}
        one, other = (side.generate(case.config, case.weights, prompts, case.compute, **options) for side in (a, b))
        count = sum(len(row) - len(prompt) for row, prompt in zip(one, prompts, strict=True))
        different = sum(
            sum(x != y for x, y in zip(row, their, strict=False)) + abs(len(row) - len(their))
            for row, their in zip(one, other, strict=True)
        )
        detail = f"{different} of {count} tokens differ"
        if different:
            pairs = enumerate(zip(one, other, strict=True))
            parted = [(r, i) for r, pair in pairs for i, (x, y) in enumerate(zip(*pair, strict=False)) if x != y]
            detail += "".join(f", first at row {r}, position {i}" for r, i in parted[:1])
        yield Row("sampled tokens", name, float(different), different / max(1, count), None, None, 0.0, detail)


def run(
    a: Any, b: Any, truth: Any, case: Case, settings: TrainSettings, sections: Sequence[str] = SECTIONS
) -> Iterator[Row]:
    """The rows of these sections that the two can give.

    `truth`: an implementation with gradients and training, whose float64 is the truth of those.
    """
    if "activations" in sections:
        yield from activations(a, b, case)
    known = None
    if "gradients" in sections and has("loss_and_gradients", a, b):
        known = _gradient_bounds(truth, case)
        yield from gradients(a, b, truth, case, known)
    # The trainers compute on the CPU here, and in float32 or float64.
    if "training" in sections and has("train", a, b) and case.dtype != "bfloat16" and case.compute.device == "cpu":
        yield from updates(a, b, truth, case, settings, known)
    if "decoding" in sections:
        for side in (a, b):
            if has("cached_logits", side):
                yield cached(side, side.name, case)
    if "samples" in sections and has("generate", a, b):
        yield from sampled(a, b, case)


def config_of(source: str) -> GPTConfig:
    """The configuration of a size or folder."""
    return read_folder(source)[0]


def first_beyond(found: Sequence[Row]) -> Row | None:
    """The first row, in the order of the computation, that exceeds its bound."""
    return next((one for one in found if not one.ok), None)


def random_tokens(config: GPTConfig, batch: int, positions: int, seed: int = 0) -> np.ndarray:
    """int32 [batch, positions + 1]"""
    return np.random.default_rng(seed).integers(0, config.n_vocab, (batch, positions + 1), dtype=np.int32)
