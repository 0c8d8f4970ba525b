"""The GitHub workflows and the pre-commit configuration can be parsed, and agree with the rest of the project."""

import re
import runpy
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def workflow(name):
    text = (ROOT / ".github" / "workflows" / name).read_text()
    return yaml.load(text, yaml.BaseLoader)  # which leaves `on` and version numbers strings


def commands(content):
    return [step["run"] for job in content["jobs"].values() for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_workflow_is_well_formed(path):
    content = workflow(path.name)
    assert content["on"].keys() in ({"push", "pull_request"}, {"schedule", "workflow_dispatch"})
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for job in content["jobs"].values():
        assert job["runs-on"]
        assert int(job["timeout-minutes"]) > 0
        assert job["steps"][0]["uses"].startswith("actions/checkout@")
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
    for command in commands(content):
        make, target = command.split()
        assert make == "make"
        assert target in targets


def test_tests_run_on_every_supported_python():
    content = workflow("tests.yml")
    versions = content["jobs"]["tests"]["strategy"]["matrix"]["python-version"]
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert versions == ["3.11", "3.12", "3.13"]
    assert requires == f">={versions[0]}"
    assert commands(content) == ["make test"]


def test_checks_run_linters_and_packaging():
    assert commands(workflow("checks.yml")) == ["make check", "make test-package"]


def test_programs_are_compiled_for_gpus():
    assert commands(workflow("gpu-program.yml")) == ["make test-gpu-program"]


def test_slow_tests_run_every_week():
    content = workflow("slow.yml")
    assert commands(content) == ["make test-slow"]
    [schedule] = content["on"]["schedule"]
    assert re.fullmatch(r"\d+ \d+ \* \* \d", schedule["cron"])


def test_the_page_is_tested_in_a_browser():
    assert commands(workflow("page.yml")) == ["make test-page"]


@pytest.mark.parametrize("environment", [{}, {"CI": "true"}], ids=["here", "on GitHub"])
def test_without_a_browser_its_tests_are_skipped_but_not_on_github(environment, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    for name, value in {**environment, "PATH": ""}.items():
        monkeypatch.setenv(name, value)
    module = runpy.run_path(str(ROOT / "tests" / "support" / "browser.py"))
    [is_skipped] = module["needs_browser"].mark.args
    assert is_skipped == (not environment)
    with pytest.raises(AssertionError, match="there is no browser"):
        module["launch"](None)


def test_the_site_is_built_and_the_notebooks_are_executed():
    assert commands(workflow("docs.yml")) == ["make notebook", "make docs", "make test-docs"]


def test_clusters_are_tested():
    assert commands(workflow("clusters.yml")) == ["make test-clusters"]


def test_pre_commit_has_the_pinned_ruff():
    [repository] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    [pin] = re.findall(r"^ruff==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert repository["rev"] == f"v{pin}"
    assert [hook["id"] for hook in repository["hooks"]] == ["ruff-check", "ruff-format"]
