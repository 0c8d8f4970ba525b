"""Help texts of all scripts: every option is explained, and the examples can be read, copied and parsed."""

import dataclasses
import importlib
import re
import shlex
import sys
import typing
from pathlib import Path

import pytest
import tyro

import parity
from parity import cli
from parity.errors import InputError
from parity.training.args import JobArgs, parse_job_args

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py") if "__main__" in path.read_text())
SCRIPTS.remove("eval_harness")  # has the command line of another program; see test_harness.py
EXAMPLE = re.compile(r"^ *((?:python|torchrun) .*)$", re.MULTILINE)


def output_of(name, arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"scripts/{name}.py", *arguments])
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as end:
        importlib.import_module(name).main()
    assert end.value.code == 0
    return capsys.readouterr().out


def test_all_scripts_are_tested():
    assert {"train_jax", "train_torch", "generate", "check_parity", "convert", "benchmark"} <= set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name, monkeypatch, capsys):
    text = output_of(name, ["--help"], monkeypatch, capsys)
    lines = [line.strip() for line in text.splitlines()]
    examples = [example.strip() for example in EXAMPLE.findall(importlib.import_module(name).__doc__)]
    assert examples, "the docstring shows no example"
    assert [line for line in lines if line.startswith(("python ", "torchrun "))] == examples
    assert "Raises" not in text
    assert "--version" in text


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_option_has_a_complete_text(name, monkeypatch, capsys):
    output_of(name, ["--help"], monkeypatch, capsys)
    for owner, field, type_hint in cli._fields(importlib.import_module(name).Args):
        nested = any(dataclasses.is_dataclass(part) for part in (type_hint, *typing.get_args(type_hint)))
        if nested or tyro.conf.Suppress[type_hint] == type_hint:
            continue
        text = field.metadata["help"]
        assert text, f"{owner.__name__}.{field.name} has no help text"
        assert re.match(r"[A-Z0-9]", text), f"{owner.__name__}.{field.name}: {text}"
        assert text.endswith((".", ")")), f"{owner.__name__}.{field.name}: {text}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_examples_parse(name):
    module = importlib.import_module(name)
    for example in EXAMPLE.findall(module.__doc__):
        _, script, arguments = example.partition(f"scripts/{name}.py")
        assert script, example
        cli.parse(module.Args, None, args=shlex.split(arguments, comments=True))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("finetune", ("--task", "prefer", "--help")),
        ("finetune", ("--data", "my.json", "-h")),
        ("finetune", ("--preset", "book-instruct", "--help")),
        ("finetune", ("--resume", "--help")),
        ("train_jax", ("--preset", "fine-tuning", "--help")),
        ("train_torch", ("--preset", "fine-tuning", "-h")),
        ("train_torch", ("--resume", "--help")),
    ],
)
def test_help_does_not_need_the_other_options(name, options, monkeypatch, capsys):
    assert "--init-from" in output_of(name, options, monkeypatch, capsys)


@pytest.mark.parametrize("name", SCRIPTS)
def test_version(name, monkeypatch, capsys):
    text = output_of(name, ["--version"], monkeypatch, capsys)
    assert text.startswith(f"gpt-parity {parity.__version__}, Python 3.")
    assert re.search(r", jax \d.*, torch \d", text)


# The rules of parity.cli


@dataclasses.dataclass(frozen=True)
class Group:
    """An internal note that no user should see."""

    validation_fraction: float = 0.5
    """Fraction of the text that is used for validation,
    124M of which, say."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Another internal note."""

    init_from: str = "nothing"
    """Weights to start from."""
    group: tyro.conf.OmitArgPrefixes[Group] = dataclasses.field(default_factory=Group)


DESCRIPTION = """A script.

python scripts/script.py --init-from X      # first
torchrun -- scripts/script.py               # second
"""


def test_help_of_groups_and_wrapped_texts(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit):
        cli.parse(Options, DESCRIPTION, args=["--help"])
    text = capsys.readouterr().out
    assert "\n    python scripts/script.py --init-from X      # first\n    torchrun -- " in text
    assert "validation, 124M of which, say." in text  # on one line although the source breaks it
    assert "internal note" not in text


@pytest.mark.parametrize(
    "arguments", [["--init", "a", "--validation-part", "0.25"], ["--init=a", "--validation_part=0.25"]]
)
def test_deprecated_spellings_warn(arguments, capsys):
    options = cli.parse(Options, DESCRIPTION, args=arguments)
    assert options == Options("a", Group(0.25))
    assert capsys.readouterr().err.splitlines() == [
        "warning: --init is deprecated; use --init-from",
        "warning: --validation-part is deprecated; use --validation-fraction",
    ]


def test_current_spellings_and_defaults(capsys):
    default = Options("b", Group(0.75))
    assert cli.parse(Options, DESCRIPTION, default, args=[]) == default
    assert cli.parse(Options, None, args=["--init-from", "a"]).init_from == "a"
    assert cli.parse_known(Options, args=["--unknown", "1", "--init", "c", "--help"]).init_from == "c"
    assert not capsys.readouterr().err  # parse(), which follows, warns


def test_changed_options_are_named():
    default = Options("a", Group(0.5))
    assert cli.changed_options(default, Options("a", Group(0.5))) == []
    assert cli.changed_options(Options("b", Group(0.25)), default) == ["--init-from", "--validation-fraction"]


@dataclasses.dataclass(frozen=True)
class Paths:
    sources: tyro.conf.Positional[tuple[Path, ...]] = ()
    run: Path | None = None
    corpus: str = "python-docs"
    prompt: str = ""
    nested: Group = dataclasses.field(default_factory=Group)


def test_paths_may_begin_with_the_home_folder(monkeypatch):
    """A shell expands only the first; a prompt is no path."""
    monkeypatch.setenv("HOME", "/home/me")
    line = ["~", "a/~", "~nobody-of-this-name/b", "--run=~/runs/x", "--corpus", "~/c.txt", "--prompt", "~/p"]
    options = cli.parse(Paths, DESCRIPTION, args=line)
    assert options.sources == (Path("/home/me"), Path("a/~"), Path("~nobody-of-this-name/b"))
    assert (options.run, options.corpus, options.prompt) == (Path("/home/me/runs/x"), "/home/me/c.txt", "~/p")
    assert cli.parse_known(Paths, args=["--run=~/x", "--unknown"]).run == Path("/home/me/x")
    assert cli.parse(Paths, DESCRIPTION, Paths(run=Path("~/d")), args=[]).run == Path("/home/me/d")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "s3://bucket/x"], r"^--run takes a path, not an address \(s3://...\); copy the files"),
        (["a", "gs://key:secret@bucket"], r"^--sources takes a path, not an address \(gs://...\); copy the files"),
        (["--run", "file:///x"], r"^--run takes a path, not an address \(file://...\)"),
    ],
)
def test_addresses_in_the_place_of_paths_are_refused(arguments, message):
    with pytest.raises(InputError, match=message) as error:
        cli.parse(Paths, DESCRIPTION, args=arguments)
    assert "secret" not in str(error.value)
    assert cli.parse(Paths, DESCRIPTION, args=["C:/x", "--corpus", "s3://bucket/x"]).corpus == "s3://bucket/x"
    with pytest.raises(InputError, match=r"^--run takes a path.*; name a folder, and the address as --mirror"):
        parse_job_args(JobArgs, None, ["--run", "s3://bucket/x"])


def test_unknown_options_are_refused(capsys):
    with pytest.raises(SystemExit) as end:
        cli.parse(Options, DESCRIPTION, args=["--initial", "x"])  # deprecated elsewhere; no option of this class
    assert end.value.code == 2
    assert "--initial" in capsys.readouterr().err


def test_absent_frameworks_are_named(monkeypatch):
    def version(package):
        raise cli.PackageNotFoundError(package)

    monkeypatch.setattr(cli, "version", version)
    assert cli.versions().endswith(", jax not installed, torch not installed")
