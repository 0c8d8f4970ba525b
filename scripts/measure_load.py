"""Measure time and peak memory of load_pretrained, on random weights of the full shapes.

python scripts/measure_load.py 124M
python scripts/measure_load.py 1558M --folder /data/tmp
"""

import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table

from parity import openai_checkpoint, weights
from parity.config import PRESETS
from parity.errors import exit_with_message

# In a process of its own, so that the peak is the loading's. Imports are not part of the time.
_CHILD = """
import importlib, pathlib, re, sys, time
package = importlib.import_module(sys.argv[1])
begin = time.perf_counter()
model = package.load_pretrained(sys.argv[2])
if sys.argv[1] == "gpt_jax":
    import jax
    jax.block_until_ready(model)
seconds = time.perf_counter() - begin
# Linux's high-water mark of this program; getrusage would include what the parent had when it forked.
print(seconds, 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]))
"""


@dataclasses.dataclass(frozen=True)
class Args:
    size: tyro.conf.Positional[Literal["124M", "355M", "774M", "1558M"]] = "124M"
    folder: Path | None = None
    """Where the weights are written for the time of the measurement; by default the system's folder."""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    config = PRESETS[args.size]
    size = 4 * weights.n_params(config)
    table = Table("backend", "seconds", "peak RSS", "over the weights", title=f"{args.size}, {size:,} bytes")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        arrays = weights.initial_weights(config, seed=0)
        openai_checkpoint.write(Path(folder), config, dict(weights.convert(arrays, "huggingface", "openai", config)))
        del arrays
        for package in ("gpt_torch", "gpt_jax"):
            command = [sys.executable, "-c", _CHILD, package, folder]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            seconds, peak = map(float, output.split())
            table.add_row(package, f"{seconds:.2f}", f"{peak:,.0f}", f"{peak / size:.2f}")
    Console().print(table)


if __name__ == "__main__":
    with exit_with_message():
        main()
