"""`benchmark.py profile`: where gpt_jax's training step spends its time, by kind of operation, from JAX's profiler."""

import gzip
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from measure import peers
from measure.report import Measurement
from measure.timing import Peer, Spec, Timings, Workload, peak_resident
from parity.config import GPTConfig
from parity.training.settings import TrainSettings

STEP, BETWEEN, PRODUCTS, OTHER = "step", "no operation recorded", "products", "other, mostly element by element"
KINDS = (
    PRODUCTS,
    "sums",
    "copies and transposes",
    "stacked arrays of the scan",
    "optimizer and clipping",
    OTHER,
    BETWEEN,
)
_MOVES = {"copy", "transpose", "bitcast", "reshape", "slice", "concatenate", "pad", "parameter", "constant", "tuple"}
_MOVES |= {"get-tuple-element", "broadcast", "dynamic-slice"}


class Profile(NamedTuple):
    """Traced steps."""

    seconds: dict[str, float]
    """Seconds per step: of the step, of each kind of operation, and between them."""
    flops: int
    """FLOPs of the products of a step."""
    longest: list[str]
    """The products that take longest, as text."""


def measure(title: str, spec: Spec, rounds: int) -> Measurement:
    """Return the seconds of the kinds of operation, whose ratio to the first row is their share of the step."""
    with Peer("gpt_jax", spec) as peer:
        profiles: list[Profile] = [peer.call() for _ in range(rounds)]
        peak, device = peer.peak(), peer.device
    timings = {kind: Timings([profile.seconds[kind] for profile in profiles], 0, device) for kind in (STEP, *KINDS)}
    timings[STEP] = timings[STEP]._replace(peak=peak)
    flops, products = profiles[0].flops, timings[PRODUCTS].median
    notes = [
        f"{flops / 1e9:.1f} GFLOP of products, {flops / products / 1e12:.3f} TFLOP/s in them and "
        f"{flops / timings[STEP].median / 1e12:.3f} in the step",
        f"The products that take longest: {'; '.join(profiles[0].longest)}",
    ]
    return Measurement(title, "step", 1, "1", timings, notes)


def step_profile(config: GPTConfig, settings: TrainSettings, unroll: int, remat: str, n_steps: int) -> Workload:
    """Trace steps of gpt_jax on a CPU; the call returns their Profile."""
    import jax

    from gpt_jax import hlo
    from gpt_jax.train import Trainer

    trainer = Trainer(config, settings, unroll=unroll, remat=remat)
    batch = trainer.to_device(*peers.batch(config, settings))
    numbers = jax.numpy.float32(1e-3), jax.numpy.int32(0)
    program = hlo.parse(trainer._train_step.lower(trainer.state, batch, *numbers, trainer._frozen).compile().as_text())
    kinds, flops = _kinds(program)

    def step() -> None:
        jax.block_until_ready(trainer.train_step(batch, 1e-3, 0))

    step()

    def call() -> Profile:
        begin = time.perf_counter()
        for _ in range(n_steps):
            step()
        seconds = {STEP: (time.perf_counter() - begin) / n_steps}
        events, traced = _trace(step, n_steps)
        scale = seconds[STEP] / traced  # tracing takes time
        by_operation: Counter[str] = Counter()
        for event in events:
            by_operation[event["args"]["hlo_op"]] += scale * event["dur"] / 1e6 / n_steps
        seconds |= dict.fromkeys(KINDS, 0.0)
        for name, duration in by_operation.items():
            seconds[kinds.get(name, OTHER)] += duration
        seconds[BETWEEN] = max(0.0, seconds[STEP] - scale * _covered(events) / n_steps)
        products = {name: duration for name, duration in by_operation.items() if kinds.get(name) == PRODUCTS}
        longest = sorted(products, key=products.__getitem__, reverse=True)[:4]
        texts = [f"{shape_of(program, n)} {1e3 * products[n]:.1f} ms" for n in longest]
        total = sum(flops[name] * sum(e["args"]["hlo_op"] == name for e in events) for name in products)
        return Profile(seconds, total // n_steps, texts)

    return Workload(call, peak_resident, "cpu")


def _trace(step: Callable[[], None], n_steps: int) -> tuple[list[dict[str, Any]], float]:
    """Return the events of the operations of traced steps, and the seconds of a traced step."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            begin = time.perf_counter()
            for _ in range(n_steps):
                step()
            seconds = (time.perf_counter() - begin) / n_steps
        [file] = Path(folder).rglob("perfetto_trace.json.gz")
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    operations = [event for event in events if event.get("ph") == "X" and "hlo_op" in event.get("args", {})]
    return [event for event in operations if not event["name"].startswith("while")], seconds


def _covered(events: list[dict[str, Any]]) -> float:
    """Return the seconds in which at least one operation runs."""
    total = end = 0.0
    for event in sorted(events, key=lambda event: event["ts"]):
        total += max(0.0, event["ts"] + event["dur"] - max(end, event["ts"]))
        end = max(end, event["ts"] + event["dur"])
    return total / 1e6


def _kinds(program: Any) -> tuple[dict[str, str], dict[str, int]]:
    """Return {operation: kind} and {product: FLOPs} of a program."""
    from gpt_jax import hlo

    kinds: dict[str, str] = {}
    flops: dict[str, int] = {}
    for computation in program.computations.values():
        for name, operation in computation.items():
            inner = program.computations.get(operation.called) if operation.kind == "fusion" else None
            inside = {o.kind for o in inner.values()} if inner else {operation.kind}
            functions = program.functions(operation)
            if "dot" in inside:
                kinds[name] = PRODUCTS
                flops[name] = hlo.fusion_cost(inner)[0] if inner else hlo.product_flops(computation, operation)
            elif "make_train_step.<locals>.train_step" in functions and "summed_loss" not in functions:
                kinds[name] = "optimizer and clipping"
            elif "dynamic-update-slice" in inside or ("dynamic-slice" in inside and inside <= _MOVES):
                kinds[name] = "stacked arrays of the scan"
            elif inside <= {"broadcast", "parameter", "constant"} and functions[:1] == ("GPTModel._layers",):
                kinds[name] = "stacked arrays of the scan"  # the zeros that they start with
            elif inside <= _MOVES:
                kinds[name] = "copies and transposes"
            elif "reduce" in inside or "reduce-window" in inside:
                kinds[name] = "sums"
    return kinds, flops


def shape_of(program: Any, name: str) -> str:
    """Return the shapes of an operation and of what it reads, as text."""
    for computation in program.computations.values():
        if name in computation:
            operation = computation[name]
            read = [computation[operand].shape.partition("{")[0] for operand in operation.operands]
            return f"{operation.shape.partition('{')[0]} from {', '.join(read[:2])}"
    return name
