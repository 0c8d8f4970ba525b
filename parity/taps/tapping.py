"""What a model does at a named activation: nothing, or what the probe or the constraint of the thread says."""

import contextlib
import dataclasses
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from parity.config import GPTConfig
from parity.errors import InputError
from parity.taps.names import AXES, ONLY_EXPLICIT, Patch, axes, expand_patches, select

_tracers: dict[type, Callable[[], Any]] = {}


def register_tracer(tracer: type, trace_state: Callable[[], Any]) -> None:
    """Register the class that stands for arrays while a framework traces a function (jit, grad, ...).

    Such an array has no value. A probe that was opened outside of the traced function raises for it: a patch would
    become part of the compiled function. A backend that traces functions calls this when it is imported.

    Args:
        tracer: Class of the arrays without a value.
        trace_state: Returns an object that identifies the function that is being traced.
    """
    _tracers[tracer] = trace_state


@dataclasses.dataclass
class Probe:
    """What `probe` does with the activations of the models that run in it.

    Attributes:
        names: Activations to record.
        patches: Replacements, by name.
        convert: (value of a patch, activation) -> the value as an array like the activation.
        cache: Recorded activations, by name.
        visited: Names in `names` and `patches` that a model has computed.
        layer: Number of the layer that is running; None outside of the layers.
        trace_states: The traced function, by class of tracer, when the probe was opened; see `register_tracer`.
    """

    names: frozenset[str]
    patches: Mapping[str, Patch]
    convert: Callable[[Any, Any], Any]
    cache: dict[str, Any] = dataclasses.field(default_factory=dict)
    visited: set[str] = dataclasses.field(default_factory=set)
    layer: int | None = None
    trace_states: Mapping[type, Any] = dataclasses.field(
        default_factory=lambda: {tracer: state() for tracer, state in _tracers.items()}
    )

    def visit(self, name: str, x: Any) -> Any:
        """Record or replace an activation.

        Args:
            name: Name of the activation, without the prefix of its layer.
            x: Its value.

        Returns:
            The value with which the model continues.

        Raises:
            InputError: If the value is traced by a function that is compiled under the probe, or a patch does not
                fit it.
        """
        if self.layer is not None:
            name = f"blocks.{self.layer}.{name}"
        if name not in self.names and name not in self.patches:
            return x
        if any(isinstance(x, tracer) and _tracers[tracer]() != state for tracer, state in self.trace_states.items()):
            raise InputError(
                f"the activation {name} is computed inside a function that is compiled or transformed (jax.jit, "
                "jax.grad, jax.vmap, ...) under a probe that was opened outside of it, so it has no value yet; call "
                "run_with_cache inside that function and return the cache from it"
            )
        self.visited.add(name)
        if name in self.patches:
            patch = self.patches[name]
            x = self._replacement(name, patch(x) if callable(patch) else patch, x)
        if name in self.names:
            self.cache[name] = x
        return x

    def check_all_visited(self) -> None:
        """Check that the models have computed every requested activation.

        Raises:
            InputError: If one was never computed.
        """
        if never := sorted((self.names | self.patches.keys()) - self.visited):
            raise InputError(
                f"no model computed {', '.join(never)} under the probe: either no model ran, or it ran in a "
                "function that was compiled before (jax.jit); call run_with_cache inside that function instead"
            )

    def _replacement(self, name: str, value: Any, x: Any) -> Any:
        if value is None:
            raise InputError(f"the patch of {name} is None; a patch that is a function must return the replacement")
        shape, expected = tuple(np.shape(value)), tuple(x.shape)
        padded = (1,) * (len(expected) - len(shape)) + shape
        if len(padded) != len(expected) or any(a not in (1, b) for a, b in zip(padded, expected, strict=True)):
            raise InputError(f"patch of {name}: shape {list(shape)} does not fit [{axes(name)}] {list(expected)}")
        return self.convert(value, x)

    @property
    def needs_explicit_attention(self) -> bool:
        """Whether an activation is requested that only the explicit attention computes."""
        return any(name.endswith(ONLY_EXPLICIT) for name in [*self.names, *self.patches])


Constrain = Callable[[str, Any], Any]
"""(axes, x) -> x with a sharding; the axes are written as in "B T D"."""


class _Active(threading.local):
    """The probe and the constraint of each thread. Not a ContextVar, which torch.compile cannot trace."""

    def __init__(self) -> None:  # runs once in each thread
        self.probe: Probe | None = None
        self.constrain: Constrain | None = None


_active = _Active()


def tap(name: str, x: Any) -> Any:
    """Mark a value as a named activation.

    Args:
        name: Name of the activation, without the prefix of its layer.
        x: Its value, with the axes in AXES.

    Returns:
        x; under a probe, x or its replacement; otherwise, in `constraining`, x with a sharding.

    Raises:
        InputError: Under a probe, for the reasons of `Probe.visit`.
    """
    if _active.probe is not None:
        return _active.probe.visit(name, x)
    if _active.constrain is not None:
        return _active.constrain(AXES[name if name in AXES else f"blocks.{{}}.{name}"], x)
    return x


@contextlib.contextmanager
def constraining(constrain: Constrain) -> Iterator[None]:
    """Let `tap` return constrain(axes, x), the same values with a sharding, within this context and on this thread.

    Args:
        constrain: (axes, x) -> x with a sharding.

    Yields:
        Nothing.
    """
    outer, _active.constrain = _active.constrain, constrain
    try:
        yield
    finally:
        _active.constrain = outer


def probing() -> bool:
    """Return whether a probe is open on this thread. If so, a model runs its layers one by one, not in a scan."""
    return _active.probe is not None


def attention(kind: str) -> str:
    """Return the attention to run: "explicit" if a probe requests scores or patterns, otherwise `kind`.

    Args:
        kind: The attention that the model has been given.
    """
    return "explicit" if _active.probe is not None and _active.probe.needs_explicit_attention else kind


def layer(number: int | None) -> None:
    """Set the layer that runs next, whose number completes the names of its activations.

    Args:
        number: Number of the layer; None after the last one.
    """
    if _active.probe is not None:
        _active.probe.layer = number


@contextlib.contextmanager
def probe(
    config: GPTConfig,
    names: Iterable[str] | str | None,
    patches: Mapping[str, Patch] | None = None,
    convert: Callable[[Any, Any], Any] = lambda value, x: value,
) -> Iterator[dict[str, Any]]:
    """Record and replace activations of the models that run in this context, on this thread.

    Only the innermost of nested probes is active. The usual way to use one is `run_with_cache` of a backend.

    Args:
        config: Configuration of the models that will run.
        names: Activations to record, with patterns as in `select`; None records all of them, () records none.
        patches: Replacements by name; a pattern as the name replaces every activation that it matches.
        convert: (value of a patch, activation) -> the value as an array like the activation.

    Yields:
        {name: activation}, filled by the models that run; with a patch, the replacement is recorded.

    Raises:
        InputError: On entry for names that the model does not have and for an activation with two patches. On exit
            for an activation that was requested but never computed, because no model ran or it was compiled before.
            While a model runs, for a patch of the wrong shape and for an activation that is computed inside a
            function which is compiled under the probe.
    """
    current = Probe(frozenset(select(names, config)), expand_patches(patches or {}, config), convert)
    outer, _active.probe = _active.probe, current
    try:
        yield current.cache
    finally:
        _active.probe = outer
    current.check_all_visited()


def run(
    model: Any,
    tokens: Any,
    names: Iterable[str] | str | None,
    patches: Mapping[str, Patch] | None,
    convert: Callable[[Any, Any], Any],
) -> tuple[Any, dict[str, Any]]:
    """Run a model under a probe: `run_with_cache` of both backends.

    Args:
        model: A model of either backend.
        tokens: Integer ids [B, T].
        names: Activations to record, with patterns as in `select`.
        patches: Replacements by name or pattern.
        convert: (value of a patch, activation) -> the value as an array like the activation.

    Returns:
        (logits [B, T, V], {name: activation}).

    Raises:
        InputError: For the reasons of `probe`.
    """
    with probe(model.config, names, patches, convert) as cache:
        if attention(fused := model.attention) != fused:
            warnings.warn(f"explicit attention runs instead of {fused}, which has no scores or patterns", stacklevel=3)
        logits = model(tokens)
    return logits, cache
