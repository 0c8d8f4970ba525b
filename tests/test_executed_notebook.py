"""docs/notebook.py runs from top to bottom, fails if a piece of it is wrong, and is what docs/notebook.ipynb shows."""

import json
import os
import re
import sys

import jupytext
import pytest
from support.runs import ROOT, run_program

SOURCE = ROOT / "docs" / "notebook.py"
COMMITTED = SOURCE.with_suffix(".ipynb")
EXECUTE = ROOT / "docs" / "execute.py"
HEADER = SOURCE.read_text(encoding="utf-8").partition("# %%")[0]


def test_the_committed_notebook_is_current():
    committed, source = jupytext.read(COMMITTED), jupytext.read(SOURCE, fmt="py:percent")
    cells = [[(cell.cell_type, cell.source) for cell in notebook.cells] for notebook in (committed, source)]
    assert cells[0] == cells[1], "run make notebook"
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"display_data", "stream"}
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}
    text = json.dumps(outputs)
    assert "image/png" in text
    assert not re.search(r"(?<![\w.])/(?:home|root|tmp|Users|var|work)/", text)
    assert COMMITTED.stat().st_size < 300_000


@pytest.mark.timeout(580)
def test_the_notebook_runs(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"GPT_PARITY_OFFLINE": "1", "GPT_PARITY_CACHE": str(tmp_path / "cache"), "MPLBACKEND": "agg"}
    result = run_program([sys.executable, str(SOURCE)], cwd=tmp_path, env=environment, timeout=570)
    assert result.returncode == 0, result.stderr
    assert "files in the working folder: loss-plot.pdf model_and_optimizer.pth params.npz" in result.stdout
    assert (tmp_path / "loss-plot.pdf").read_bytes().startswith(b"%PDF")


# Pieces, with an error that is to be noticed before any training.
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
}


@pytest.mark.parametrize(
    "error", [*ERRORS, *(pytest.param(name, marks=pytest.mark.docs) for name in MORE_ERRORS)], ids=lambda name: name
)
def test_an_error_in_a_piece_stops_it(error, tmp_path):
    right, wrong = (ERRORS | MORE_ERRORS)[error]
    source = SOURCE.read_text(encoding="utf-8")
    assert source.count(right) == 1
    (tmp_path / "wrong.py").write_text(source.replace(right, wrong), encoding="utf-8")
    result = run_program([sys.executable, str(tmp_path / "wrong.py")], cwd=tmp_path)
    assert result.returncode == 1
    assert "AssertionError" in result.stderr
    assert "before training" not in result.stdout


def executed(folder, code):
    """Execute a percent script of one cell with docs/execute.py; return the result and the path of the notebook."""
    script = folder / "small.py"
    script.write_text(f"{HEADER}# %%\n{code}\n", encoding="utf-8")
    return run_program([sys.executable, str(EXECUTE), str(script)], env=dict(os.environ)), folder / "small.ipynb"


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
@pytest.mark.parametrize(
    ("code", "message"),
    [("assert 1 == 2", "AssertionError"), ("print(Path.cwd())", "contains the path"), ("raise OSError", "OSError")],
)
def test_notebooks_that_fail_or_show_this_machine_are_not_written(code, message, tmp_path):
    result, path = executed(tmp_path, f"from pathlib import Path\n{code}")
    assert result.returncode == 1
    assert message in result.stderr
    assert not path.exists()
