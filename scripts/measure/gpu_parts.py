"""The parts of scripts/test_gpu.py: their commands, and what is read from the files that these write."""

import dataclasses
import functools
import importlib.util
import json
import math
import os
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from measure.parts import ROOT, Command, Outcome, Part, Status, failure, log_file

# Both trainers compute the same function. In float64, where rounding has no time to grow, their losses are the same;
# in float32 the trajectories of an ill-conditioned batch drift apart.
_LOSS_TOLERANCE = {"float64": 1e-9, "float32": 1e-2}
# Losses are bit-identical with deterministic operations. Where a GPU adds in another order, ill-conditioned batches
# move a float32 loss by up to 6e-4; a wrong batch or a lost moment moves it more.
_RESUMED_TOLERANCE = 1e-3
_EXACT = {
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true",
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large the work of each part is."""

    preset: str
    """Model of the parity reports and of the sampled tokens."""
    positions: int
    new_tokens: int
    training: str
    """Preset of the training runs."""
    steps: int
    benchmarks: Sequence[Sequence[str]]
    """Arguments of benchmark.py for each of its parts."""


GPU = Sizes(
    "124M", 64, 32, "small", 200,
    [["train", "--gpu", "--rounds", "3"], ["generate", "--gpu", "--rounds", "3"],
     ["compile", "--gpu", "--peers", "gpt_jax"], ["load", "--gpu", "--rounds", "1"]],
)  # fmt: skip
CPU = Sizes("tiny", 8, 8, "tiny", 20, [["train", "--preset", "tiny", "--rounds", "1", "--calls", "1"]])
_PARITY = {  # name: (dtype, precision of float32 products)
    "float32": ("float32", "highest"),
    "TF32": ("float32", "default"),
    "bfloat16": ("bfloat16", "highest"),
}
_BACKENDS = ("jax", "torch")


def parts(device: str, folder: Path) -> list[Part]:
    """Return all parts for a device, `gpu` or, with small sizes, `cpu`; their commands write into `folder`."""
    sizes = GPU if device == "gpu" else CPU
    on_device = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # torch needs memory as well
    if device == "cpu":
        on_device |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}

    def script(name: str, *arguments: object, **environment: str) -> Command:
        return Command([str(ROOT / "scripts" / name), *map(str, arguments)], {**on_device, **environment})

    def parity(name: str) -> Command:
        dtype, precision = _PARITY[name]
        model = ("--preset", sizes.preset, "--positions", sizes.positions, "--batch", 1, "--device", device)
        sections = ("--sections", "activations", "gradients", "decoding")
        options = (*model, "--dtype", dtype, "--precision", precision, *sections)
        return script("check_parity.py", "torch", "jax", *options, "--out", folder / "parity" / name)

    def train(backend: str, run: Path, *options: object) -> Command:
        # The fused attention of torch does not add in a fixed order.
        exact = ("--attention", "explicit", "--device", device, "--run", run / backend)
        return script(f"train_{backend}.py", *exact, *options, **_EXACT)

    def train_anew(backend: str, run: Path, dtype: str) -> Command:
        lengths = ("--steps", sizes.steps, "--eval-every", sizes.steps // 2)
        return train(backend, run, "--preset", sizes.training, *lengths, "--dtype", dtype)

    def killed(backend: str) -> Command:
        arguments, environment = train_anew(backend, folder / "kill-and-resume", "float32")
        return Command(["-m", "measure.killed", str(3 * sizes.steps // 4), *arguments], environment)

    def benchmark(arguments: Sequence[str]) -> Part:
        name = f"benchmark {arguments[0]}"
        peers = () if "--peers" in arguments or importlib.util.find_spec("transformers") else ("--peers", "gpt_torch")
        command = script("benchmark.py", *arguments, *peers, "--out", folder / name.replace(" ", "-"))
        return Part(name, {"train": 16, "generate": 8}.get(arguments[0], 4), [[command]], _summarize_benchmark)

    doctor = Command(["-m", "parity.doctor"], on_device)
    out = folder / "sampled-tokens" / "tokens.json"
    tokens = Command(["-m", "measure.sampled_tokens", device, sizes.preset, str(sizes.new_tokens), str(out)], on_device)
    trained = [train_anew(b, folder / "training" / dtype, dtype) for dtype in _LOSS_TOLERANCE for b in _BACKENDS]
    resumed = [train(backend, folder / "kill-and-resume", "--resume") for backend in _BACKENDS]
    return [
        Part("doctor", 4, [[doctor]], functools.partial(_summarize_doctor, device)),
        Part("parity", 12, [[parity(name) for name in _PARITY]], _summarize_parity),
        Part("sampled tokens", 8, [[tokens]], _summarize_tokens),
        Part("training", 6, [trained], _summarize_training),
        Part("kill and resume", 7, [[killed(backend) for backend in _BACKENDS], resumed], _summarize_resuming),
        *map(benchmark, sizes.benchmarks),
    ]


def _combined(outcomes: Mapping[str, Callable[[], Outcome]]) -> Outcome:
    """Return the outcome of several comparisons; those that have no files are failures."""
    found = {}
    for name, summarize in outcomes.items():
        try:
            found[name] = summarize()
        except Exception as error:
            found[name] = failure(error)
    statuses = {outcome.status for outcome in found.values()}
    lines = [f"{name}: {line}" for name, outcome in found.items() for line in outcome.lines]
    data = {name: {"status": outcome.status, **outcome.data} for name, outcome in found.items()}
    return Outcome(_passed("failed" not in statuses), lines, data)


def _passed(passed: bool) -> Status:
    return "passed" if passed else "failed"


def _summarize_doctor(device: str, folder: Path, statuses: Sequence[int | None]) -> Outcome:
    report = log_file(folder).read_text(encoding="utf-8", errors="replace")
    problems = [line for line in report.splitlines() if line.startswith("problem: ")]
    on_cpu = [name for name in _BACKENDS if re.search(rf"^ *{name}'s devices +cpu ", report, re.MULTILINE)]
    if device == "gpu":
        problems += [f"{name} sees no GPU" for name in on_cpu]
    status = _passed(statuses == [0] and not problems)
    markdown = f"## doctor\n\n```text\n{report}```\n"
    return Outcome(status, problems or ["no problems found"], {"report": report}, markdown)


def _summarize_parity(folder: Path, statuses: Sequence[int | None]) -> Outcome:
    by_name = dict(zip(_PARITY, statuses, strict=True))
    return _combined({name: functools.partial(_parity_report, folder / name, by_name[name]) for name in _PARITY})


def _parity_report(folder: Path, status: int | None) -> Outcome:
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    rows = report["rows"]
    lines = [report["verdict"]]
    for section in dict.fromkeys(row["section"] for row in rows):
        worst = max((row for row in rows if row["section"] == section), key=lambda row: _or_infinity(row["share"]))
        lines.append(f"{section}: {_distances(worst)}; {worst['share']:.0%} of the bound, at {worst['name']}")
    lines += [f"{row['name']}: {_distances(row)}" for row in rows if row["name"] in ("logits", "loss")]
    if folder.name == "TF32" and status in (0, 1):  # it rounds more than the bounds of float32 allow
        return Outcome("measured", lines, report)
    return Outcome(_passed(status == 0), lines, report)


def _distances(row: dict[str, Any]) -> str:
    return f"from float64 torch {row['error_a']:.1e}, jax {row['error_b']:.1e}; apart {row['difference']:.1e}"


def _or_infinity(number: float) -> float:
    return number if math.isfinite(number) else math.inf


def _summarize_tokens(folder: Path, statuses: Sequence[int | None]) -> Outcome:
    compared = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
    lines = [f"{entry['what']}: {entry['equal']} of {entry['count']} tokens equal" for entry in compared]
    equal = all(entry["equal"] == entry["count"] for entry in compared)
    return Outcome(_passed(equal and statuses == [0]), lines, {"compared": compared})


def read_losses(run: Path) -> dict[int, float]:
    """Return {step: training loss} of a run folder."""
    entries = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}


def _largest_difference(losses: dict[int, float], others: dict[int, float]) -> float:
    """Return the largest relative difference, infinite if the runs do not have the same steps."""
    if losses.keys() != others.keys() or not losses:
        return math.inf
    return max(abs(losses[step] - others[step]) / abs(others[step]) for step in losses)


def _summarize_training(folder: Path, _: Sequence[int | None]) -> Outcome:
    return _combined({dtype: functools.partial(_equal_losses, folder / dtype) for dtype in _LOSS_TOLERANCE})


def _equal_losses(folder: Path) -> Outcome:
    tolerance = _LOSS_TOLERANCE[folder.name]
    losses = {backend: read_losses(folder / backend) for backend in _BACKENDS}
    difference = _largest_difference(*losses.values())
    last = {name: f"{of_run[max(of_run)]:.6f}" if of_run else "none" for name, of_run in losses.items()}
    ends = ", ".join(f"{name} {text}" for name, text in last.items())
    text = f"{len(losses['jax'])} steps; last loss {ends}; largest relative difference {difference:.1e}"
    data = {"largest_difference": difference, "losses": losses}
    return Outcome(_passed(difference <= tolerance), [f"{text}, allowed {tolerance:.0e}"], data)


def _summarize_resuming(folder: Path, statuses: Sequence[int | None]) -> Outcome:
    whole = folder.parent / "training" / "float32"
    ends = {backend: list(statuses[number :: len(_BACKENDS)]) for number, backend in enumerate(_BACKENDS)}
    return _combined({b: functools.partial(_resumed_losses, folder / b, whole / b, ends[b]) for b in _BACKENDS})


def _resumed_losses(run: Path, uninterrupted: Path, statuses: Sequence[int | None]) -> Outcome:
    """Compare a resumed run with the uninterrupted one or, if that part has not been run, with the other backend's."""
    other, tolerance = "the uninterrupted run", _RESUMED_TOLERANCE
    if not uninterrupted.exists():
        [uninterrupted] = (run.with_name(backend) for backend in _BACKENDS if backend != run.name)
        other, tolerance = f"{uninterrupted.name}'s resumed run", _LOSS_TOLERANCE["float32"]
    losses = read_losses(run)
    difference = _largest_difference(losses, read_losses(uninterrupted))
    agreement = "bit-identical" if difference == 0 else f"apart by up to {difference:.1e} (relative)"
    text = f"killed and resumed; its {len(losses)} losses and those of {other} are {agreement}"
    passed = statuses == [-signal.SIGKILL, 0] and difference <= tolerance
    return Outcome(_passed(passed), [text], {"largest_difference": difference})


def _summarize_benchmark(folder: Path, statuses: Sequence[int | None]) -> Outcome:
    """Whatever was measured counts, also if the time was not enough for the rest."""
    entries = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    lines = []
    for measurement in entries["measurements"]:
        rates = (f"{n} {peer['rate']:,.0f}" if "rate" in peer else n for n, peer in measurement["peers"].items())
        lines += [f"{measurement['title']}: {', '.join(rates)} {measurement['unit']}/s", *measurement["notes"]]
    markdown = (folder / "results.md").read_text(encoding="utf-8")
    return Outcome("measured" if statuses == [0] else "failed", lines, entries, f"#{markdown}")
