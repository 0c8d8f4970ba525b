"""Compare two implementations of GPT-2: activations, gradients, AdamW updates, losses, cached decoding, samples.

    python scripts/check_parity.py torch jax                              # the tiny preset, in seconds
    python scripts/check_parity.py torch jax --preset 124M --positions 1024
    python scripts/check_parity.py jax hf --weights 124M                  # OpenAI's weights
    python scripts/check_parity.py torch:A torch:B                        # do the folders A and B hold the same model?
    python scripts/check_parity.py jax my_port.py                         # your own, like scripts/parity_hf.py

Writes report.json and report.html. The exit status is 1 if anything differs by more than rounding allows.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.box import SIMPLE
from rich.table import Column, Table

from parity import taps
from parity.cli import parse
from parity.comparison import report
from parity.comparison.case import Case, random_tokens, sharp_weights
from parity.comparison.error_bounds import rounded
from parity.comparison.html import html_page
from parity.comparison.implementation import open_implementation, read_weights
from parity.comparison.protocol import Compute
from parity.comparison.sections import ROW_SECTIONS, SECTIONS, Section, compare_implementations
from parity.config import as_config
from parity.console import PlainConsole
from parity.errors import InputError, exit_with_message
from parity.training.settings import recipe
from parity.weights import initial_weights

_ALIASES = {"hf": Path(__file__).parent / "parity_hf.py"}
_DRAWN = ("sharp", "initial")  # weights that are drawn instead of read
_MAX_PRINTED = 24  # rows of a section that are all printed; of a longer one, those nearest to their bounds


@dataclasses.dataclass(frozen=True)
class Args:
    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[A]")] = "torch"
    """First implementation: torch, jax, numpy (the float64 reference), hf (Hugging Face transformers) or the path
    of a Python file. Append :WEIGHTS (a size, a run, the address of a mirrored run, a folder or a file) to give it
    weights of its own; both models must have the same shape."""
    b: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[B]")] = "jax"
    """Second implementation, in the same form as the first."""
    weights: str | None = None
    """Weights of the implementations that have none of their own: initial (freshly initialized), sharp (the same with
    matrices five times as large and random biases, so that attention is sharp), a size such as 124M, a run, the
    address of a mirrored run, a folder or a file. By default those after the name of the other implementation,
    otherwise sharp."""
    preset: str | None = None
    """Preset that gives the shape of initial and sharp weights, by default tiny; all other weights have a shape of
    their own."""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Dtype that both implementations compute in."""
    device: Literal["cpu", "gpu", "cuda"] = "cpu"
    """Device that both implementations compute on; gpu and cuda mean the same."""
    precision: Literal["highest", "default"] = "highest"
    """Precision of float32 matrix products on a GPU: highest is full float32, default allows TF32."""
    batch: int = 2
    """Number of rows in the batch of random tokens."""
    positions: int = 24
    """Number of tokens per row."""
    names: tuple[str, ...] = ("*",)
    """Names of the activations to compare; * matches anything. At 1,024 positions, attention scores and patterns of
    the larger models need much memory."""
    sections: tuple[Section, ...] = SECTIONS
    """Sections of the report. Gradients and training need PyTorch for the float64 reference."""
    steps: int = 5
    """Number of optimizer steps in the training section."""
    new_tokens: int = 32
    """Number of tokens to sample per prompt in the samples section."""
    seed: int = 0
    """Seed of the random weights and tokens."""
    compilation_cache: bool = True
    """Keep the programs that JAX compiles in the cache folder, so that the next comparison need not compile them."""
    out: Path = Path("parity-report")
    """Folder for report.json and report.html."""


def main() -> int:
    args = parse(Args, __doc__)
    console = PlainConsole(width=None if sys.stdout.isatty() else 120)
    start = time.perf_counter()
    case = make_case(args)
    chosen = chosen_weights(args)
    source = None if chosen in _DRAWN else chosen
    a, b = (open_implementation(spec, case.config, _ALIASES, source) for spec in (args.a, args.b))
    if "gpt_jax" in sys.modules:
        from gpt_jax.compilation_cache import enable_compilation_cache

        enable_compilation_cache(args.compilation_cache)
    title = (
        f"A is {args.a}, B is {args.b}: {chosen} weights, {case.config.n_layer} layers, width "
        f"{case.config.n_embd}, {args.batch} x {args.positions} tokens, {args.dtype}, "
        f"{args.precision} precision of matrix products, {args.device}"
    )
    console.print(title, soft_wrap=True)
    with console.status("comparing"):
        rows = list(compare_implementations(a, b, case, recipe("small").settings, args.sections))
    compared = report.by_section(rows)
    missing = [section for section in args.sections if not compared.keys() & ROW_SECTIONS[section]]
    if not rows:
        raise InputError(
            f"nothing to compare: {args.a} or {args.b} lacks what --sections {' '.join(args.sections)} needs"
        )
    for members in compared.values():
        console.print(section_table(members))

    failure = report.first_failure(rows)
    not_compared = f"; not compared: {', '.join(missing)}" * bool(missing)
    verdict = f"{report.verdict(rows)}{not_compared}; {time.perf_counter() - start:.0f} s"
    args.out.mkdir(parents=True, exist_ok=True)
    entries = {"title": title, "verdict": verdict, "rows": [row.to_dict() for row in rows]}
    (args.out / "report.json").write_text(json.dumps(entries, indent=1) + "\n")
    (args.out / "report.html").write_text(html_page(title, verdict, rows), encoding="utf-8")
    console.print(verdict, style="green" if failure is None else "bold red", soft_wrap=True)
    console.print(f"{args.out / 'report.html'}")
    return int(failure is not None)


def chosen_weights(args: Args) -> str:
    """Return the name of the comparison's weights, whose shape both implementations must have."""
    own = [origin for _, _, origin in (spec.partition(":") for spec in (args.a, args.b)) if origin]
    return args.weights or [*own, "sharp"][0]


def make_case(args: Args) -> Case:
    """Return the model, weights and tokens that the options select."""
    for name, low in (("batch", 1), ("steps", 1), ("new_tokens", 1), ("seed", 0)):
        if getattr(args, name) < low:
            raise InputError(f"--{name.replace('_', '-')} must be at least {low}, got {getattr(args, name)}")
    chosen = chosen_weights(args)
    if chosen in _DRAWN:
        config = as_config(args.preset or "tiny")
        weights = (sharp_weights if chosen == "sharp" else initial_weights)(config, args.seed)
    elif args.preset is not None:
        raise InputError(f"--preset {args.preset} is for initial and sharp weights; those of {chosen} have a shape")
    else:
        config, weights = read_weights(chosen)
    if not 2 <= args.positions <= config.n_ctx:
        raise InputError(f"--positions must be in 2..{config.n_ctx}, got {args.positions}")
    return Case(
        config,
        rounded(weights, args.dtype),
        random_tokens(config, args.batch, args.positions, args.seed),
        Compute(args.dtype, args.device, args.precision),
        taps.select(args.names, config),
        args.steps,
        args.new_tokens,
    )


def section_table(rows: Sequence[report.Row]) -> Table:
    """The rows of a section, or those nearest to their bounds."""
    title, printed = f"{rows[0].section}: {len(rows)} rows", rows
    if len(rows) > _MAX_PRINTED:
        nearest = sorted(rows, key=lambda row: -row.share)[: _MAX_PRINTED // 2]
        printed = [row for row in rows if row in nearest or not row.ok]
        title += f", of which the {len(printed)} nearest to their bounds"
    name, *numbers = report.COLUMNS
    columns = [Column(name, no_wrap=True), *(Column(n, justify="right") for n in numbers)]
    table = Table(*columns, title=title, box=SIMPLE)
    for row in printed:
        table.add_row(*row.cells(), style=None if row.ok else "bold red")
    return table


if __name__ == "__main__":
    with exit_with_message():
        sys.exit(main())
