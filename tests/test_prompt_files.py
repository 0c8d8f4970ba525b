"""Many prompts of one file: the same bytes in any number of parts and after any interruption, and bad lines."""

import hashlib
import json
import random
import signal
import subprocess
import sys

import generate
import pytest
from support.interrupting import interrupted
from support.models import TINY
from support.runs import run_script

import gpt_torch
from gpt_jax.generation_loop import _cached_loop, _start
from parity import console
from parity.config import GPTConfig
from parity.console import PlainConsole, TaskProgress
from parity.data.tokenizer import load_tokenizer
from parity.errors import InputError
from parity.parts import Part
from parity.prompt_files import run as prompt_run
from parity.prompt_files.output import Output, output_path
from parity.prompt_files.prompts import BadLine, PromptFile
from parity.prompt_files.run import Plan, continuations

BYTES = load_tokenizer("bytes")
N = 23


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a file of prompts of different lengths, some with ids and seeds."""
    generator = random.Random(0)
    lines = []
    for number in range(1, N + 1):
        text = "".join(generator.choices("the dog. ", k=generator.randint(1, 18)))
        line = {"tokens": list(text.encode())} if number % 5 == 0 else {"prompt": text}
        line |= {"id": f"prompt {number}"} if number % 3 == 0 else {}
        line |= {"seed": number} if number % 7 == 0 else {}
        lines.append(json.dumps(line))
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiny_run(shared_run):
    """A run with the bytes tokenizer and a context of 24 tokens."""
    return shared_run("tiny-jax", "train_jax.py", "--preset", "tiny")[0]


@pytest.fixture
def run(tiny_run, monkeypatch, capsys):
    """Run the script in this process, with blocks of several batches; returns what it printed to standard error."""

    def call(*options, backend="torch", prompts="prompts.jsonl", out="out.jsonl"):
        given = {"--run": tiny_run, "--backend": backend, "--prompts": prompts, "--out": out}
        arguments = [part for option in given.items() if option[1] is not None for part in option]
        arguments += ["--max-new-tokens", 6, "--batch-size", 3, "--no-compilation-cache", *options]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
            patch.setattr(prompt_run, "_FEWEST_BLOCKS", 4)
            generate.main()
        return capsys.readouterr().err

    return call


def records(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_parts_in_any_order_are_the_whole_and_few_programs_are_compiled(run, workplace, backend):
    programs = _start._cache_size(), _cached_loop._cache_size()
    printed = run(backend=backend)
    assert "23 prompts, 138 tokens in " in printed
    whole = (workplace / "out.jsonl").read_bytes()
    assert [line["id"] for line in records(workplace / "out.jsonl")] == [
        f"prompt {number}" if number % 3 == 0 else number for number in range(1, N + 1)
    ]
    for k in (2, 0, 1):
        run("--part", f"{k}/3", backend=backend)
    parts = sorted(workplace.glob("out-*-of-00003.jsonl"))
    assert b"".join(part.read_bytes() for part in parts) == whole
    assert all(part.stat().st_size for part in parts)
    # Lengths of 1 to 18 tokens are in two buckets. A batch has the same number of rows wherever it is.
    assert _start._cache_size() - programs[0] <= 2
    assert _cached_loop._cache_size() - programs[1] <= 2


def test_a_result_depends_on_seed_and_id_alone(run, tiny_run, workplace):
    """Not on its place in the file, the batch or the part; generate() gives the same with the id as its row."""
    options = ("--temperature", "1.1", "--samples", "2", "--seed", "5")
    run(*options)
    whole = {line["id"]: line["continuations"] for line in records(workplace / "out.jsonl")}
    lines = [json.loads(line) for line in (workplace / "prompts.jsonl").read_text().splitlines()]
    named = [{"id": number, **line} for number, line in enumerate(lines, 1)]
    text = "".join(json.dumps(line) + "\n\n" for line in reversed(named))
    (workplace / "reversed.ndjson").write_text(text)
    run(*options, "--batch-size", "9", prompts="reversed.ndjson", out="reversed.jsonl")
    assert {line["id"]: line["continuations"] for line in records(workplace / "reversed.jsonl")} == whole
    assert [line["id"] for line in records(workplace / "reversed.jsonl")] == [line["id"] for line in reversed(named)]
    model = gpt_torch.load_pretrained(max((tiny_run / "checkpoints").iterdir()))
    for line in named[5:9]:
        ids = line["tokens"] if "tokens" in line else list(line["prompt"].encode())
        own = [{"row": str(line["id"]), "seed": line.get("seed", 5)}]
        rows = gpt_torch.generate(model, [ids], 6, temperature=1.1, samples=2, per_prompt=own, eos_id=BYTES.eos_id)
        assert [row[len(ids) :] for row in rows] == [entry["tokens"] for entry in whole[line["id"]]]
        for entry in whole[line["id"]]:
            assert entry["text"] == BYTES.decode([token for token in entry["tokens"] if token != BYTES.eos_id])
            assert entry["finish_reason"] == ("stop" if BYTES.eos_id in entry["tokens"] else "length")
    assert whole["prompt 3"][0] != whole["prompt 3"][1]


def test_finish_reasons(run, workplace):
    (workplace / "one.txt").write_text("the dog\r\nthe \n")
    run("--temperature", "0", prompts="one.txt", out="plain.jsonl")
    first, second = records(workplace / "plain.jsonl")
    assert (first["id"], second["id"]) == (1, 2)
    [continuation] = first["continuations"]
    assert continuation["finish_reason"] == "length"
    stop = continuation["text"][4:6]
    run("--temperature", "0", "--stop", stop, prompts="one.txt", out="stop.jsonl")
    [stopped] = records(workplace / "stop.jsonl")[0]["continuations"]
    assert stopped["text"] == continuation["text"][: continuation["text"].index(stop) + 2]
    assert stopped["finish_reason"] == "stop"


def fake_generate(prompts, max_new_tokens, per_prompt, samples, seed, **options):
    """Tokens that depend on what the random numbers of a prompt depend on, and on nothing else."""
    rows = []
    for prompt, own in zip(prompts, per_prompt, strict=True):
        for sample in range(samples):
            digest = hashlib.sha256(repr((own.get("seed", seed), own.get("row"), sample)).encode()).digest()
            rows.append(prompt + list(digest[: own.get("max_new_tokens", max_new_tokens)]))
    return rows


def test_from_every_interruption_to_the_same_bytes(workplace):
    """A killed process leaves a beginning of the file. Each one must become the same file."""
    plan = Plan(N, 2, 4)
    file = PromptFile(workplace / "prompts.jsonl")
    prompts = file.encode(range(N), BYTES, GPTConfig())
    prompts[10] = BadLine(11, "is bad")
    ids = [prompt.id for prompt in prompts]
    path, options = workplace / "out.jsonl", {"samples": 1, "seed": 0}

    def finish():
        out = Output(path, {"seed": 0}, ids)
        n_done, computed = out.n_done, []
        for block in continuations(
            fake_generate, BYTES, prompts, plan, n_done, 4, options, lambda n, _: computed.append(n)
        ):
            out.add(block)
        out.close()
        assert sum(computed) == (0 if n_done == N else N - n_done + n_done % 4)
        return path.read_bytes()

    whole = finish()
    assert whole.count(b"\n") == N
    assert json.loads(whole.splitlines()[10]) == {"id": 11, "error": "is bad"}
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        assert finish() == whole
    assert finish() == whole


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_killed_process_goes_on(tiny_run, workplace, backend):
    options = ("--run", tiny_run, "--backend", backend, "--prompts", workplace / "prompts.jsonl")
    options += ("--max-new-tokens", "6", "--batch-size", "3")
    killed = workplace / "killed.jsonl"
    moment = "parity.prompt_files.output:Output.add:3"
    done = subprocess.run(interrupted(signal.SIGKILL, moment, "generate.py", *options, "--out", killed), check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(records(killed)) == 6
    for out in (killed, workplace / "whole.jsonl"):
        result = run_script("generate.py", *options, "--out", out)
        assert result.returncode == 0, result.stderr
        assert ("6 of 23 prompts are in" in result.stderr) == (out == killed)
    assert killed.read_bytes() == (workplace / "whole.jsonl").read_bytes()


def test_what_changed_is_refused(run, workplace):
    run()
    before = (workplace / "out.jsonl").read_bytes()
    assert "23 of 23 prompts are in out.jsonl already" in run()
    for options, message in (
        (("--temperature", "0.5"), "temperature was 0.8 and is now 0.5"),
        (("--max-new-tokens", "7"), "max_new_tokens was 6 and is now 7"),
        (("--batch-size", "4"), "batch_size was 3 and is now 4"),
        (("--stop", "x"), "stop was"),
        (("--checkpoint", "20"), "weights_sha256 was"),
        (("--dtype", "bfloat16"), "dtype was 'float32' and is now 'bfloat16'"),
    ):
        with pytest.raises(InputError) as error:
            run(*options)
        assert message in str(error.value)
    text = (workplace / "prompts.jsonl").read_text()
    (workplace / "prompts.jsonl").write_text(text + '{"prompt": "x"}\n')
    with pytest.raises(InputError, match="prompts_sha256 was"):
        run()
    (workplace / "prompts.jsonl").write_text(text)
    lines = before.splitlines(keepends=True)
    (workplace / "out.jsonl").write_bytes(lines[1] + lines[0])
    with pytest.raises(InputError, match=r"out\.jsonl, line 1 is not of prompt 1"):
        run()
    (workplace / "out.jsonl").write_bytes(b"\0\0\n")
    with pytest.raises(InputError, match=r"out\.jsonl, line 1 is not valid JSON"):
        run()
    (workplace / "out.jsonl").write_bytes(before)
    open_file = Output(workplace / "other.jsonl", {}, [])
    with pytest.raises(InputError, match="another process is writing"):
        run(out="other.jsonl")
    open_file.close()
    (workplace / "out.settings.json").unlink()
    with pytest.raises(InputError, match=r"exists, without out\.settings\.json beside it"):
        run()
    assert (workplace / "out.jsonl").read_bytes() == before
    (workplace / "out.jsonl").unlink()
    run("--temperature", "0.5")  # what was deleted is not missed


def test_bad_options(run, workplace):
    for options, files, message in (
        (("--part", "3/3"), {}, "--part 3/3: give k/n"),
        (("--batch-size", "0"), {}, "--batch-size 0"),
        ((), {"out": None}, "--prompts needs --out"),
        ((), {"out": "out.txt"}, "name a file .jsonl"),
        ((), {"prompts": None}, "--out needs --prompts"),
        (("--part", "0/3"), {"prompts": None, "out": None}, "--part needs --prompts"),
        (("--skip-bad",), {"prompts": None, "out": None}, "--skip-bad needs --prompts"),
        (("--batch-size", "4"), {"prompts": None, "out": None}, "--batch-size needs --prompts"),
        (("The",), {}, "--prompts replaces the prompt and --file"),
        ((), {"prompts": "nothing.jsonl"}, "nothing.jsonl is not a file"),
        ((), {"prompts": "."}, "--prompts . is not a file"),
    ):
        with pytest.raises(InputError) as error:
            run(*options, **files)
        assert message in str(error.value)
    assert [path.name for path in workplace.iterdir()] == ["prompts.jsonl"]


BAD_LINES = {
    b'{"prompt": "a"': "line 2 cannot be read: it is not valid JSON",
    b'["a"]': "line 2 cannot be read: it must hold a JSON object",
    b'{"prompt": "a", "prompt": "b"}': "occurs twice",
    b'{"text": "a"}': "line 2 has the unknown field 'text'; the fields are prompt, tokens, id, seed",
    b'{"id": 4}': "line 2 must have either a prompt",
    b'{"prompt": "a", "tokens": [1]}': "line 2 must have either a prompt",
    b'{"prompt": 1}': "line 2 has a prompt that is not a text",
    b'{"prompt": "a", "id": 1.5}': "line 2 has the id 1.5",
    b'{"prompt": "a", "id": true}': "line 2 has the id True",
    b'{"prompt": "a", "id": "1"}': "line 2 has the id 1, which an earlier line has too",
    b'{"prompt": "a", "seed": -1}': "line 2 has the seed -1",
    b'{"prompt": "a", "seed": 18446744073709551616}': "line 2 has the seed 18446744073709551616",
    b'{"prompt": "\\ud800"}': "line 2 is not Unicode text",
    b'{"prompt": "\xff"}': "line 2 cannot be read",
    b'{"tokens": "abc"}': "line 2 has tokens that are not a list",
    b'{"tokens": []}': "line 2 has tokens that are not a list of integers, at least one",
    b'{"tokens": [1, 2.0]}': "line 2 has tokens that are not a list of integers",
    b'{"tokens": [true]}': "line 2 has tokens that are not a list of integers",
    b'{"tokens": [1, 97]}': "line 2 does not fit the model: token id 97 is outside the vocabulary 0..96",
    b'{"tokens": [-1]}': "line 2 does not fit the model: token id -1",
    b'{"tokens": [' + b"1," * 24 + b"1]}": "line 2 does not fit the model: 25 tokens are more",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line.decode(errors="replace")[:30])
def test_bad_lines_are_named_or_skipped(tmp_path, line):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"tokens": [1]}\n' + line + b'\n\n{"tokens": [2], "id": "last"}')
    for skip_bad, hint in ((False, "with --skip-bad the others are generated"), (None, "correct or remove it")):
        with pytest.raises(InputError) as error:
            PromptFile(path, skip_bad).encode(range(3), BYTES, TINY)
        assert str(error.value).startswith(f"--prompts {path}, line 2 ")
        assert BAD_LINES[line] in str(error.value)
        assert str(error.value).endswith(hint)
    file = PromptFile(path, skip_bad=True)
    first, bad, last = file.encode(range(file.n_prompts), BYTES, TINY)
    assert (first.id, first.tokens.tolist()) == (1, [1])
    assert (last.id, last.tokens.tolist()) == ("last", [2])
    assert bad == BadLine(2, bad.reason)
    assert BAD_LINES[line].removeprefix("line 2 ") in bad.reason


def test_what_a_file_may_hold(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes('\ufeffOne \u2028line\r\n\n  \n{"prompt": "text"}'.encode())
    file = PromptFile(path)
    prompts = file.encode(range(file.n_prompts), BYTES, gpt_torch.GPTModel("tiny", seed=0).config.__class__())
    assert [(p.id, bytes(p.tokens.tolist()).decode()) for p in prompts] == [
        (1, "One \u2028line"),
        (4, '{"prompt": "text"}'),
    ]
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(b"\n \n")
    with pytest.raises(InputError, match="has no line with a prompt"):
        PromptFile(path)
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": ""}\n{"tokens": [' + "1," * 30 + "2]}\n")
    config = GPTConfig(n_vocab=257, n_ctx=24, n_embd=8, n_head=1, n_layer=1)
    empty, long = PromptFile(path).encode(range(2), BYTES, config, context_size=24)
    assert empty.tokens.tolist() == [BYTES.eos_id]
    assert len(long.tokens) == 31


def test_bad_lines_have_lines_in_the_result(run, workplace):
    (workplace / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": 1}\n{"tokens": [257]}\n{"prompt": "b"}\n')
    with pytest.raises(InputError, match=r"bad\.jsonl, line 2 has a prompt that is not a text"):
        run(prompts="bad.jsonl")
    printed = run("--skip-bad", prompts="bad.jsonl")
    assert "warning: --prompts bad.jsonl, line 2 has a prompt that is not a text\n" in printed
    assert "; 2 bad lines]" in printed
    first, second, third, fourth = records(workplace / "out.jsonl")
    assert len(first["continuations"]) == len(fourth["continuations"]) == 1
    assert second == {"id": 2, "error": "has a prompt that is not a text"}
    assert third["error"].startswith("does not fit the model: token id 257")


@pytest.mark.parametrize("n_prompts", [1, 5, 64, 1000, 12_345])
@pytest.mark.parametrize(("n_rows", "samples"), [(1, 1), (32, 1), (32, 3), (4, 9)])
def test_plans(n_prompts, n_rows, samples):
    plan = Plan.of(n_prompts, n_rows, samples)
    assert plan.batch_size == min(n_prompts, max(1, n_rows // samples))
    assert plan.block_size % plan.batch_size == 0
    for count in (1, 3, 8):
        parts = [plan.prompts_of(Part(index, count)) for index in range(count)]
        assert [index for part in parts for index in part] == list(range(n_prompts))
        assert all(part.start % plan.block_size == 0 for part in parts if part)
        assert max(map(len, parts)) <= n_prompts / count + plan.block_size


def test_names_of_parts(tmp_path):
    assert output_path(tmp_path / "a.jsonl", None) == tmp_path / "a.jsonl"
    assert output_path(tmp_path / "a.jsonl", Part(1, 20)) == tmp_path / "a-00001-of-00020.jsonl"


def test_the_progress_of_a_log(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with TaskProgress(PlainConsole(stderr=True, lossy=True), "generating", "prompts") as progress:
        for seconds, done in ((1, 10), (29, 20), (60, 1000), (61, 1010), (100, 2000)):
            now[0] = seconds
            progress.show(500 + done, 3500, done, 50 * done)
    assert capsys.readouterr().err.splitlines() == [
        "generating: 1,500 of 3,500 prompts, 833 tokens/s, 0:02:00 left",
        "generating: 2,500 of 3,500 prompts, 1,000 tokens/s, 0:00:50 left",
    ]
