"""The page's requests over HTTP: streamed text, views, runs, checkpoints, errors; and the rules of its sliders."""

import asyncio
import json
import re
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from starlette.testclient import TestClient
from support.sampling_rules import RULES, check_rules, rule_cases
from support.served import run_engine

from parity.serving import inspect, page
from parity.serving.app import Options, make_app
from parity.serving.rows import Generation, Row, WaitingRow

STATIC = Path(page.__file__).parent / "static"
TEXT = "First Citizen"


@pytest.fixture(scope="module")
def run_folder(shared_run):
    return shared_run("tiny-torch", "train_torch.py", "--preset", "tiny")[0]


@pytest.fixture(scope="module")
def runs(run_folder, tmp_path_factory):
    """A folder with a run, and with one that has a hostile name and no checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(run_folder, folder / "good")
    shutil.copytree(run_folder, folder / "<img src=x>", ignore=lambda *_: ["checkpoints"])
    return folder


@pytest.fixture(scope="module")
def engines(run_folder):
    return {f"tiny-{name}": run_engine(name, run_folder, max_waiting=256) for name in ("torch", "jax")}


@pytest.fixture(scope="module")
def client(engines, runs):
    with TestClient(make_app(engines, Options(runs=[runs])), base_url="http://localhost") as client:
        yield client


@pytest.fixture(scope="module")
def torch_engine(engines):
    return engines["tiny-torch"]


def post(client, view, /, **fields):
    return client.post(f"/page/{view}", json=fields)


def events(response):
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def complete(client, **fields):
    """The events of a completion by torch: (ids of the prompt, tokens, finish_reason)."""
    first, *others = events(post(client, "complete", model="tiny-torch", prompt=TEXT, **fields))
    assert [event["finish_reason"] for event in others[:-1]] == [None] * (len(others) - 1)
    return first["prompt"], [token for event in others for token in event["tokens"]], others[-1]["finish_reason"]


def test_the_page_is_complete_and_asks_nobody_else(client):
    response = client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["content-security-policy"].startswith("default-src 'self'")
    needed = set(re.findall(r'(?:src|href)="(.+?)"', response.text))
    assert needed == {"static/icon.svg", "static/page.css", "static/main.js"}
    types = {".js": "javascript", ".css": "text/css", ".svg": "image/svg+xml", ".html": "text/html"}
    for path in STATIC.iterdir():
        response = client.get(f"/static/{path.name}")
        assert response.status_code == 200
        assert types[path.suffix] in response.headers["content-type"]
        text = path.read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|style=", text), path
        addresses = set(re.findall(r"(?:https?:)?//[\w.]+\.\w+[\w/]*", re.sub(r"^\s*//.*", "", text, flags=re.M)))
        assert addresses <= {"http://www.w3.org/2000/svg"}, path
        for name in re.findall(r'from "\./(.+?)"', text):
            assert (STATIC / name).is_file(), name
    assert client.get("/static/../page.py").status_code == 404
    assert client.get("/static/none.js").status_code == 404


def test_every_id_and_class_that_scripts_select_is_in_the_page():
    html = (STATIC / "index.html").read_text()
    for path in STATIC.glob("*.js"):
        for id in re.findall(r'\$\("#([\w-]+)', path.read_text()):
            assert f'id="{id}"' in html, f"{path.name}: {id}"


def test_what_the_page_knows_of_the_model(client, torch_engine):
    info = client.get("/page/info").json()
    assert info["source"] == "tiny"
    assert [(m["name"], m["label"]) for m in info["models"]] == [("tiny-torch", "torch"), ("tiny-jax", "jax")]
    assert info["config"]["n_vocab"] == torch_engine.config.n_vocab
    assert info["parameters"] == sum(p.numel() for p in torch_engine.model.parameters())
    vocabulary = client.get("/page/vocabulary").json()["shown"]
    assert len(vocabulary) == torch_engine.config.n_vocab
    assert (vocabulary[65], vocabulary[256]) == ("A", "<|endoftext|>")


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0}, {"temperature": 0.9, "top_k": 7, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1}],
    ids=["defaults", "greedy", "all rules"],
)
def test_the_streamed_text_is_that_of_generate(client, torch_engine, options):
    ids, tokens, reason = complete(client, max_new_tokens=8, seed=3, **options)
    assert ids == list(TEXT.encode())
    [row], [logprobs] = torch_engine.backend.generate(
        torch_engine.model, [ids], 8, return_logprobs=True, seed=3, eos_id=256, **options
    )
    assert [token["id"] for token in tokens] == [id for id in row[len(ids) :] if id != 256]
    assert "".join(token["text"] for token in tokens) == torch_engine.tokenizer.decode(row[len(ids) :])
    assert [token["logprob"] for token in tokens] == pytest.approx(logprobs[: len(tokens)], abs=1e-4)
    assert reason == ("stop" if row[-1] == 256 else "length")


def test_a_text_ends_before_its_stop_text(client, torch_engine):
    _, tokens, _ = complete(client, max_new_tokens=8, temperature=0)
    text = "".join(token["text"] for token in tokens)
    _, stopped, reason = complete(client, max_new_tokens=8, temperature=0, stop=[text[4:6]])
    assert "".join(token["text"] for token in stopped) == text[: text.find(text[4:6])]
    assert reason == "stop"


class Words:
    """A tokenizer of long tokens."""

    texts = ("x", " see", " the", " end", " é!")
    n_vocab, eos_id = 6, 5

    def token_bytes(self, id):
        return self.texts[id].encode()


async def progress_of(ids, stop):
    """What the engine delivers for a row, token by token."""
    row = WaitingRow(Generation([Row([0], len(ids), {"eos_id": Words.eos_id}, stop)], 0, int), 0, Words())
    for id in ids:
        event = row.add([id], [0.0], [()])
        if event is not None:
            yield event
        if row.is_finished:
            return


@pytest.mark.parametrize(
    ("ids", "stop", "parts"),
    [
        ((0, 1, 2, 3, 0), ("the end",), [["x"], [" see"], [" "]]),
        ((0, 1, 2, 1, 5), ("the end",), [["x"], [" see"], [" the", " see"], [""]]),
        ((0, 2, 0, 4, 0), ("é",), [["x"], [" the"], ["x"], [" "]]),
        ((0, 2, 3), ("the end",), [["x"], [" "]]),
        ((0, 2), ("the end",), [["x"], [" the"]]),
        ((1, 2, 3), (), [[" see"], [" the"], [" end"]]),
    ],
)
def test_no_part_of_a_stop_text_is_ever_shown(ids, stop, parts):
    async def collect():
        released = [progress.text async for progress in progress_of(ids, stop)]
        first, *events = [event async for event in page.completion_events(progress_of(ids, stop), [7], Words())]
        return "".join(released), first, [event["tokens"] for event in events]

    released, first, tokens = asyncio.run(collect())
    assert first == {"prompt": [7]}
    assert [[token["text"] for token in event] for event in tokens if event] == parts
    assert "".join(token["text"] for event in tokens for token in event) == released


def test_a_view_is_what_its_function_returns(client, torch_engine):
    subject = inspect.Subject.of(torch_engine.backend, torch_engine.model, torch_engine.tokenizer)
    arguments = {
        "loss": {"text": TEXT},
        "attention": {"text": TEXT, "layer": 1},
        "lens": {"text": TEXT},
        "attribution": {"text": TEXT, "position": 3, "minus": 70},
        "ablate": {"text": TEXT, "layer": 0, "replacement": "mean"},
        "logits": {"ids": [1, 2], "seed": 5},
    }
    for name, fields in arguments.items():
        expected = json.loads(json.dumps(page.VIEWS[name][0](subject, **fields)))
        assert post(client, name, model="tiny-torch", **fields).json() == expected, name
    assert post(client, "patch", model="tiny-torch", clean=TEXT, corrupted="First", layer=0).status_code == 400
    assert set(page.VIEWS) == {*arguments, "patch"}


def test_both_backends_are_compared(client):
    result = post(client, "compare", ids=list(TEXT.encode()), first=5).json()
    assert result["dtype"] == "float32"
    assert len(result["rows"]) == len(TEXT) - 4
    for row in result["rows"]:
        assert set(row["errors"]) == {"torch", "jax"}
        assert max(row["errors"].values()) <= row["bound"]


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("loss", {"text": "a"}, "missing: model"),
        ("loss", {"model": "none", "text": "a"}, "model must be one of tiny-torch, tiny-jax"),
        ("loss", {"model": "tiny-torch", "text": 1}, "text must be text, got 1"),
        ("loss", {"model": "tiny-torch", "text": "a", "layer": 1}, "unknown field layer"),
        ("attention", {"model": "tiny-torch", "text": "a", "layer": True}, "layer must be an integer, got True"),
        ("logits", {"model": "tiny-torch", "ids": []}, "there are no tokens"),
        ("logits", {"model": "tiny-torch", "ids": [1, 300]}, "token id 300 is outside the vocabulary"),
        ("logits", {"model": "tiny-torch", "ids": [1, "2"]}, "ids must be a list of integers"),
        ("logits", {"model": "tiny-torch", "ids": [1], "seed": -1}, "seed must be in"),
        ("ablate", {"model": "tiny-torch", "text": "a", "layer": 0, "replacement": "x"}, "replacement must be one of"),
        ("complete", {"model": "tiny-torch", "prompt": "a", "top_p": 2}, "top_p must be in"),
        ("complete", {"model": "tiny-torch", "prompt": "a", "max_new_tokens": 9999}, "9999 more were requested"),
        ("complete", {"model": "tiny-torch", "prompt": "a", "beam": 2}, "unknown field beam"),
        ("complete", {"model": "tiny-torch", "prompt": "a", "stop": ["a"] * 17}, "a list of up to 16 texts"),
        (
            "complete",
            {"model": "tiny-torch", "prompt": "a", "stop": ["a" * 1001]},
            "each text needs 1..1000 characters",
        ),
        ("complete", {"model": "tiny-torch"}, "give either prompt or messages"),
        (
            "complete",
            {"model": "tiny-torch", "messages": [{"role": "user", "content": "a"}]},
            "was not tuned on instructions",
        ),
        ("compare", {"ids": [1], "first": 0}, "first must be in 1..1"),
        ("run", {"path": "/etc"}, "there is no run '/etc'"),
        ("load", {"path": "/etc", "checkpoint": 1}, "there is no run '/etc'"),
    ],
)
def test_bad_requests_are_refused_by_name(client, path, fields, message):
    response = post(client, path, **fields)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"[1]", b"{", b'{"text": NaN}', b"\xff", b"[" * 200])
def test_bodies_that_are_no_objects_are_refused(client, body):
    response = client.post("/page/loss", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert "the body" in response.json()["error"]["message"]


def test_no_body_breaks_a_view(client):
    """Random fields of random kinds: each is answered or refused, never a failure of the server."""
    generator = np.random.default_rng(0)
    values = [None, True, -1, 0, 1, 2, 10**30, 0.5, -1e300, "", "ab", "\ud800", "\x00", "é" * 30, "zero", "tiny-torch"]
    values += [[], [1, 2], [-1], [10**30], [[1]], ["a"], [""], {}, {"a": [1]}, [{"role": "user", "content": "a"}]]
    fields = {name for _, *kinds in page.VIEWS.values() for names in kinds for name in names}
    fields |= {*page._COMPLETION, "first", "path", "version", "checkpoint"}
    likely = {
        "text": "ab",
        "prompt": "a",
        "max_new_tokens": 2,
        "layer": 0,
        "ids": [1, 2],
        "first": 1,
        "clean": "ab",
        "corrupted": "cd",
    }
    paths = [*page.VIEWS, "complete", "compare", "run", "load"]
    statuses = set()
    for number in range(300):
        path = paths[number % len(paths)]
        kinds = page.VIEWS[path][1:] if path in page.VIEWS else [page._COMPLETION]
        body = {"model": "tiny-torch"} if path not in ("compare", "run", "load") else {}
        body |= {name: likely[name] for name in kinds[0] if name in likely}
        for name in generator.choice(sorted(fields), generator.integers(0, 3)):
            body[str(name)] = values[generator.integers(len(values))]
        response = client.post(f"/page/{path}", content=json.dumps(body), headers={"Content-Type": "application/json"})
        assert response.status_code in (200, 400), (path, body, response.text)
        assert response.status_code == 200 or response.json()["error"]["message"], (path, body)
        statuses.add((path, response.status_code))
    assert {path for path, status in statuses if status == 200} >= {"loss", "attention", "lens", "logits", "complete"}


def test_too_many_views_at_once_are_refused(client, monkeypatch):
    monkeypatch.setattr(page, "_MOST_WAITING", 0)
    response = post(client, "loss", model="tiny-torch", text="a")
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"


def test_clicks_and_runs_do_not_wait_for_a_long_view(client, monkeypatch):
    begun, go = threading.Event(), threading.Event()

    def compare(*_):
        begun.set()
        return go.wait(60)

    monkeypatch.setattr(page.agreement, "compare", compare)
    with ThreadPoolExecutor(1) as executor:
        try:
            comparing = executor.submit(post, client, "compare", ids=[1, 2], first=1)
            assert begun.wait(60)
            assert post(client, "logits", model="tiny-torch", ids=[1, 2]).status_code == 200
            path = client.get("/page/runs").json()["runs"][0]["path"]
            assert post(client, "run", path=path).status_code == 200
            assert not comparing.done()
        finally:
            go.set()
        assert comparing.result().json() is True


def test_what_waits_for_its_turn_is_not_computed_if_its_client_left():
    computed = []
    queue = page._Queue()

    async def is_disconnected():
        return True

    async def ask():
        return await queue.run(SimpleNamespace(is_disconnected=is_disconnected), lambda: computed.append(1))

    assert asyncio.run(ask()).status_code == 400
    assert computed == []


def test_a_name_that_is_not_utf_8_breaks_nothing(run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "\udcff")
    with TestClient(make_app({"tiny": run_engine("torch", run_folder)}, Options(runs=[tmp_path]))) as client:
        client.base_url = "http://localhost"
        [listed] = client.get("/page/runs").json()["runs"]
        sent = {"content": json.dumps({"path": listed["path"]}), "headers": {"Content-Type": "application/json"}}
        run = client.post("/page/run", **sent).json()["run"]
        assert run["summary"]["name"] == listed["name"] == "\udcff"
        sent["content"] = json.dumps({"path": listed["path"], "checkpoint": run["checkpoints"][-1]})
        assert client.post("/page/load", **sent).json()["source"].startswith("\udcff, step ")
        assert client.get("/page/info").json()["source"].startswith("\udcff, step ")


def test_runs_and_their_checkpoints(client, runs, engines):
    listed = client.get("/page/runs").json()["runs"]
    assert {run["name"] for run in listed} == {"good", "<img src=x>"}
    path = str(runs / "good")
    run = post(client, "run", path=path).json()["run"]
    assert run["training"]
    assert run["validation"]
    assert run["samples"][-1]["step"] == run["checkpoints"][-1] == run["summary"]["steps"]
    assert post(client, "run", path=path, version=run["version"]).json() == {"run": None}

    before = complete(client, max_new_tokens=8, temperature=0)[1]
    weights = {name: engine.backend.export_weights(engine.model) for name, engine in engines.items()}
    changed = {name: np.zeros_like(array) for name, array in weights["tiny-torch"].items()}
    for engine in engines.values():
        engine.backend.load_weights(engine.model, changed)
        engine.weights_changed()
    assert complete(client, max_new_tokens=8, temperature=0)[1] != before
    loaded = post(client, "load", path=path, checkpoint=run["checkpoints"][-1]).json()
    assert loaded["source"] == f"good, step {run['checkpoints'][-1]:,}"
    assert complete(client, max_new_tokens=8, temperature=0)[1] == before
    for name, engine in engines.items():
        for key, array in engine.backend.export_weights(engine.model).items():
            assert np.array_equal(array, weights[name][key]), (name, key)
    response = post(client, "load", path=str(runs / "<img src=x>"), checkpoint=1)
    assert response.status_code == 400


def test_a_checkpoint_of_a_tuned_run_brings_the_chat(client, runs, monkeypatch):
    step = post(client, "run", path=str(runs / "good")).json()["run"]["checkpoints"][-1]
    for template in ("plain", None):
        monkeypatch.setattr(page, "chat_template", lambda run, template=template: template)
        loaded = post(client, "load", path=str(runs / "good"), checkpoint=step).json()
        assert loaded["chat"] == (template is not None)
        chat = post(client, "complete", model="tiny-torch", messages=[{"role": "user", "content": "a"}])
        assert ("was not tuned" in chat.text) == (template is None)


def test_an_answer_of_a_chat_has_what_room_there_is_and_at_least_a_token(client, monkeypatch):
    monkeypatch.setattr(page, "chat_prompt", lambda *_: [1] * 20)
    chat = {"model": "tiny-torch", "messages": [{"role": "user", "content": "a"}], "seed": 1}
    for count in (0, -3):
        response = post(client, "complete", max_new_tokens=count, **chat)
        assert "max_new_tokens must be in" in response.json()["error"]["message"]
    tokens = [token for event in events(post(client, "complete", **chat))[1:] for token in event["tokens"]]
    assert 1 <= len(tokens) <= 5  # of a context of 24


def test_a_run_of_another_model_is_not_loaded(client, runs):
    config = runs / "good" / "config.json"
    saved = config.read_text()
    entries = json.loads(saved)
    entries["model"]["n_layer"] += 1
    config.write_text(json.dumps(entries))
    try:
        response = post(client, "load", path=str(runs / "good"), checkpoint=1)
    finally:
        config.write_text(saved)
    assert "has a model of another shape or tokenizer" in response.json()["error"]["message"]


# The rules of sampling in JavaScript


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node; make test-page tests this in a browser")
def test_the_sliders_follow_the_rules_of_sampling(tmp_path):
    shutil.copyfile(STATIC / "sampling.js", tmp_path / "sampling.mjs")
    program = f'import * as rules from "./sampling.mjs";\nconst run = {RULES};\n'
    program += f"console.log(JSON.stringify(run({json.dumps(rule_cases())}, rules)));\n"
    (tmp_path / "run.mjs").write_text(program)
    done = subprocess.run(["node", "run.mjs"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    check_rules(json.loads(done.stdout))
