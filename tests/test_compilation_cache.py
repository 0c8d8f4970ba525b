"""The cache of compiled programs: kept between processes and limited, and its failures are warnings."""

import importlib
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import train_jax
from support.runs import run_program

from gpt_jax import compilation_cache
from parity.storage import paths

# What a script does, in a process that JAX's environment variables have not configured.
PROGRAM = """
import os, resource, signal, sys
import jax
folder, setup = sys.argv[1:]
os.environ["GPT_PARITY_CACHE"] = folder
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
for name, value in {"dir": None, "max_size": -1}.items():
    jax.config.update(f"jax_compilation_cache_{name}", value)
import gpt_jax
assert jax.config.jax_compilation_cache_dir is None  # importing the library does not enable it
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
exec(setup)
from gpt_jax.compilation_cache import enable_compilation_cache
enable_compilation_cache()
print(jax.jit(lambda x: (x + 1) * 2)(20.0))
print(events.count("/jax/compilation_cache/cache_hits"), "hits,", jax.config.jax_compilation_cache_max_size)
"""
LIMITED = f"hits, {2 * 1024**3}"


@pytest.fixture
def run(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)

    def run(setup=""):
        result = run_program([sys.executable, str(program), str(tmp_path / "cache"), setup])
        assert result.returncode == 0, result.stderr
        return result

    return run


def programs(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").rglob("jit*-cache"))


def test_programs_are_kept_for_the_next_process(run, tmp_path):
    assert run().stdout == f"42.0\n0 {LIMITED}\n"
    kept = programs(tmp_path)
    assert kept
    [folder] = (tmp_path / "cache" / "compiled").iterdir()
    assert folder.stat().st_mode & 0o077 == 0
    (folder / "jit_other-cache").write_text("half of a program")
    second = run()
    assert second.stdout == f"42.0\n{len(kept)} {LIMITED}\n"
    assert not second.stderr
    assert programs(tmp_path) == kept  # without the half


def test_a_disk_that_fills_up_is_a_warning_and_harms_nothing_later(run, tmp_path):
    """A limit on the size of files fails like a full disk: in the middle of a file."""
    limit = "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))"
    full = run(setup=limit)
    assert full.stdout.startswith("42.0\n0 hits")
    assert "Error writing persistent compilation cache entry" in full.stderr
    assert "Traceback" not in full.stderr
    assert run().stdout.startswith("42.0\n0 hits")
    assert run().stdout == f"42.0\n{len(programs(tmp_path))} {LIMITED}\n"


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """Options of JAX that the function sets, as a dict; the variables that would decide them are not set."""
    values = {"jax_enable_compilation_cache": True, "jax_compilation_cache_dir": None}
    monkeypatch.setattr(compilation_cache, "jax", SimpleNamespace(config=Config(values)))
    monkeypatch.setenv("GPT_PARITY_CACHE", str(tmp_path / "cache"))
    for name in [name for name in os.environ if name.startswith("JAX_")]:
        monkeypatch.delenv(name)
    return values


class Config:
    def __init__(self, values):
        self.update = values.__setitem__
        self._values = values

    def __getattr__(self, name):
        return self._values[name]


def test_variables_of_jax_decide(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "5")
    compilation_cache.enable_compilation_cache()
    assert settings["jax_compilation_cache_dir"] == str(paths.compiled_folder())
    assert "jax_compilation_cache_max_size" not in settings
    settings["jax_compilation_cache_dir"] = str(tmp_path / "mine")
    before = dict(settings)
    compilation_cache.enable_compilation_cache(n_processes=2)
    assert settings == before
    compilation_cache.enable_compilation_cache(enabled=False)
    assert settings == {**before, "jax_enable_compilation_cache": False}


def test_processes_that_share_no_folder_have_no_cache(settings):
    before = dict(settings)
    compilation_cache.enable_compilation_cache(n_processes=2)
    assert settings == before


@pytest.mark.parametrize("chosen", [False, True])
def test_a_folder_that_cannot_be_written_is_a_warning(settings, chosen, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file")
    if chosen:
        settings["jax_compilation_cache_dir"] = str(tmp_path / "cache")
    before = dict(settings)
    compilation_cache.enable_compilation_cache()
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: compiled programs are not kept in {tmp_path / 'cache'}")
    assert settings == {**before, "jax_persistent_cache_enable_xla_caches": "none"}


def test_a_full_disk_is_a_warning(settings, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    compilation_cache.enable_compilation_cache()
    assert "only 1 MB are free on the disk" in capsys.readouterr().err
    assert settings["jax_compilation_cache_dir"] is None


@pytest.fixture
def calls(monkeypatch):
    """The calls of scripts that end where they would enable the cache."""
    calls = []

    def stop(*arguments):
        calls.append(arguments)
        raise KeyboardInterrupt

    for module in (compilation_cache, train_jax):
        monkeypatch.setattr(module, "enable_compilation_cache", stop)
    monkeypatch.setattr(train_jax, "jax", SimpleNamespace(config=Config({})))
    return calls


@pytest.mark.parametrize("options", [(), ("--no-compilation-cache",)])
@pytest.mark.parametrize("command", ["train_jax --preset tiny", "generate x", "compare_decoding", "check_parity"])
def test_scripts_pass_their_option(command, options, calls, monkeypatch, tmp_path):
    script, *arguments = command.split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, "--device", "cpu", *options, *arguments])
    with pytest.raises(KeyboardInterrupt):
        importlib.import_module(script).main()
    assert [call[0] for call in calls] == [not options]


def test_processors_with_other_instructions_have_another_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("GPT_PARITY_CACHE", str(tmp_path))
    names = set()
    for text in ("flags\t\t: sse avx\n", "flags\t\t: sse\n", "Features\t: neon\n"):
        monkeypatch.setattr(paths.Path, "read_text", lambda *_, text=text, **__: f"processor\t: 0\n{text}")
        names.add(paths.compiled_folder())
    assert len(names) == 3
    assert {name.parent for name in names} == {tmp_path / "compiled"}
