"""Options of scripts/benchmark.py."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import tyro

from measure.timing import Spec, Workload
from parity.config import Size
from parity.errors import InputError

What = Literal[
    "train", "profile", "run", "generate", "load", "compile", "start", "options", "prepare", "evaluate", "lora",
    "batching", "serve", "all",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Args:
    what: tyro.conf.Positional[What] = "train"
    """What to measure; see the examples above."""
    gpu: bool = False
    """Measure on a GPU, with larger models and batches; by default on the CPU."""
    preset: str | None = None
    """For train, profile, run, compile, options, lora and batching: training preset that gives the model and, but for
    the last two, the batch; by default the benchmark's own or, for run, that of nanoGPT's run."""
    batch_size: int | None = None
    """For train, profile, compile, options and lora: windows per step, in one micro-batch; by default the preset's."""
    size: Size = "124M"
    """For generate, load, evaluate, serve and lora, and for batching with --gpu: size of the model."""
    rounds: int = 5
    """Number of rounds, in each of which every peer takes a turn; one more round warms up first and is not counted."""
    calls: int = 3
    """For benchmarks of training steps: their number for each peer per round; ten times as many for run."""
    whole: bool = False
    """For run: also make the whole run, after its slices, in a process of its own."""
    items: int = 192
    """For evaluate: number of texts, a multiple of 4."""
    clients: int = 64
    """For serve: number of clients that ask at the same time, a third of which leave in the middle of an answer."""
    seconds: int = 60
    """For serve: how long they ask; with 0 only the throughput is measured."""
    threads: int = 0
    """Number of threads of torch and of the tokenizers; 0 means one per core. XLA always uses all cores."""
    peers: tuple[str, ...] = ()
    """Measure only the first peer and those whose names contain one of these texts; by default all peers."""
    vocab_bpe: Path | None = None
    """For prepare and serve: OpenAI's vocab.bpe; by default the one in the cache."""
    out: Path | None = None
    """Folder for results.json and results.md; by default a new one in runs/."""
    cache: tyro.conf.Suppress[Path] = Path()
    """Folder with the caches of compiled programs; the script makes one for each benchmark."""

    def spec(
        self,
        make: Callable[..., Workload],
        *arguments: Any,
        cache: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Spec:
        """Return the Spec of the workload make(*arguments) on the chosen device.

        Args:
            make: A function of measure/peers.py.
            arguments: Its arguments.
            cache: Folder for compiled programs; by default one that all peers share.
            environment: Further environment variables.
        """
        cache = cache or self.cache / "0"
        if self.gpu:  # the peers share the memory of the GPU, so JAX must not reserve most of it
            device = {"MEASURE_ON": "gpu", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        else:
            device = {"MEASURE_ON": "cpu", "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        caches = {
            "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "torch"),
            "TRITON_CACHE_DIR": str(cache / "triton"),
        }
        return Spec(make, arguments, {**device, **caches, **(environment or {})})

    def selected(self, specs: dict[str, Spec]) -> dict[str, Spec]:
        """Return the first peer and those that --peers selects."""
        if unknown := [text for text in self.peers if not any(text in name for name in specs)]:
            raise InputError(f"--peers: no peer contains {', '.join(unknown)}; the peers are {'; '.join(specs)}")
        first = next(iter(specs))
        return {
            name: spec
            for name, spec in specs.items()
            if name == first or not self.peers or any(text in name for text in self.peers)
        }
