"""Run a training script that kills itself before a step, as a power failure would.

python -m measure.killed 150 scripts/train_jax.py --run runs/NAME ...
"""

import os
import runpy
import signal
import sys
from pathlib import Path

from parity.training import loop


def main() -> None:
    last, script, *arguments = sys.argv[1:]
    learning_rate = loop.learning_rate

    def until(step: int, *options: float) -> float:
        if step == int(last):
            os.kill(os.getpid(), signal.SIGKILL)
        return learning_rate(step, *options)  # type: ignore[arg-type]

    loop.learning_rate = until  # type: ignore[assignment]
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
