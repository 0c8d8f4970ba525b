"""Compare two implementations of GPT-2: every activation, gradients, AdamW, losses, cached decoding, samples.

    python scripts/check_parity.py torch jax                              # tiny, in seconds
    python scripts/check_parity.py torch jax --preset 124M --positions 1024
    python scripts/check_parity.py jax hf --weights 124M                  # OpenAI's weights
    python scripts/check_parity.py torch:path/to/openai torch:path/to/hf  # two copies of the same weights?
    python scripts/check_parity.py jax my_port.py                         # yours: scripts/parity_hf.py is an example

Writes report.json, report.html and exits with 1 if something is beyond what rounding allows.
"""

import base64
import dataclasses
import html
import io
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table

from parity import taps
from parity.cli import parse
from parity.comparison import error_bounds, report
from parity.comparison.implementation import open_implementation, read_weights, sharp_weights
from parity.comparison.protocol import Compute
from parity.config import as_config
from parity.errors import InputError, exit_with_message
from parity.training.settings import recipe
from parity.weights import initial_weights

_LONG = 24  # rows of a section that are printed whole


@dataclasses.dataclass(frozen=True)
class Args:
    a: tyro.conf.Positional[str] = "torch"
    """torch, jax, numpy (float64), hf, or a Python file; with :WEIGHTS for weights of its own."""
    b: tyro.conf.Positional[str] = "jax"
    weights: str = "sharp"
    """sharp (initial ones with matrices five times as large, and biases), initial, a size, or a folder."""
    preset: str = "tiny"
    """Shape of the model, where the weights do not say."""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    device: Literal["cpu", "gpu"] = "cpu"
    precision: Literal["highest", "default"] = "highest"
    """Of products: in full, or the framework's own, which is TF32 for JAX on a GPU."""
    batch: int = 2
    positions: int = 24
    names: tuple[str, ...] = ("*",)
    """Activations to compare; * is anything. At 1,024 positions scores and patterns take much memory."""
    sections: tuple[report.Section, ...] = report.SECTIONS
    """What to compare."""
    steps: int = 5
    """Optimizer steps of the loss path."""
    new_tokens: int = 32
    """Tokens sampled of each prompt."""
    seed: int = 0
    out: Path = Path("parity-report")


def main() -> int:
    args = parse(Args, __doc__)
    console = Console(width=None if sys.stdout.isatty() else 120)
    begin = time.perf_counter()

    # Model, weights, tokens
    if args.weights in ("sharp", "initial"):
        config = as_config(args.preset)
        weights = (sharp_weights if args.weights == "sharp" else initial_weights)(config, args.seed)
    else:
        config = report.config_of(args.weights)
        weights = read_weights(args.weights, None)
    if not 2 <= args.positions <= config.n_ctx:
        raise InputError(f"--positions must be in 2..{config.n_ctx}, got {args.positions}")
    weights = error_bounds.rounded(weights, args.dtype)
    a, b = (open_implementation(text, Path(__file__).parent / "parity_hf.py", config) for text in (args.a, args.b))
    case = report.Case(
        config,
        weights,
        report.random_tokens(config, args.batch, args.positions, args.seed),
        Compute(args.dtype, args.device, args.precision),
        taps.select(args.names, config),
        args.steps,
        args.new_tokens,
    )
    about = (
        f"A {args.a}, B {args.b}: {args.weights} weights, {config.n_layer} layers of width {config.n_embd}, "
        f"{args.batch} x {args.positions} tokens, {args.dtype}, products {args.precision}, {args.device}"
    )
    console.print(about, highlight=False, soft_wrap=True)

    # Compare
    found: list[report.Row] = []
    with console.status("comparing"):
        truth = open_implementation("torch", Path(), config)
        for row in report.run(a, b, truth, case, recipe("small").settings, args.sections):
            found.append(row)

    # Report
    for section in dict.fromkeys(row.section for row in found):
        show([row for row in found if row.section == section], console)
    beyond = report.first_beyond(found)
    verdict = (
        f"{len(found)} rows, all within what rounding allows"
        if beyond is None
        else f"the first row beyond what rounding allows: {beyond.section}, {beyond.name} ({beyond.detail})"
    )
    verdict += f"; {time.perf_counter() - begin:.0f} s"
    args.out.mkdir(parents=True, exist_ok=True)
    entries = {"about": about, "verdict": verdict, "rows": [row.to_dict() for row in found]}
    (args.out / "report.json").write_text(json.dumps(entries, indent=1) + "\n")
    (args.out / "report.html").write_text(page(about, verdict, found), encoding="utf-8")
    console.print(verdict, style="green" if beyond is None else "bold red", highlight=False, soft_wrap=True)
    console.print(f"{args.out / 'report.html'}", highlight=False)
    return int(beyond is not None)


COLUMNS = ("name", "worst |A-B|", "mean |A-B|", "|A-truth|", "|B-truth|", "bound", "share")


def cells(row: report.Row) -> list[str]:
    numbers = (row.between, row.mean, row.a, row.b, row.bound)
    return [row.name, *("" if n is None else f"{n:.2e}" for n in numbers), f"{row.share:.0%}"]


def show(rows: Sequence[report.Row], console: Console) -> None:
    """A section's rows, or those nearest to their bounds."""
    kept = rows
    if len(rows) > _LONG:
        near = sorted(rows, key=lambda row: -row.share)[: _LONG // 2]
        kept = [row for row in rows if row in near or not row.ok]
    title = f"{rows[0].section}: {len(rows)} rows" + (", those nearest to their bound" if kept is not rows else "")
    name, *numbers = COLUMNS
    table = Table(Column(name, no_wrap=True), *(Column(n, justify="right") for n in numbers), title=title, box=SIMPLE)
    for row in kept:
        table.add_row(*cells(row), style=None if row.ok else "bold red")
    console.print(table)


def page(about: str, verdict: str, rows: Sequence[report.Row]) -> str:
    """report.html, with its pictures inside."""
    parts = [
        "<!doctype html><meta charset='utf-8'><title>parity report</title>",
        "<style>body{font-family:sans-serif;margin:2em}table{border-collapse:collapse;margin:1em 0}"
        "td,th{padding:.2em .6em;border-bottom:1px solid #ddd;text-align:right;font-variant-numeric:tabular-nums}"
        "td:first-child,th:first-child,td:last-child{text-align:left}.bad{background:#fdd}</style>",
        f"<h1>Parity report</h1><p>{html.escape(about)}</p><p><b>{html.escape(verdict)}</b></p>",
    ]
    for section in dict.fromkeys(row.section for row in rows):
        inside = [row for row in rows if row.section == section]
        parts.append(f"<h2>{html.escape(section)}</h2>")
        if len(inside) > 2:
            parts.append(f"<img alt='errors and bounds' src='data:image/png;base64,{picture(inside)}'>")
        parts.append("<table><tr>" + "".join(f"<th>{name}</th>" for name in (*COLUMNS, "detail")) + "</tr>")
        for row in inside:
            style = "" if row.ok else " class='bad'"
            texts = "".join(f"<td>{html.escape(text)}</td>" for text in (*cells(row), row.detail))
            parts.append(f"<tr{style}>{texts}</tr>")
        parts.append("</table>")
    return "\n".join(parts) + "\n"


def picture(rows: Sequence[report.Row]) -> str:
    """PNG, as base64, of a section's errors and bounds in their order."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 3.5), layout="constrained")
    x = np.arange(len(rows))
    axes.plot(x, [row.bound for row in rows], color="black", label="bound")
    axes.plot(x, [row.between for row in rows], ".", label="|A-B|")
    for letter, errors in (("A", [row.a for row in rows]), ("B", [row.b for row in rows])):
        if None not in errors:
            axes.plot(x, errors, "_", label=f"|{letter}-truth|")
    axes.set_yscale("log")
    step = max(1, len(rows) // 30)
    axes.set_xticks(x[::step], [row.name for row in rows][::step], rotation=90, fontsize=6)
    axes.set_ylabel("worst error")
    axes.legend(fontsize=7, ncols=4, loc="lower right")
    stream = io.BytesIO()
    figure.savefig(stream, dpi=110)
    plt.close(figure)
    return base64.b64encode(stream.getvalue()).decode()


if __name__ == "__main__":
    with exit_with_message():
        sys.exit(main())
