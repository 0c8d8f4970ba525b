"""The documentation is correct: commands parse or run, Python runs in both backends, links and names resolve."""

import contextlib
import dataclasses
import glob
import importlib
import io
import re
import shlex
import shutil
import sys
import tomllib
import typing
import zlib
from pathlib import Path

import eval_harness
import jupytext
import numpy as np
import pytest
import tyro
from lm_eval._cli import HarnessCLI
from support.runs import ROOT

from parity import taps, weights
from parity.cli import DEPRECATED, argument_parser
from parity.config import GPTConfig
from parity.data import shards
from parity.data.token_files import read_bin
from parity.data.tokenizer import load_tokenizer
from parity.errors import InputError
from parity.sampling import GenerateOptions
from parity.training import optimizer_state
from parity.training.settings import RECIPES, TrainSettings
from parity.weights import huggingface, initial_weights, openai, openai_files, peft_files
from parity.weights.adapters import initial_adapter

NOTEBOOKS = [ROOT / "docs" / "notebook.py", *sorted((ROOT / "docs" / "notebooks").glob("*.py"))]
PAGES = [ROOT / "README.md", *ROOT.glob("CONTRIBUTING.md"), *sorted((ROOT / "docs").rglob("*.md")), *NOTEBOOKS]
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
SCRIPTS = sorted(path for path in (ROOT / "scripts").glob("*.py") if path.stem != "parity_hf")
PROGRAMS = "python|make|srun|torchrun|pip|git|sbatch|kubectl|pre-commit|source|jupyter|[A-Z][A-Z_]+=\\S+ python"
LAST_STEP = "000060"
# Commands for training that need neither a GPU nor minutes. Both scripts read their options in parity.training.args.
TRAINED = ("--init-from 124M", "--run runs/NAME --resume")
TUNED = ("--backend", "torch", "--n-layer", 1, "--n-embd", 16, "--steps", 2, "--eval-items", 2, "--sample-tokens", 2)
# Executed as shown, on small files; other scripts' commands are parsed, and executed by tests of their own.
EXECUTED = ("generate", "convert", "prepare_data", "plan", "runs", "cache")


def read(page):
    """Return the text of a page; that of a notebook is in its Markdown cells."""
    if page in NOTEBOOKS:
        return "\n\n".join(cell.source for cell in jupytext.read(page).cells if cell.cell_type == "markdown")
    return page.read_text(encoding="utf-8")


TEXT = {page: read(page) for page in PAGES}


def fragments(page, language):
    """Return the fenced blocks of a page in a language ("" for commands)."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT[page], re.DOTALL | re.MULTILINE)
    return [code for name, code in blocks if name == language]


def prose(page):
    """Return a page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", TEXT[page], flags=re.DOTALL | re.MULTILINE)


def inline_code(page):
    """Return the inline code in the sentences and tables of a page."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]


def commands():
    """Return every command of the pages, in blocks, tables and sentences; test_help.py tests those of the scripts."""
    for page in PAGES:
        for block in [*fragments(page, ""), *fragments(page, "bash")]:
            yield from ((page.name, line) for line in block.splitlines() if line.strip())
        yield from ((page.name, code) for code in inline_code(page) if re.match(rf"({PROGRAMS}) ", code))


class ParsedError(Exception):
    """Raised in place of running a script whose command line was parsed."""


def run_main(script, arguments, monkeypatch, parse_only):
    """Run a script in this process; returns what it printed, and raises AssertionError with its error message."""
    tyro_cli = tyro.cli

    def parse_and_stop(cls, *args, **options):
        parsed = tyro_cli(cls, *args, **options)
        if parse_only and not isinstance(parsed, tuple):  # a tuple comes of a first, partial parse
            raise ParsedError
        return parsed

    output, errors = io.StringIO(), io.StringIO()
    with monkeypatch.context() as patch, contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        patch.setattr(tyro, "cli", parse_and_stop)
        patch.setattr(sys, "argv", [script, *arguments])
        patch.setattr(sys, "stdin", io.StringIO("The dog\n"))
        try:
            importlib.import_module(Path(script).stem).main()
        except ParsedError:
            pass
        except InputError as error:
            raise AssertionError(str(error)) from error
        except SystemExit as error:
            if error.code:
                raise AssertionError(output.getvalue() + errors.getvalue()) from error
    return output.getvalue()


def check_command(line, monkeypatch, parse_only=True):
    """Raise AssertionError unless the command is known, and its script accepts its options."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*|srun", words[0]):
        words.pop(0)
    if words[:1] == ["torchrun"]:
        words = ["python", *words[words.index("--") + 1 :]]
    match words:
        case ["python", "-m", "pytest", *rest]:
            assert all(Path(ROOT / word).exists() for word in rest if word.startswith("tests/")), line
        case ["python", "-m", "parity.doctor"]:
            pass  # tests/test_doctor.py runs it
        case ["python", "scripts/eval_harness.py", *arguments]:
            with monkeypatch.context() as patch:
                patch.setattr(sys, "argv", ["eval_harness.py", *arguments])
                parsed = HarnessCLI().parse_args()
            if parsed.command == "run":  # tests/test_harness.py runs it
                assert parsed.model in eval_harness.MODELS, line
                eval_harness.parse_model_args(parsed.model_args)
        case ["python", script, *arguments] if (ROOT / script).is_file():
            expanded = [path for word in arguments for path in (sorted(glob.glob(word)) or [word])]
            run_main(script, expanded, monkeypatch, parse_only)
        case ["make", *targets]:
            known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert {target for target in targets if "=" not in target} <= set(known), line
            for extras in (target.partition("EXTRAS=")[2] for target in targets if "EXTRAS=" in target):
                assert set(extras.split(",")) <= EXTRAS, line
            for options in (target.removeprefix("ARGS=") for target in targets if target.startswith("ARGS=")):
                assert targets[0] == "train", line
                run_main("scripts/train_jax.py", shlex.split(options), monkeypatch, parse_only=True)
        case ["pip", "install", package]:
            [extras] = re.findall(r"^\.\[([\w,]+)\]$", package)
            assert set(extras.split(",")) <= EXTRAS, line
        case ["python", "-m", "build"] | ["pip", "install", "pre-commit", *_] | ["source", ".venv/bin/activate"]:
            pass
        case ["pip", "install", "--constraint", "constraints.txt", "jupyterlab"]:
            pass
        case ["jupyter", "lab", notebook]:
            assert (ROOT / notebook).is_file(), line
        case ["sbatch", file] | ["kubectl", "apply", "-f", file]:
            assert (ROOT / file).is_file(), line
        case []:
            pass  # a comment
        case _:
            raise AssertionError(f"no test knows the command: {line}")


@pytest.fixture(scope="module")
def small_files(finished_runs, shared_run, vocab_bpe, tmp_path_factory):
    """A folder in which the commands of the documentation find small files under the names that they use.

    "124M" in the cache, which stands for all sizes, is a model with GPT-2's vocabulary and four small layers. The run
    has LAST_STEP steps in place of the 600 that the documentation names.
    """
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(finished_runs["jax"][0], folder / "runs" / "NAME")
    shutil.copytree(shared_run("tuned", "finetune.py", *TUNED)[0], folder / "runs" / "TUNED")
    config = GPTConfig(n_ctx=64, n_embd=24, n_head=12, n_layer=4)
    arrays = initial_weights(config, 0)
    openai.write(folder / "124M", config, dict(weights.convert(arrays, "huggingface", "openai", config)))
    shutil.copy(vocab_bpe, folder / "124M")
    shutil.copy(vocab_bpe, folder)
    lora = weights.LoraConfig(rank=2)
    peft_files.write(folder / "my-adapter", config, peft_files.Adapter(lora, initial_adapter(config, lora, 0), "124M"))
    (folder / "prompt.txt").write_text("The dog")
    (folder / "prompts.jsonl").write_text('{"prompt": "The dog", "id": "dog"}\n{"tokens": [464, 3290], "seed": 1}\n')
    (folder / "fineweb").mkdir()
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").table({"text": [f"Document {i} is a dog." for i in range(40)]})
    for number in range(2):
        parquet.write_table(table, folder / "fineweb" / f"{number}.parquet")
    return folder


@pytest.fixture
def workplace(small_files, monkeypatch, tmp_path):
    """The small files as the working directory, and as the model that "124M" downloads."""
    monkeypatch.chdir(small_files)
    monkeypatch.setenv("GPT_PARITY_CACHE", str(tmp_path))
    monkeypatch.setattr(openai_files, "download_model", lambda size: small_files / "124M")
    monkeypatch.setenv("COLUMNS", "300")
    shutil.copy(small_files / "vocab.bpe", tmp_path)
    yield small_files
    shutil.rmtree(small_files / "out", ignore_errors=True)


def test_every_command_is_known_and_parses(workplace, monkeypatch):
    problems = []
    for line, page in {line.partition("#")[0].strip(): page for page, line in commands()}.items():
        try:
            check_command(line, monkeypatch)
        except AssertionError as error:
            problems.append(f"{page}: {line}\n{error}")
    assert not problems, "\n\n".join(problems)


def test_commands_run_on_small_files(workplace, monkeypatch):
    lines = {line.partition("#")[0].strip(): None for _, line in commands()}
    # tests/test_remote_*.py have storage for addresses, and tests/test_prepare_ray.py starts clusters.
    local = [line for line in lines if "://" not in line and "--ray" not in line]
    executed = [line for line in local if re.match(rf"python scripts/({'|'.join(EXECUTED)})\.py", line)]
    assert {re.search(r"scripts/(\w+)\.py", line)[1] for line in executed} == set(EXECUTED)
    for line in executed:
        shutil.rmtree(workplace / "out", ignore_errors=True)
        line += " --max-new-tokens 4" * ("generate.py" in line)
        line = re.sub(r" --compile(-for \w+)?", "", line).replace("000600", LAST_STEP)
        check_command(line, monkeypatch, parse_only=False)


def test_training_commands_run_on_small_files(workplace, monkeypatch):
    text = " ".join(f"Sentence {number} is about a dog." for number in range(400))
    (workplace / "my.txt").write_text(text, encoding="utf-8")
    lines = {line.partition("#")[0].strip(): None for _, line in commands()}
    for options in TRAINED:
        executed = [line for line in lines if re.match(rf"python scripts/train_\w+\.py {options}", line)]
        assert executed
        for line in executed:
            line = re.sub(r" --steps \d+", "", line.replace("train_jax", "train_torch"))
            check_command(line + " --steps 2" * ("--resume" not in line), monkeypatch, parse_only=False)


def python_cases():
    for page in PAGES:
        code = "".join(fragments(page, "python"))
        if code:
            yield from ((page, name) for name in (("torch", "jax") if re.search(r"# or:? ", code) else ("torch",)))


def run_fragments(page, backend="torch"):
    """Execute the Python of a page, in order and in one namespace.

    For jax, gpt_torch becomes gpt_jax in each line that ends with `# or gpt_jax`, and a line that ends with
    `# or: CODE` becomes CODE.
    """
    namespace = {}
    for code in fragments(page, "python"):
        code = code.replace("000600", LAST_STEP)
        if backend == "jax":
            code = re.sub(r"\bgpt_torch\b(?=.*# or gpt_jax$)", "gpt_jax", code, flags=re.MULTILINE)
            code = re.sub(r"^(\s*).*# or: (.*)$", r"\1\2", code, flags=re.MULTILINE)
        exec(compile(code, str(page), "exec"), namespace)
    return namespace


@pytest.mark.parametrize(("page", "backend"), python_cases(), ids=lambda value: getattr(value, "stem", value))
def test_python_fragments_run(page, backend, workplace):
    run_fragments(page, backend)


def test_both_backends_of_the_first_example_print_the_same_text(workplace, capsys):
    exec(fragments(ROOT / "README.md", "python")[0].replace("000600", LAST_STEP), {})
    output = capsys.readouterr().out
    first, second = output[: len(output) // 2], output[len(output) // 2 :]
    assert len(first) > 40
    assert first == second


def test_links_and_paths_exist():
    slugs = {
        page: {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
               for heading in re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)}
        for page, text in TEXT.items()
    }  # fmt: skip
    problems = []
    for page, text in TEXT.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("http"):
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            if not file.exists() or (anchor and anchor not in slugs[file]):
                problems.append(f"{page.name}: {target}")
        for path in re.findall(r"`((?:parity|gpt_torch|gpt_jax|gpt_\*|scripts|tests|docs)/[\w/.*]+)`", text):
            if not list(ROOT.glob(path.rstrip("/"))):
                problems.append(f"{page.name}: {path}")
    assert not problems, "\n".join(problems)


def options_of(script):
    """Return the options of a script, without the --no- forms of its switches."""
    module = importlib.import_module(script.stem)
    default = module.Args() if "train" in script.stem else None
    actions = argument_parser(module.Args, default)._actions
    names = {option.replace("_", "-") for action in actions for option in action.option_strings}
    return {name for name in names if re.fullmatch(r"--(?!no-)[a-z][a-z0-9-]*", name)} - {"--help"}


def test_options_page_is_complete():
    text = TEXT[ROOT / "docs/reference/options.md"]
    sections = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE))
    tables = {
        name: set(re.findall(r"`(--[a-z0-9-]+)`", "".join(re.findall(r"^\|.*$", section, re.MULTILINE))))
        for name, section in sections.items()
    }
    train = options_of(ROOT / "scripts/train_jax.py") | options_of(ROOT / "scripts/train_torch.py")
    assert tables["Training"] == train
    assert tables["Generation"] == options_of(ROOT / "scripts/generate.py")
    assert tables["Server"] == options_of(ROOT / "scripts/serve.py")


def test_every_extra_is_explained():
    table = "".join(re.findall(r"^\|(.*?)\|", TEXT[ROOT / "docs/install.md"], re.MULTILINE))
    assert set(re.findall(r"`([^`]+)`", table)) == EXTRAS


def test_options_in_the_text_exist():
    known = {"--help", "--version", *DEPRECATED}.union(*map(options_of, SCRIPTS))
    known.add("--constraint")  # of pip
    harness = HarnessCLI()._subparsers.choices["run"]
    known.update(option for action in harness._actions for option in action.option_strings)
    for page in PAGES:
        code = [code for code in inline_code(page) if not re.match(rf"({PROGRAMS}) ", code)]
        for option in re.findall(r"(?<![\w=-])--[a-z][a-z0-9_-]*", " ".join(code)):
            assert option.replace("--no-", "--", 1) in known, f"{page.name}: {option}"


def test_tables_of_presets_options_and_activations():
    train = TEXT[ROOT / "docs/guides/train.md"]
    table = "".join(re.findall(r"^\|.*$", train.partition("## Presets")[2].partition("\n## ")[0], re.MULTILINE))
    assert set(RECIPES) <= set(re.findall(r"`([^`]+)`", table))
    table = "".join(re.findall(r"^\|(.*?)\|", TEXT[ROOT / "docs/guides/generate.md"], re.MULTILINE))
    options = {*typing.get_type_hints(GenerateOptions), "max_new_tokens", "return_logprobs"}
    assert set(re.findall(r"`([^`]+)`", table)) >= options
    rows = re.findall(r"^\| `([^`]+)` \| ([A-Z ]+) \|", TEXT[ROOT / "docs/reference/activations.md"], re.MULTILINE)
    assert dict(rows) == taps.AXES


def test_the_tree_in_the_readme_is_the_tree():
    [tree] = [block for block in fragments(ROOT / "README.md", "text") if block.startswith("parity/")]
    listed, stack = set(), []
    for line in tree.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        path = "/".join([*stack[:depth], name.rstrip("/")])
        if name.endswith("/"):
            stack[depth:] = [name.rstrip("/")]
        elif name.endswith(".py"):
            listed.add(path)
        assert (ROOT / path).exists(), path
    modules = [p for top in ("parity", "gpt_torch", "gpt_jax", "scripts") for p in (ROOT / top).rglob("*.py")]
    expected = {path.relative_to(ROOT).as_posix() for path in modules if path.name != "__init__.py"}
    assert listed == expected


def test_run_folders_are_as_specified(finished_runs, tmp_path):
    page = ROOT / "docs/reference/file-formats.md"
    read = run_fragments(page)
    documented = set(inline_code(page))
    for folder, _ in finished_runs.values():
        newest = max((folder / "checkpoints").iterdir())
        config, env = (read["json"].loads((folder / name).read_text()) for name in ("config.json", "env.json"))
        assert {*config, *config["model"], *env, *read["json"].loads((newest / "config.json").read_text())} - {
            "architectures"
        } <= documented
        assert set(config["train"]) == {field.name for field in dataclasses.fields(TrainSettings)}
        assert {p.name for p in folder.iterdir()} <= documented | {"checkpoints"}
        steps, evaluations = read["read_metrics"](folder / "metrics.jsonl")
        assert [entry["step"] for entry in steps] == list(range(1, 61))
        assert [entry["step"] for entry in evaluations] == [0, 20, 40, 60]
        assert {*steps[0], *evaluations[0]} <= documented

        assert read["damaged_files"](newest) == []
        copy = tmp_path / folder.name
        shutil.copytree(newest, copy)
        with (copy / "model.safetensors").open("r+b") as file:
            file.seek(-1, 2)
            last = file.read(1)
            file.seek(-1, 2)
            file.write(bytes([last[0] ^ 1]))
        assert read["damaged_files"](copy) == ["model.safetensors"]

        arrays, _ = read["read_safetensors"](newest / "model.safetensors")
        model, expected, _ = huggingface.read(newest)
        assert {name.removeprefix("transformer.") for name in arrays} == set(expected)
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, np.asarray(expected[name.removeprefix("transformer.")]))
        assert model.n_layer == 3
    folder, _ = finished_runs["torch"]
    newest = max((folder / "checkpoints").iterdir())
    moments, metadata = read["read_safetensors"](newest / "optimizer.safetensors")
    state = optimizer_state.read(newest, model)
    assert int(metadata["step"]) == state.step == 60
    for moment in ("exp_avg", "exp_avg_sq"):
        for name, array in state.arrays[moment].items():
            np.testing.assert_array_equal(moments.pop(f"{moment}.{name}"), array)
    assert not moments


def test_prepared_folders_are_as_specified(tmp_path):
    page = ROOT / "docs/reference/file-formats.md"
    read, out, texts = run_fragments(page), tmp_path / "out", [f"Document {n}." * (n % 7 + 1) for n in range(60)]
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(texts))
    tokenizer = load_tokenizer("bytes")
    index = shards.prepare_shards([tmp_path / "text.txt"], out, tokenizer, validation_fraction=0.3, shard_tokens=1000)
    documented = set(inline_code(page))
    assert {*index, *index["splits"]["train"], *index["splits"]["train"]["done"][0], *index["sources"][0]} <= documented
    assert len(index["splits"]["train"]["done"]) > 1
    expected = {"train": [], "val": []}
    for number, text in enumerate(texts):
        validation = zlib.crc32(number.to_bytes(8, "little")) < 0.3 * 2**32
        expected["val" if validation else "train"] += [*text.encode(), 256]
    for split, ids in expected.items():
        assert read["read_split"](out, split).tolist() == ids
        for file in out.glob(f"{split}_*.bin"):
            np.testing.assert_array_equal(read["read_tokens"](file), read_bin(file))
    raw = tmp_path / "raw.bin"
    np.array([1, 2, 50256], "<u2").tofile(raw)
    assert read["read_tokens"](raw).tolist() == read_bin(raw).tolist() == [1, 2, 50256]
