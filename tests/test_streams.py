"""Output and input of the scripts: whoever reads or writes them, and whatever bytes and brackets they hold."""

import builtins
import dataclasses
import io
import os
import signal
import sys
from pathlib import Path

import compare_decoding
import generate
import pytest
import train_jax
import train_torch
from rich.table import Table

from parity import cli, errors
from parity.console import PlainConsole
from parity.errors import InputError, exit_with_message
from parity.streams import LossyStream, for_display, prepare_standard_streams
from parity.training import checkpoints
from parity.training.job import Job
from parity.training.stop import StopRequest

needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
BROKEN = ["pipe", "closed", pytest.param("full", marks=needs_dev_full)]


@pytest.fixture
def broken(request):
    """A text stream that cannot be written: nobody reads the pipe, the disk is full, or it is closed."""
    if request.param == "pipe":
        read_end, write_end = os.pipe()
        os.close(read_end)
    else:
        write_end = os.open("/dev/full" if request.param == "full" else os.devnull, os.O_WRONLY)
    stream = os.fdopen(write_end, "w", encoding="utf-8")
    if request.param == "closed":
        stream.close()
    yield stream
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", lambda _: pytest.fail("unwritten text was kept"))
        stream.close()


@pytest.mark.parametrize("broken", BROKEN, indirect=True)
def test_a_lossy_stream_drops_what_it_cannot_write(broken):
    lossy = LossyStream(broken)
    for text in ("a\n", "b" * 100_000, "c\n"):
        assert lossy.write(text) == len(text)
        lossy.flush()


def test_a_lossy_stream_writes_what_it_can(tmp_path):
    with open(tmp_path / "log", "w", encoding="utf-8") as stream:
        console = PlainConsole(lossy=True)
        console.file = LossyStream(stream)
        console.print("[/INST] é")
        assert not LossyStream(stream).isatty()
    assert (tmp_path / "log").read_text(encoding="utf-8") == "[/INST] é\n"


@pytest.mark.parametrize("value", ["[/INST] x", "runs/a[red]b", "[/b]", ":smile: [bold", "\\[x] 1.5"])
def test_a_console_prints_values_as_they_are(value, capsys):
    console = PlainConsole(width=80)
    console.print(f"run        {value}", soft_wrap=True)
    table = Table(value, title=value, box=None)
    table.add_row(value)
    console.print(table)
    output = capsys.readouterr().out
    assert output.count(value) == 4
    assert "\x1b" not in output


def test_only_terminals_get_control_characters_escaped(tmp_path):
    text = "é\x1b]0;title\x07\n\t\r\x9b31m\x7f"

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    assert for_display(text, Terminal()) == "é\\x1b]0;title\\x07\n\t\\x0d\\x9b31m\\x7f"
    assert for_display(text, io.StringIO()) == text


def test_closed_standard_streams_become_the_null_device(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    prepare_standard_streams()
    sys.stdout.write("x")
    sys.stderr.write("x")
    assert sys.stdin.read() == ""
    assert not sys.stdin.isatty()
    for name in ("stdin", "stdout", "stderr"):
        getattr(sys, name).close()


def test_other_encodings_replace_characters(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    prepare_standard_streams()
    sys.stdout.write("naïve ✓\n")
    sys.stdout.flush()
    assert raw.getvalue() == b"na?ve ?\n"


def ends(function):
    with pytest.raises(SystemExit) as caught, exit_with_message():
        function()
    return caught.value.code


@pytest.mark.parametrize("broken", ["pipe", pytest.param("full", marks=needs_dev_full)], indirect=True)
def test_programs_end_quietly_when_their_reader_is_gone(broken, request, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", broken)
    is_pipe = "pipe" in request.node.name
    status = 128 + signal.SIGPIPE if is_pipe else 2
    assert ends(lambda: print("never flushed")) == status
    assert ends(lambda: (print("flushed by the exit"), sys.exit(0))) == status
    assert ends(lambda: PlainConsole().print("x")) == status
    assert ends(lambda: print("y" * 100_000, flush=True)) == status
    error = capsys.readouterr().err
    assert error == "" if is_pipe else error.count("No space left") == 4


def test_too_little_memory_is_one_line(capsys):
    def refuse(error):
        raise error

    for error in (
        MemoryError("Unable to allocate 15.0 GiB for an array"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.\nmore"),
    ):
        assert ends(lambda error=error: refuse(error)) == 2
        assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(RuntimeError, match="another"):
        ends(lambda: refuse(RuntimeError("another")))


@dataclasses.dataclass(frozen=True)
class Options:
    name: str = ""
    path: Path = Path()


@pytest.mark.parametrize("arguments", [["--name", "caf\udce9"], ["--path", "RUN\udcff"], ["--name=\udc80"], ["\udcff"]])
def test_arguments_that_are_not_utf_8_are_refused(arguments):
    for read in (cli.parse, cli.parse_known):
        with pytest.raises(InputError, match=r"the argument b'.*\\x.*' is not UTF-8 text"):
            read(Options, args=arguments, **({"description": None} if read is cli.parse else {}))


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Run a script's main() in this process: tiny(module, *arguments) -> what it returns."""
    import jax

    monkeypatch.chdir(tmp_path)
    before = jax.config.jax_default_device
    (tmp_path / "corpus.txt").write_text("The river of stone was old and cold.\n" * 60)

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
        with exit_with_message():
            return module.main()

    yield run
    jax.config.update("jax_default_device", before)


TRAIN = ("--preset", "tiny", "--steps", 2, "--eval-every", 1, "--sample-tokens", 4, "--corpus", "corpus.txt")


@pytest.mark.parametrize("broken", BROKEN, indirect=True)
def test_training_goes_on_when_its_output_cannot_be_written(broken, tiny, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", broken)
        assert tiny(train_torch, *TRAIN, "--run", "run [/b] :x:", "--sample-prompt", "[/INST] x") == 0
        if sys.stdout is not broken:
            sys.stdout.close()  # the null device, which took the place of a closed stream
    assert checkpoints.steps(Path("run [/b] :x:", "checkpoints")) == [0, 1, 2]


@pytest.mark.parametrize("module", [train_torch, train_jax], ids=lambda module: module.__name__)
def test_training_prints_prompts_and_paths_as_they_are(module, tiny, monkeypatch, capsys):
    assert tiny(module, *TRAIN, "--run", "run :smile:", "--sample-prompt", "[/INST] [x]") == 0
    output = capsys.readouterr().out
    assert "run        run :smile:\n" in output
    assert "'[/INST] [x]" in output
    monkeypatch.setattr(sys, "stdout", None)
    assert tiny(module, *TRAIN, "--run", "closed") == 0
    sys.stdout.close()  # the null device
    assert checkpoints.steps(Path("closed", "checkpoints")) == [0, 1, 2]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="the system has no SIGHUP")
def test_a_closed_terminal_stops_training_after_a_save_unless_ignored(tiny, monkeypatch):
    log = Job.log

    def hang_up(job, entries):
        if entries["step"] == 1:
            os.kill(os.getpid(), signal.SIGHUP)
        log(job, entries)

    monkeypatch.setattr(Job, "log", hang_up)
    long = (*TRAIN, "--steps", 4, "--eval-every", 4, "--log-every", 1)
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert tiny(train_torch, *long, "--run", "stopped") == 128 + signal.SIGHUP
        stopped = checkpoints.steps(Path("stopped", "checkpoints"))
        assert stopped[-1] < 4
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup does
        assert tiny(train_torch, *long, "--run", "ignored") == 0
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.received
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def padded_run(tiny):
    """A run whose model has more ids than the tokenizer."""
    assert tiny(train_torch, *TRAIN, "--run", "padded", "--n-vocab", 400, "--sample-tokens", 30) == 0
    return ("--run", "padded", "--backend", "torch", "--temperature", "5", "--max-new-tokens", 15)


def test_generate_from_models_with_ids_that_have_no_text(padded_run, tiny, capsys):
    """Also in training, where the samples were drawn; and however many continuations there are."""
    for more in ((), ("--samples", 2), ("--backend", "jax")):
        assert tiny(generate, *padded_run, *more, "The ") is None
        captured = capsys.readouterr()
        assert "The " in captured.out
        assert f"[{15 * (2 if '--samples' in more else 1)} tokens" in captured.err


def test_generate_on_a_terminal_asks_again_after_a_prompt_that_it_refuses(padded_run, tiny, monkeypatch, capsys):
    undecodable = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    answers = iter(["x" * 2000, "", undecodable, "good \x1b[31m", EOFError()])

    def answer(_):
        if isinstance(reply := next(answers), Exception):
            raise reply
        return reply

    monkeypatch.setattr(builtins, "input", answer)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    tiny(generate, *padded_run)
    captured = capsys.readouterr()
    assert "good " in captured.out
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert "context" in errors[0]
    assert "UTF-8" in errors[1]
    assert captured.err.count(" tokens in ") == 2
    monkeypatch.setattr(builtins, "input", lambda _: pytest.fail("a prompt was asked for before options were checked"))
    with pytest.raises(SystemExit):
        tiny(generate, *padded_run, "--top-k", "9999")


@pytest.mark.parametrize("data", [b"caf\xe9 ", b"\xff abc", b"ok \xed\xa0\x80"])
def test_generate_refuses_input_that_is_not_utf_8(data, padded_run, tiny, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="latin-1"))
    with pytest.raises(SystemExit):
        tiny(generate, *padded_run)
    assert capsys.readouterr().err.endswith("error: standard input is not UTF-8 text\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("é ✓".encode()), encoding="latin-1"))
    tiny(generate, *padded_run)
    assert capsys.readouterr().out.startswith("é ✓")


@pytest.mark.parametrize(
    "content", [b"caf\xe9", b"\xff\xfea\0b\0", b"\xed\xa0\x80"], ids=["latin-1", "utf-16", "surrogate"]
)
def test_prompt_files_that_are_not_utf8_are_named(content, tmp_path, monkeypatch):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"^--file .*prompts.txt is not UTF-8 text$"):
        list(generate.prompts(generate.Args(file=file)))
    monkeypatch.setattr(sys, "argv", ["compare_decoding.py", "--model", "124M", "--prompts", str(file)])
    with pytest.raises(
        InputError, match=r"^--prompts .*prompts.txt, line 1 is not UTF-8 text; correct or"
    ):  # before a model is loaded
        compare_decoding.main()


def test_packages_are_installed_into_the_environment_that_lacks_them(tmp_path, monkeypatch):
    """The pip on the path may be another environment's."""
    python = tmp_path / "my env" / "bin" / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    root = tmp_path / "clone"
    monkeypatch.setattr(errors, "__file__", str(root / "parity" / "errors.py"))
    (root / "parity").mkdir(parents=True)
    monkeypatch.chdir(root)
    assert errors.pip_install("x") == f"'{python}' -m pip install x"
    assert errors.install_extras("jax") == f"'{python}' -m pip install 'gpt-parity[jax]'"
    (root / "constraints.txt").touch()
    monkeypatch.setattr(sys, "executable", str(root / ".venv" / "bin" / "python"))
    assert errors.install_extras("jax") == ".venv/bin/python -m pip install -c constraints.txt -e '.[jax]'"
    monkeypatch.chdir(tmp_path)
    assert errors.install_extras("s3") == (
        "clone/.venv/bin/python -m pip install -c clone/constraints.txt -e 'clone[s3]'"
    )
