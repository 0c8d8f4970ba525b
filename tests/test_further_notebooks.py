"""The notebooks of docs/notebooks run and assert what they claim; docs/notebook.py has tests of its own."""

import os
import re
import sys

import pytest
from support.runs import ROOT, run_program

NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "docs" / "notebooks").glob("*.py"))}

# For each notebook: some of its code, other code that makes a claim false in its place, and the claim.
PLANTED = {
    "attention_heads": ("n_layer=2)", "n_layer=1)", "the model has learned to continue the list"),
    "lora": ("LoraConfig(rank=rank, alpha=2.0 * rank)", "LoraConfig(rank=1, alpha=2.0)", "a larger rank learns more"),
    "many_devices": ('dtype="float64"', 'dtype="float32"', "the same losses on every mesh"),
    "parity_by_hand": ("0.044715", "0.044175", "the thirty lines compute the function of the reference"),
    "reading_a_run": ("content[len(content) // 2] ^= 1", "content[len(content) // 2] ^= 0", "the damage is noticed"),
    "sampling": ("before < top_p", "before + probs[order] < top_p", "no dropped token is drawn"),
}


def run(source, folder):
    """Run a notebook as a plain script, in a process and a folder of its own."""
    script = folder / "notebook.py"
    script.write_text(source, encoding="utf-8")
    environment = {**os.environ, "MPLBACKEND": "Agg", "GPT_PARITY_OFFLINE": "1"}
    return run_program([sys.executable, str(script)], cwd=folder, env=environment, timeout=580)


def cells(source):
    """Return (kind, text) of the cells of a percent script."""
    parts = re.split(r"^# %%(.*)\n", source.partition("# ---\n\n")[2], flags=re.MULTILINE)[1:]
    return list(zip((kind.strip() for kind in parts[::2]), parts[1::2], strict=True))


@pytest.mark.docs
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs(name, tmp_path):
    result = run(NOTEBOOKS[name].read_text(encoding="utf-8"), tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notebook.py"], "it leaves nothing behind"


@pytest.mark.docs
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_false_claim_makes_a_notebook_fail(name, tmp_path):
    code, wrong, claim = PLANTED[name]
    source = NOTEBOOKS[name].read_text(encoding="utf-8")
    assert source.count(code) == 1
    result = run(source.replace(code, wrong), tmp_path)
    assert result.returncode == 1
    assert f"AssertionError: {claim}" in result.stderr, result.stderr


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_form_of_a_notebook(name):
    """Without running it: it begins with its title, and its code compiles; test_docs.py reads its sentences."""
    path = NOTEBOOKS[name]
    (kind, title), *rest = cells(path.read_text(encoding="utf-8"))
    assert kind == "[markdown]"
    assert title.startswith('"""\n# ')
    for _, text in rest:
        compile(text, str(path), "exec")
