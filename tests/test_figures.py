"""Figures do not depend on the backend that the environment selects, and do not change the caller's."""

import subprocess
import sys

import numpy as np
import pytest

from parity import interpret, notebook
from parity.comparison.html import html_page
from parity.comparison.report import Row
from parity.training.metrics import Metrics

PNG = b"\x89PNG"


@pytest.mark.parametrize("name", ["module://matplotlib_inline.backend_inline", "module://no.such.module", "nonsense"])
def test_a_backend_that_is_not_installed(name, tmp_path):
    program = (
        "import os, sys; from pathlib import Path; from parity.training.metrics import Metrics\n"
        "metrics = Metrics(Path('none'), writes=False)\n"
        "metrics.log({'step': 1, 'loss': 2.0})\n"
        "metrics.plot(Path(sys.argv[1]))\n"
        "assert os.environ['MPLBACKEND'] == sys.argv[2]\n"
    )
    target = tmp_path / "loss.png"
    command = [sys.executable, "-W", "error", "-c", program, target, name]
    result = subprocess.run(command, capture_output=True, text=True, env={"MPLBACKEND": name}, timeout=120)
    assert result.returncode == 0, result.stderr
    assert target.read_bytes().startswith(PNG)


def test_the_callers_backend_and_figures_are_left_alone(tmp_path):
    import matplotlib
    from matplotlib import pyplot as plt

    before = matplotlib.get_backend()
    plt.switch_backend("svg")
    try:
        mine = plt.figure()
        metrics = Metrics(tmp_path / "metrics.jsonl")
        metrics.log({"step": 1, "loss": 2.0})
        metrics.plot(tmp_path / "loss.png", bigram=1.5)
        interpret.plot_attention(tmp_path / "attention.png", np.full((2, 3, 3), 1 / 3))
        notebook.plot_losses([1, 2], [10, 20], [3.0, 2.0], [3.5, 3.0], tmp_path / "losses.pdf")
        html_page("title", "verdict", [Row("section", "name", 1.0, 1.0, None, None, 2.0)])
        assert matplotlib.get_backend() == "svg"
        assert plt.get_fignums() == [mine.number]
    finally:
        plt.close("all")
        plt.switch_backend(before)
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)


def test_tokens_are_never_read_as_formulas(tmp_path):
    labels = ["$", "$x", r"$\frac{$", "_^$"]
    picture = interpret.plot_attention(tmp_path / "a.png", np.full((1, 4, 4), 0.25), labels, title=r"$\nonsense{$")
    assert picture.read_bytes().startswith(PNG)
