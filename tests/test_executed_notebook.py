"""docs/notebook.py runs from top to bottom, fails if a piece of it is wrong, and is what docs/notebook.ipynb shows."""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest
from support.runs import ROOT, run_program

from parity.config import GPTConfig
from parity.weights import convert, initial_weights, openai, openai_files

SOURCE = ROOT / "docs" / "notebook.py"
COMMITTED = SOURCE.with_suffix(".ipynb")
EXECUTE = ROOT / "docs" / "execute.py"
HEADER = SOURCE.read_text(encoding="utf-8").partition("# %%")[0]


# What depends neither on the machine nor on the text, which is that of the Python version: shapes, sizes, token ids.
EXACT = re.compile(r"^(?:\S.{21} \[[\d, ]*\](?= )|[\d,]+ (?:trained )?parameters[^;\n]*|\{.*\}|\[.*\])", re.MULTILINE)


def printed(notebook):
    """Return what the cells of a notebook have printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def masked(text):
    """Return a text without its numbers, quotations, and number of evaluations."""
    text = re.sub(r"'(?:[^'\\\n]|\\.)*'|\"(?:[^\"\\\n]|\\.)*\"", "''", text)
    text = re.sub(r"\d[\d.,]*(?:e[+-]\d+)?(?:\+\w+)?", "#", text)
    return re.sub(r"(Epoch .*\n)+", r"\1", text)


def test_the_committed_notebook_is_current():
    committed, source = jupytext.read(COMMITTED), jupytext.read(SOURCE, fmt="py:percent")
    cells = [[(cell.cell_type, cell.source) for cell in notebook.cells] for notebook in (committed, source)]
    assert cells[0] == cells[1], "run make notebook"
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"display_data", "stream"}
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}
    assert "image/png" in json.dumps(outputs)
    assert not re.search(r"(?<![\w.])/(?:home|root|tmp|Users|var|work)/", printed(committed))
    assert COMMITTED.stat().st_size < 300_000


@pytest.mark.timeout(580)
def test_the_notebook_runs(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"GPT_PARITY_OFFLINE": "1", "GPT_PARITY_CACHE": str(tmp_path / "cache"), "MPLBACKEND": "agg"}
    result = run_program([sys.executable, str(SOURCE)], cwd=tmp_path, env=environment, timeout=570)
    assert result.returncode == 0, result.stderr
    committed = printed(jupytext.read(COMMITTED))
    assert masked(result.stdout).splitlines() == masked(committed).splitlines(), "run make notebook"
    exact = EXACT.findall(result.stdout)
    assert len(exact) > 25
    assert exact == EXACT.findall(committed), "run make notebook"
    assert [path.name for path in tmp_path.iterdir()] == ["output"], "it writes into this folder only"
    assert (tmp_path / "output" / "loss-plot.pdf").read_bytes().startswith(b"%PDF")


def untrained():
    """Return the notebook without the cells that train or need the trained model: its checks, in seconds."""
    cells = jupytext.read(SOURCE, fmt="py:percent").cells
    return "\n\n".join(
        cell.source for cell in cells if cell.cell_type == "code" and "trained" not in cell.metadata.get("tags", ())
    )


# Pieces, with an error that is to be noticed.
ERRORS = {
    "scale of the scores, torch": ("keys.transpose(2, 3) / math.sqrt(keys.shape[-1])", "keys.transpose(2, 3) / 3.9"),
    "scale of the scores, jax": ("keys.swapaxes(2, 3) / math.sqrt(keys.shape[-1])", "keys.swapaxes(2, 3) / 3.9"),
    "loss, jax": ("target_batch[..., None], axis=-1).mean()", "target_batch[..., None], axis=-1).mean() * 1.0001"),
}
MORE_ERRORS = {
    "loss, torch": ("torch.as_tensor(target_batch).flatten())", "torch.as_tensor(target_batch).flatten()) * 1.0001"),
    "mask": ("dtype=torch.bool), diagonal=1)", "dtype=torch.bool), diagonal=2)"),
    "mask, jax": ("jnp.ones((T, T), bool), k=1)", "jnp.ones((T, T), bool), k=2)"),
    "eps": ("self.eps = 1e-5", "self.eps = 1e-6"),
    "eps, jax": ("jnp.sqrt(var + 1e-5)", "jnp.sqrt(var + 1e-6)"),
    "variance": ("unbiased=False", "unbiased=True"),
    "GELU": ("torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715", "torch.tanh(math.sqrt(2 / math.pi) * (x + 0.0447"),
    "GELU, jax": ("jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715", "jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.0447"),
    "query and key": ("(att.W_query, att.W_key, att.W_value), parts", "(att.W_key, att.W_query, att.W_value), parts"),
    "targets": ("token_ids[i + 1 : i + max_length + 1]", "token_ids[i : i + max_length]"),
    "feed-forward": ("return self.layers(x)", "return self.layers(x) * 1.001"),
    "block": ("self.ff(self.norm2(x))", "self.ff(self.norm1(x))"),
    "greedy decoding": ("logits.argmax(dim=-1, keepdim=True)", "logits.argmin(dim=-1, keepdim=True)"),
    "greedy decoding, jax": ("logits.argmax(axis=-1, keepdims=True)", "logits.argmin(axis=-1, keepdims=True)"),
    "loss of a loader": ("[calc_loss_batch(*batch, model).item()", "[2 * calc_loss_batch(*batch, model).item()"),
    "loss of a loader, jax": ("[float(calc_loss_batch_jax(params", "[2 * float(calc_loss_batch_jax(params"),
    "dropout in the evaluation": ('without dropout."""\n    model.eval()', 'without dropout."""\n    model.train()'),
    "training step": ("            optimizer.zero_grad()\n", ""),
    "training step, jax": ("return optax.apply_updates(", "return jax.tree.map(jnp.subtract, "),
    "sampling": ("scaled = logits / temperature\n    if top_k is not None:\n        smallest_kept = logits.topk",
                 "scaled = logits * temperature\n    if top_k is not None:\n        smallest_kept = logits.topk"),
    "sampling, jax": ("scaled = logits / temperature\n    if top_k is not None:\n        smallest_kept = jax",
                      "scaled = logits * temperature\n    if top_k is not None:\n        smallest_kept = jax"),
    "a fresh adapter": ("nn.Parameter(torch.zeros(A.shape[1]", "nn.Parameter(torch.ones(A.shape[1]"),
    "a fresh adapter, jax": ('"B": jnp.zeros((RANK, 4', '"B": jnp.ones((RANK, 4'),
    "the sum of an adapter": ("x @ self.A @ self.B", "1.01 * (x @ self.A @ self.B)"),
    "the sum of an adapter, jax": ('{"w": c_fc["w"] + change}', '{"w": c_fc["w"] + 1.01 * change}'),
    "the base of an adapter": ("tuned.requires_grad_(False)", "tuned.tok_emb.requires_grad_(False)"),
}  # fmt: skip


@pytest.mark.parametrize(
    "error", [*ERRORS, *(pytest.param(name, marks=pytest.mark.docs) for name in MORE_ERRORS)], ids=lambda name: name
)
def test_an_error_in_a_piece_stops_it(error, tmp_path):
    right, wrong = (ERRORS | MORE_ERRORS)[error]
    source = untrained()
    assert source.count(right) == 1
    (tmp_path / "wrong.py").write_text(source.replace(right, wrong), encoding="utf-8")
    result = run_program([sys.executable, str(tmp_path / "wrong.py")], cwd=tmp_path)
    assert result.returncode == 1
    assert "AssertionError" in result.stderr


# Code before the section on OpenAI's weights: 124M is a folder with the names of OpenAI's files and other content.
SMALL_124M = """
from parity.storage.download import RemoteFile
from parity.weights import openai_files
openai_files.model_files = lambda size: [RemoteFile(name) for name in openai_files._SHA256]
"""


@pytest.fixture
def closed_address():
    """An address at which nothing answers: a port that is taken, but does not listen."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.docs
@pytest.mark.parametrize("case", ["absent", "unreachable", "there", "damaged"])
def test_weights_of_openai(case, tmp_path, vocab_bpe, closed_address):
    """They are used where they are, and replaced by others only if they are not there and cannot be downloaded."""
    environment = os.environ | {"GPT_PARITY_OFFLINE": "1", "GPT_PARITY_CACHE": str(tmp_path)}
    source = untrained()
    folder = tmp_path / "models" / "124M"
    if case == "unreachable":
        environment |= {"GPT_PARITY_OFFLINE": "0", "GPT_PARITY_BASE_URL": closed_address}
    elif case != "absent":
        config = GPTConfig(n_ctx=64, n_embd=24, n_head=2, n_layer=2)
        weights = dict(convert(initial_weights(config, 0), "huggingface", "openai", config))
        openai.write(folder, config, weights)
        shutil.copy(vocab_bpe, folder)
        for name in openai_files._SHA256:
            (folder / name).touch()
        if case == "there":
            source = SMALL_124M + source
    (tmp_path / "notebook.py").write_text(source, encoding="utf-8")
    result = run_program([sys.executable, "notebook.py"], cwd=tmp_path, env=environment)
    if case == "damaged":
        assert result.returncode == 1
        assert "124M/encoder.json is damaged or is another file" in result.stderr
        return
    assert result.returncode == 0, result.stderr
    message = {
        "absent": "OpenAI's 124M is not in the cache: GPT_PARITY_OFFLINE forbids downloads.",
        "unreachable": f"OpenAI's 124M is not in the cache: {closed_address}/124M/checkpoint cannot be reached: ",
        "there": "These are OpenAI's weights.\n{'n_vocab': 50257, 'n_ctx': 64,",
    }[case]
    assert message in result.stdout
    assert "'Every effort moves you" in result.stdout or case != "there"
    assert (tmp_path / "output" / "gpt2").exists() == (case != "there")


@pytest.mark.parametrize("place", ["clone", "elsewhere", "elsewhere, with its address", "installed"])
def test_the_first_cell_installs_what_is_missing(place, tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path / "docs")
    if place == "clone":
        (tmp_path / "gpt_torch").mkdir()
        (tmp_path / "gpt_torch" / "notebook.py").touch()
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    find_spec = importlib.util.find_spec
    absent = None if place == "installed" else "flax"  # Flax alone: one missing package is enough
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == absent else find_spec(name))
    source = next(cell.source for cell in jupytext.read(SOURCE, fmt="py:percent").cells if cell.cell_type == "code")
    if place == "elsewhere, with its address":
        assert source.count('REPOSITORY = ""') == 1
        source = source.replace('REPOSITORY = ""', 'REPOSITORY = "https://example.org/x"')
    if place == "elsewhere":
        with pytest.raises(AssertionError, match="set REPOSITORY above to the address"):
            exec(source, {})
    else:
        exec(source, {})
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    clone = Path.cwd().parent
    assert commands == {
        "clone": [[*pip, f"{clone}[jax,torch]", "--constraint", f"{clone}/constraints.txt"]],
        "elsewhere, with its address": [[*pip, "gpt-parity[jax,torch] @ git+https://example.org/x"]],
    }.get(place, [])


def executed(folder, code, **environment):
    """Execute a percent script of one cell with docs/execute.py; return the result and the path of the notebook."""
    script = folder / "small.py"
    script.write_text(f"{HEADER}# %%\n{code}\n", encoding="utf-8")
    return run_program(
        [sys.executable, str(EXECUTE), str(script)], env=os.environ | environment
    ), folder / "small.ipynb"


@pytest.mark.docs
def test_notebooks_are_written_with_their_outputs(tmp_path):
    code = "import os\nprint(os.environ['GPT_PARITY_OFFLINE'])\nopen('artifact', 'w').close()\n1 + 1"
    result, path = executed(tmp_path, code)
    assert result.returncode == 0, result.stderr
    [cell] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert [output.get("text", output.get("data")) for output in cell["outputs"]] == [["1\n"], {"text/plain": ["2"]}]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["small.ipynb", "small.py"]
    before = path.read_bytes()
    assert executed(tmp_path, code)[0].returncode == 0
    assert path.read_bytes() == before


@pytest.mark.docs
def test_letters_of_a_figure_are_no_path(tmp_path):
    code = 'from IPython.display import display\ndisplay({"image/png": "aGVs/tmp/bG8="}, raw=True)'
    result, path = executed(tmp_path, code)
    assert result.returncode == 0, result.stderr
    assert "aGVs/tmp/bG8=" in path.read_text(encoding="utf-8")
    assert executed(tmp_path, 'print("a / b")', HOME="/")[0].returncode == 0


@pytest.mark.docs
@pytest.mark.parametrize(
    ("code", "message"),
    [("assert 1 == 2", "AssertionError"), ("print(Path.cwd())", "contains the path"), ("raise OSError", "OSError")],
)
def test_notebooks_that_fail_or_show_this_machine_are_not_written(code, message, tmp_path):
    result, path = executed(tmp_path, f"from pathlib import Path\n{code}")
    assert result.returncode == 1
    assert message in result.stderr
    assert not path.exists()
