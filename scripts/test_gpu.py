"""Test and measure everything on one GPU in nine minutes: parity, training, resuming, and the benchmarks.

    python scripts/test_gpu.py                      # on the GPU
    python scripts/test_gpu.py --budget 1800        # with time for every benchmark
    python scripts/test_gpu.py --device cpu         # the same parts with small sizes

The parts run one after another, in processes of their own, and each reports on its own, whatever becomes of the
others. results.json and results.md in the folder --out have the card's name, and are written after each part. The exit
status is 1 if a part failed or ran out of time. The packages may be anywhere on PYTHONPATH; this project need not be
installed.
"""

import dataclasses
import platform
import shlex
import signal
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Literal

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from measure.gpu_parts import parts
from measure.parts import Result, run_parts, write_results

from parity.cli import parse, versions
from parity.console import PlainConsole
from parity.doctor import nvidia_gpus
from parity.errors import InputError, exit_with_message


@dataclasses.dataclass(frozen=True)
class Args:
    device: Literal["gpu", "cuda", "cpu"] = "gpu"
    """Device that is tested; gpu and cuda mean the same, and cpu exercises the same parts with small sizes."""
    budget: float = 540.0
    """Time for all parts together in seconds. A part that takes longer than its share is stopped."""
    only: tuple[str, ...] = ()
    """Run only the parts whose names contain one of these texts, such as parity or benchmark; by default all parts."""
    out: Path | None = None
    """Folder for results.json, results.md and everything that the parts write; by default a new one in runs/."""


def main() -> int:
    args, console = parse(Args, __doc__), PlainConsole(lossy=True)
    if args.device == "cuda":
        args = dataclasses.replace(args, device="gpu")
    out = (args.out or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-test-{args.device}").resolve()
    chosen = [part for part in parts(args.device, out) if not args.only or any(text in part.name for text in args.only)]
    if not chosen:
        names = ", ".join(part.name for part in parts(args.device, out))
        raise InputError(f"--only {' '.join(args.only)}: no part has such a name; the parts are {names}")
    if not args.budget > 0:
        raise InputError(f"--budget must be positive, got {args.budget}")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # which ends the parts' processes too
    out.mkdir(parents=True, exist_ok=True)
    gpus = nvidia_gpus() if args.device == "gpu" else []
    facts = {
        "card": gpus[0] if gpus else f"{args.device}, {platform.machine()}",
        "machine": f"{platform.node()}, {platform.platform()}",
        "versions": versions(),
        "date": f"{datetime.now():%Y-%m-%d %H:%M}",
        "command": shlex.join(["python", "scripts/test_gpu.py", *sys.argv[1:]]),
    }
    console.print(f"{facts['card']}; {facts['versions']}; results are in {out}", soft_wrap=True)
    results: list[Result] = []
    begin = time.monotonic()
    for result in run_parts(chosen, out, args.budget):
        results.append(result)
        write_results(out, facts, results)
        console.print(f"{result.outcome.status:<10} {result.seconds:4.0f} s  {result.name}")
        for line in result.outcome.lines:
            console.print(f"                   {line}", soft_wrap=True)
    bad = [result.name for result in results if result.outcome.status in ("failed", "timed out")]
    verdict = f"not passed: {', '.join(bad)}" if bad else "every part passed"
    console.print(f"{verdict}; {time.monotonic() - begin:.0f} s; {out / 'results.md'}", soft_wrap=True)
    return int(bool(bad))


if __name__ == "__main__":
    with exit_with_message():
        sys.exit(main())
