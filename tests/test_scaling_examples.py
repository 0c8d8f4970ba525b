"""The SLURM script and the JobSet of the examples can be parsed, and their options exist and fit each other."""

import re
import subprocess

import pytest
import yaml
from support.runs import ROOT, run_script

from gpt_jax.sharding import MeshShape
from parity.training.settings import recipe


def script_in(name):
    text = (ROOT / "docs" / name).read_text()
    if name.endswith(".yaml"):
        [job] = yaml.safe_load(text)["spec"]["replicatedJobs"]
        [container] = job["template"]["spec"]["template"]["spec"]["containers"]
        return container["command"][2]
    return text


@pytest.fixture(scope="module")
def known_options():
    return run_script("train_jax.py", "--help").stdout


@pytest.mark.parametrize("name", ["train.slurm", "jobset.yaml"])
def test_examples(name, known_options):
    script = script_in(name)
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    script = script.replace("\\\n", " ")
    [line] = [line for line in script.splitlines() if "train_jax.py" in line]
    for option in re.findall(r"(?<=\s)--[a-z-]+", line.split("train_jax.py")[1]):
        assert re.search(rf"{option}\b", known_options), option
    preset, mesh, accumulate = (
        re.search(rf"{option} (\S+)", line)[1] for option in ("--preset", "--mesh", "--accumulate")
    )
    shape, settings = MeshShape.parse(mesh), recipe(preset).settings
    assert shape.size == 16
    shape.check(recipe(preset).model, settings.batch_size // int(accumulate))


def test_jobset_counts_its_pods_as_the_command_does():
    spec = yaml.safe_load((ROOT / "docs" / "jobset.yaml").read_text())
    [job] = spec["spec"]["replicatedJobs"]
    pods = job["template"]["spec"]["completions"]
    assert pods == job["template"]["spec"]["parallelism"]
    assert f"--num-processes {pods} " in script_in("jobset.yaml")
    assert f"--coordinator {spec['metadata']['name']}-{job['name']}-0-0.{spec['metadata']['name']}:" in script_in(
        "jobset.yaml"
    )
