"""The SLURM array and the indexed jobs that prepare a corpus, run as their schedulers run them."""

import os
import subprocess
from pathlib import Path

import prepare_data
import pytest
import yaml
from support.corpora import prepared_files, write_mixed
from support.runs import ROOT, run_script

from parity.cli import parse
from parity.data.shards import prepare_shards
from parity.data.tokenizer import ByteTokenizer


@pytest.fixture
def project(tmp_path):
    """A folder with sources, and a .venv whose python notes its arguments."""
    write_mixed(tmp_path / "sources")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    program = tmp_path / ".venv" / "bin" / "python"
    program.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > "{tmp_path}/arguments"\n')
    program.chmod(0o755)
    return tmp_path


def arguments_of(project, script, *given, **environment):
    """Run a shell script and return the arguments of the Python program that it starts."""
    result = subprocess.run(
        ["bash", "-c", script, "script", *given],
        cwd=project,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return (project / "arguments").read_text().splitlines()


def test_slurm_array(project):
    """Three jobs prepare the corpus in both passes, and one finishes it."""
    script = (ROOT / "docs" / "prepare.slurm").read_text()
    environment = {
        "SLURM_SUBMIT_DIR": str(project),
        "SLURM_ARRAY_TASK_COUNT": "3",
        "SLURM_CPUS_PER_TASK": "1",
        "SOURCES": "sources",
        "OUT": "out",
    }
    jobs = [(given, index) for given in ((), ("2",)) for index in ("2", "0", "1")]
    for given, index in [*jobs, (("finish",), "0")]:
        name, *arguments = arguments_of(project, script, *given, SLURM_ARRAY_TASK_ID=index, **environment)
        result = run_script(Path(name).name, *arguments, "--tokenizer", "bytes", cwd=project)
        assert result.returncode == 0, result.stderr
    prepare_shards([project / "sources"], project / "whole", ByteTokenizer())
    shards, whole = (prepared_files(project / name) for name in ("out", "whole"))
    del shards["index.json"], whole["index.json"]  # the sources have relative and absolute paths
    assert shards == whole


def test_indexed_jobs():
    first, second, finish = yaml.safe_load_all((ROOT / "docs" / "prepare.yaml").read_text())
    for job, count, work in [
        (first, 16, ["--part", "{}/16"]),
        (second, 16, ["--part", "{}/16", "--pass", "2"]),
        (finish, 1, ["--finish"]),
    ]:
        spec = job["spec"]
        assert spec["completionMode"] == "Indexed"
        assert spec["completions"] == spec["parallelism"] == count
        assert spec["suspend"] == (job is not first)
        [container] = spec["template"]["spec"]["containers"]
        bash, option, script = container["command"]
        assert (bash, option) == ("bash", "-c")
        echoed = script.replace("exec .venv/bin/python", "printf '%s\\n'")
        for index in (0, count - 1):
            environment = {"PATH": os.environ["PATH"], "JOB_COMPLETION_INDEX": str(index)}
            output = subprocess.run([bash, option, echoed], env=environment, capture_output=True, text=True, check=True)
            name, *arguments = output.stdout.splitlines()
            assert name == "scripts/prepare_data.py"
            assert arguments[-len(work) :] == [word.format(index) for word in work]
            options = parse(prepare_data.Args, None, args=arguments)
            prepare_data._check(options)
            assert (options.sources, str(options.out)) == (("/shared/sources",), "/shared/corpus")
