"""Sample the same tokens with both backends, on a device and on the CPU, and compare them.

python -m measure.sampled_tokens gpu 124M 48 tokens.json
"""

import json
import sys
from pathlib import Path
from typing import Any

from parity.comparison.case import random_tokens, sharp_weights
from parity.comparison.implementation import open_implementation
from parity.comparison.protocol import Compute
from parity.config import as_config

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "top-k, top-p": {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
}


def main() -> None:
    device, preset, n_new, out = sys.argv[1:]
    config = as_config(preset)
    weights = sharp_weights(config, 0)
    prompts = random_tokens(config, 3, 8, 0)[:, :-1].tolist()
    backends = {name: open_implementation(name, config) for name in ("jax", "torch")}
    compared = []
    for name, options in OPTIONS.items():

        def sample(backend: str, device: str, options: dict[str, Any] = options) -> list[list[int]]:
            return backends[backend].generate(
                config, weights, prompts, Compute("float32", device), max_new_tokens=int(n_new), seed=1, **options
            )

        rows = {
            (backend, kind): sample(backend, kind) for backend in backends for kind in dict.fromkeys((device, "cpu"))
        }
        for first, second in ((("torch", device), ("jax", device)), *(((b, device), (b, "cpu")) for b in backends)):
            pairs = [
                pair
                for row, other, prompt in zip(rows[first], rows[second], prompts, strict=True)
                for pair in zip(row[len(prompt) :], other[len(prompt) :], strict=True)
            ]
            what = f"{name}: {' on '.join(first)} and {' on '.join(second)}"
            compared.append({"what": what, "equal": sum(a == b for a, b in pairs), "count": len(pairs)})
    Path(out).write_text(json.dumps(compared, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
