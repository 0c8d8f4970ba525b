"""The page in a real browser: every feature by clicking and by keyboard, without a console error or another host."""

import dataclasses
import json
import os
import re
import shutil
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from playwright.sync_api import expect, sync_playwright
from support.browser import launch, needs_browser
from support.models import TINY, probing_weights
from support.sampling_rules import RULES, check_rules, rule_cases
from support.served import run_engine, serving, wait_until

import gpt_torch.serving
from parity.data.tokenizer import load_tokenizer
from parity.serving import agreement, inspect
from parity.serving.engine import Engine

SECONDS = 120  # for one step under load; nothing waits that long
TEXT = "Speak,\nho"  # the context of the model has 24 bytes

expect.set_options(timeout=1000 * SECONDS)

pytestmark = [pytest.mark.page, needs_browser]


def new_engine(name, run, *change):
    return run_engine(name, run, *change, max_batch=8, max_waiting=256, description=f"{name}, float32")


@pytest.fixture(scope="module")
def run_folder(shared_run):
    return shared_run("tiny-torch", "train_torch.py", "--preset", "tiny")[0]


@pytest.fixture(scope="module")
def runs(run_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(run_folder, folder / "growing")
    shutil.copytree(run_folder, folder / "growing2")
    newest = max(file.stat().st_mtime for file in folder.rglob("*")) + 10
    os.utime(folder / "growing2" / "metrics.jsonl", (newest, newest))  # it is the first of the list
    shutil.copytree(run_folder, folder / "<img src=x onerror=alert(1)>", ignore=lambda *_: ["checkpoints"])
    return folder


@pytest.fixture(scope="module")
def served(run_folder, runs):
    engines = {f"tiny-{name}": new_engine(name, run_folder) for name in ("jax", "torch")}
    with serving(engines, runs=[runs]) as address:
        yield SimpleNamespace(engines=engines, address=address)


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()


class Visit:
    """A page in the browser, and all that must not happen on it."""

    def __init__(self, browser, address, **options):
        self._context = browser.new_context(**options)
        self.page = self._context.new_page()
        self.page.set_default_timeout(1000 * SECONDS)
        self.problems, self._address = [], address
        self.page.on("console", lambda message: self.problems.append(f"console: {message.text}"))
        self.page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: self.problems.append(f"dialog: {dialog.message}"))
        self.page.on("request", self._check_host)
        self.requests = []
        self.page.goto(address)

    def _check_host(self, request):
        self.requests.append(request.url.removeprefix(self._address))
        if not request.url.startswith(f"{self._address}/"):
            self.problems.append(f"another host: {request.url}")

    def close(self):
        self._context.close()
        assert self.problems == []

    def forget_refusals(self):
        """The browser reports each request that the server refuses, and a test may provoke that."""
        self.problems = [
            problem for problem in self.problems if "the server responded with a status of 4" not in problem
        ]


@pytest.fixture
def visit(browser, served):
    visits = []

    def open_page(address=served.address, **options):
        visits.append(Visit(browser, address, **options))
        visits[-1].page.wait_for_selector("html[data-ready]")
        return visits[-1]

    yield open_page
    for visit in visits:
        visit.close()


def complete(page, prompt=TEXT, **options):
    page.fill("#complete textarea", prompt)
    for name, value in {"max_new_tokens": 12, **options}.items():
        page.fill(f"#complete-{name}", str(value))
    page.click("#complete button.go")
    expect(page.locator("#complete button.stop")).to_be_disabled(timeout=1000 * SECONDS)


def fact(page, name, root="#complete"):
    return page.locator(f"{root} .inspector [data-fact={name}]").inner_text()


def compute(page, view, text=TEXT):
    page.fill("#inside form.common textarea", text)
    page.click(f"#inside [data-view={view}]")
    page.click("#inside form.common button.go")
    expect(page.locator("#inside form.common button.go")).not_to_have_attribute("aria-busy", "true")


def test_both_backends_give_equal_tokens_within_the_bound(visit):
    page = visit().page
    complete(page, temperature=0.9, top_k=20)
    expect(page.locator("#complete .verdict")).to_have_text(re.compile(r"^equal: (\d+) of \1 tokens$"))
    texts = page.locator("#complete .column .text").all_inner_texts()
    assert texts[0] == texts[1]
    assert texts[0].startswith(TEXT)
    details = page.locator("#complete .details[data-share]")
    details.wait_for()
    assert 0 < float(details.get_attribute("data-share")) <= 1
    n_tokens = page.locator("#complete .column").first.locator(".token").count()
    assert page.locator("#complete .agreement circle").count() == n_tokens + 1
    page.locator("#complete .agreement circle").nth(2).click()
    expect(page.locator("#complete .token[aria-selected=true]")).to_have_count(1)


def test_a_token_shows_what_the_model_thought_and_sliders_ask_nobody(visit):
    visit = visit()
    page = visit.page
    page.select_option("#complete select", "tiny-torch")
    complete(page, temperature=1, seed=4)
    assert page.locator("#complete .column:visible").count() == 1
    token = page.locator("#complete .column:visible .token").nth(5)
    token.click()
    page.wait_for_selector("#complete .inspector[data-drawn]")
    assert re.fullmatch(r"-?\d.*\(.*%\)", fact(page, "logprob"))
    assert int(fact(page, "rank").replace(",", "")) >= 1
    assert fact(page, "entropy").endswith("nats")
    # The random number of the seed chooses the token that was generated.
    drawn = page.locator("#complete .inspector").get_attribute("data-drawn")
    rows = page.locator("#complete .alternatives tbody tr")
    assert rows.count() == 11
    chosen = page.locator("#complete .alternatives tr.chosen td.piece").inner_text()
    vocabulary = page.evaluate("fetch('page/vocabulary').then((answer) => answer.json())")["shown"]
    assert vocabulary[int(drawn)].replace(" ", "␣").replace("\n", "↵") == chosen
    before = rows.nth(0).inner_text()
    n_requests = len(visit.requests)
    for name, value in (("temperature", "0.1"), ("topK", "0.3"), ("topP", "0.5"), ("minP", "0.3")):
        page.fill(f"#complete-slider-{name}", value)
    assert rows.nth(0).inner_text() != before
    kept = int(fact(page, "kept").split()[0])
    assert 1 <= kept <= 5
    assert page.locator("#complete .alternatives tr.dropped").count() >= 10 - kept
    page.fill("#complete-slider-temperature", "0")
    assert rows.nth(0).locator("td").nth(2).inner_text() == "100.0%"
    page.click("#complete .inspector button")
    assert rows.nth(0).inner_text() == before
    assert len(visit.requests) == n_requests


def test_the_request_for_a_token_ends_when_another_one_is_chosen(visit):
    page = visit().page
    page.select_option("#complete select", "tiny-torch")
    complete(page)
    tokens = page.locator("#complete .column:visible .token")
    held = []
    page.route("**/page/logits", lambda route: route.continue_() if held else held.append(route))
    with page.expect_event("requestfailed") as failed:
        tokens.nth(1).click()
        expect(tokens.nth(1)).to_have_attribute("aria-selected", "true")
        tokens.nth(2).click()
    assert failed.value.failure == "net::ERR_ABORTED"
    page.wait_for_selector("#complete .inspector[data-drawn]")
    expect(page.locator("#complete .inspector .error")).to_have_text("")


def test_the_sliders_follow_the_rules_in_this_browser(visit):
    page = visit().page
    program = f"(cases) => import('/static/sampling.js').then((rules) => ({RULES})(cases, rules))"
    check_rules(page.evaluate(program, rule_cases()))


def tab_to(page, selector, key="Tab"):
    """Press Tab until an element has the focus; everything on the way must show that it has it."""
    for _ in range(60):
        page.keyboard.press(key)
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
        if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(selector)


def test_the_page_works_with_the_keyboard_alone(visit):
    page = visit().page
    keys = page.keyboard
    tab_to(page, "#tab-complete")
    keys.press("ArrowRight")
    expect(page.locator("#inside")).to_be_visible()
    keys.press("ArrowLeft")
    tab_to(page, "#complete textarea")
    keys.press("ControlOrMeta+A")
    keys.type("To be")
    tab_to(page, "#complete-max_new_tokens")
    keys.press("ControlOrMeta+A")
    keys.type("9")
    keys.press("Enter")
    expect(page.locator("#complete .verdict")).to_have_text(re.compile("^equal"))
    selected = page.locator("#complete .token[aria-selected=true]")
    tab_to(page, "#complete .column .token")
    keys.press("ArrowRight")
    keys.press("ArrowRight")
    expect(selected).to_have_attribute("data-index", "2")
    keys.press("End")
    last = page.locator("#complete .column").first.locator(".token").count() - 1
    expect(selected).to_have_attribute("data-index", str(last))
    page.wait_for_selector("#complete .inspector[data-drawn]")
    tab_to(page, "#complete .column:last-child .token")
    keys.press("ArrowRight")
    expect(selected).to_have_count(1)  # in the other text none is any more
    page.wait_for_selector("#complete .inspector[data-drawn]")
    expect(page.locator("#complete-slider-temperature")).to_be_enabled()
    tab_to(page, "#complete-slider-temperature")
    keys.press("Home")
    assert page.locator("#complete .sliders output").first.inner_text() == "greedy"
    page.wait_for_selector("#complete .details[data-share]")
    tab_to(page, "#complete .agreement svg")
    reading = page.locator("#complete .agreement .reading")
    expect(reading).to_have_text(re.compile(r"^token 1: difference .*, bound .*; jax .*, torch .* against float64$"))
    keys.press("ArrowRight")
    expect(reading).to_contain_text("token 2: difference")
    assert page.evaluate("document.activeElement.getAttribute('aria-valuetext')") == reading.inner_text()
    page.set_viewport_size({"width": 1000, "height": 700})  # the chart is drawn again
    expect(page.locator("#complete .agreement svg")).to_have_attribute("viewBox", re.compile(r"^0 0 [3-6]\d\d 120$"))
    expect(page.locator("#complete circle.reached")).to_have_count(1)
    keys.press("Enter")
    expect(selected).to_have_attribute("data-index", "1")

    tab_to(page, "#tab-complete", "Shift+Tab")
    expect(reading).to_have_text("\u00a0")
    keys.press("ArrowRight")
    tab_to(page, "#inside form.common textarea")
    keys.press("ControlOrMeta+A")
    keys.type("To be")
    tab_to(page, "#inside form.common button.go")
    keys.press("Enter")
    expect(page.locator("#inside-loss .token")).to_have_count(5)
    tab_to(page, "#inside [data-view=loss]")
    keys.press("ArrowRight")
    summary = page.locator("#inside-attention .summary")
    expect(summary).to_contain_text("head 0")
    tab_to(page, "#inside-attention .heads button")
    keys.press("ArrowRight")
    expect(summary).to_contain_text("head 1: “e” looks most at")
    tab_to(page, "#inside-attention [role=listbox] [role=option]")
    keys.press("ArrowLeft")
    expect(summary).to_contain_text("“b” looks most at")
    expect(page.locator("#inside-attention [role=option][aria-selected=true]")).to_have_text("b")

    tab_to(page, "#tab-inside", "Shift+Tab")
    keys.press("ArrowRight")
    expect(page.locator("#runs path.training")).to_have_count(1)
    tab_to(page, "#runs .list button")
    tab_to(page, "#runs .run svg")
    reading = page.locator("#runs .reading")
    keys.press("End")
    expect(reading).to_contain_text("validation")
    at_end = reading.inner_text()
    assert page.evaluate("document.activeElement.getAttribute('aria-valuetext')") == at_end
    keys.press("ArrowLeft")
    expect(reading).not_to_have_text(at_end)
    expect(reading).to_contain_text("at step")


@pytest.fixture
def hold(monkeypatch):
    """Function of an engine, which from then on waits after the first tokens of each batch until the event is set."""

    def hold(engine):
        go, decode = threading.Event(), engine.serving.decode

        def waiting(model, request):
            for chunk in decode(model, request):
                yield chunk
                assert go.wait(SECONDS)

        monkeypatch.setattr(engine.serving, "decode", waiting)
        return go

    return hold


def test_stop_ends_the_generation(visit, served, hold):
    engine = served.engines["tiny-jax"]
    go = hold(engine)
    page = visit().page
    page.select_option("#complete select", "tiny-jax")
    page.fill("#complete textarea", "A")
    page.click("#complete button.go")
    expect(page.locator("#complete .column:visible .token").first).to_be_attached()
    assert engine.n_running == 1
    page.click("#complete button.stop")
    expect(page.locator("#complete .column:visible .status")).to_have_text("stopped")
    wait_until(lambda: engine.n_running == 0)  # while the batch is held
    go.set()
    expect(page.locator("#complete button.go")).to_be_enabled()
    assert page.locator("#complete form .error").inner_text() == ""


def test_errors_are_shown_where_they_happened(visit, monkeypatch):
    visit = visit()
    page = visit.page
    complete(page, top_p=3)
    expect(page.locator("#complete form .error")).to_contain_text("Top-p: ")
    page.fill("#complete-top_p", "")
    page.evaluate("document.querySelector('#complete-max_new_tokens').max = 9999")
    complete(page, max_new_tokens=5000)
    expect(page.locator("#complete form .error")).to_contain_text("5000 more were requested")
    monkeypatch.setattr(agreement, "MOST_COMPARED", 4)
    complete(page)
    expect(page.locator("#complete .agreement .error")).to_contain_text("error bounds are derived for up to 4")
    expect(page.locator("#complete .details")).to_have_text("The logits were not compared.")
    complete(page, top_p=3)
    page.click("#tab-inside")
    compute(page, "attention", "x" * 300)
    expect(page.locator("#inside-attention .error")).to_contain_text("shorten it")
    expect(page.locator("#complete form .error")).not_to_have_text("")
    compute(page, "attention", "x")
    expect(page.locator("#inside-attention .error")).to_have_text("")
    visit.forget_refusals()


def test_every_view_of_a_text(visit, served):
    visit = visit()
    page = visit.page
    page.click("#tab-inside")
    compute(page, "loss")
    assert "".join(page.locator("#inside-loss .token").all_text_contents()) == TEXT
    expect(page.locator("#inside-loss .summary")).to_contain_text("nats per token")
    page.locator("#inside-loss .token").nth(3).click()
    page.wait_for_selector("#inside-loss .inspector[data-drawn]")

    page.click("#inside [data-view=attention]")  # computed at once, because another view of this text was
    heads = page.locator("#inside-attention .heads button")
    expect(heads).to_have_count(4)
    summary = page.locator("#inside-attention .summary")
    expect(summary).to_contain_text("Layer 0, head 0")
    heads.nth(2).click()
    expect(summary).to_contain_text("head 2")
    page.locator("#inside-attention .token").nth(4).hover()
    expect(summary).to_contain_text("“a” looks most at")
    page.select_option("#inside-attention select", "2")
    expect(summary).to_contain_text("Layer 2, head 2")
    painted = page.locator("canvas.matrix").evaluate(
        "(canvas) => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.some((x) => x > 0)"
    )
    assert painted

    compute(page, "lens")
    cells = page.locator("#inside-lens .cell")
    assert cells.count() == 4 * (len(TEXT) + 1)
    cells.nth(7).click()
    expect(page.locator("#inside-lens .summary")).to_contain_text("rank")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#inside-lens .cell[aria-pressed=true]")).to_have_attribute("data-row", "1")

    compute(page, "attribution")
    assert page.locator("#inside-attribution .parts tr").count() == 2 + 2 * 3
    text = page.locator("#inside-attribution .summary").inner_text()
    logit, total = re.findall(r"-?\d+\.\d+", text)
    assert float(logit) == pytest.approx(float(total), abs=2e-3)
    page.select_option("#inside-attribution select[name=minus]", index=2)
    expect(page.locator("#inside-attribution .summary")).to_contain_text("minus that of")
    page.select_option("#inside-attribution select[name=position]", "3")
    expect(page.locator("#inside-attribution .summary")).not_to_contain_text("minus that of")

    compute(page, "ablation")
    cells = page.locator("#inside-ablation .cell")
    assert cells.count() == 3 * 5
    cells.nth(6).click()
    expect(page.locator("#inside-ablation .summary")).to_contain_text("without head 1 of layer 1")
    assert page.locator("#inside-ablation .top").count() == 2
    page.select_option("#inside-ablation select[name=position]", "2")
    expect(page.locator("#inside-ablation .summary")).to_contain_text(f"after “{TEXT[1]}”, without")
    page.select_option("#inside-ablation select[name=replacement]", "mean")
    expect(page.locator("#inside-ablation select[name=position]")).to_have_value("2")

    page.click("#inside [data-view=patching]")
    page.fill("#inside textarea[name=corrupted]", "ab")
    compute(page, "patching")
    expect(page.locator("#inside-patching .error")).to_contain_text("write prompts of the same number of tokens")
    clean, corrupted = prompts_that_part(served)
    page.fill("#inside textarea[name=corrupted]", corrupted)
    compute(page, "patching", clean)
    assert page.locator("#inside-patching .cell").count() == 3 * (len(clean) + 1)
    # At the last position of the last layer everything is restored.
    assert page.locator("#inside-patching .cell").last.inner_text() == "1.00"
    page.locator("#inside-patching .cell").last.click()
    expect(page.locator("#inside-patching .summary")).to_contain_text("100.0% restored")
    assert page.locator("#inside-patching .top").count() == 2
    visit.forget_refusals()


def prompts_that_part(served):
    """Two prompts of as many tokens, after which the model predicts different tokens."""
    engine = served.engines["tiny-jax"]
    first = {}
    for text in ("th", "q ", "we", " I", "\n\n", "st", "ou", "xy"):
        [[*_, token]] = engine.backend.generate(engine.model, [[256, *text.encode()]], 1, temperature=0)
        for other, known in first.items():
            if known != token:
                return text, other
        first[text] = token
    raise AssertionError(first)


def test_a_run_is_followed_while_it_trains(visit, runs):
    page = visit().page
    complete(page)
    page.locator("#complete .token").first.click()
    page.wait_for_selector("#complete .inspector[data-drawn]")
    page.wait_for_selector("#complete .details[data-share]")
    page.click("#tab-inside")
    for view in ("loss", "attention", "lens", "attribution", "ablation"):
        compute(page, view)
    page.click("#tab-runs")
    run = page.locator("#runs .run")
    expect(run.locator("h3")).to_have_text("growing2")
    page.get_by_role("button", name="growing", exact=True).click()
    expect(run.locator("h3")).to_have_text("growing")
    expect(page.locator("#runs tr[aria-current] th")).to_have_text(["growing"])
    expect(run.locator("path.training")).to_have_count(1)
    before = run.locator("path.training").get_attribute("d")
    last = page.locator("#runs select[name=step] option").count()
    metrics = runs / "growing" / "metrics.jsonl"
    step = json.loads(metrics.read_text().splitlines()[-1])["step"]
    with metrics.open("a") as file:
        file.write("".join(json.dumps({"step": step + n, "loss": 2.0 + n / 10}) + "\n" for n in (1, 2, 3)))
    with (runs / "growing" / "samples.txt").open("a") as file:
        file.write(f"--- step {step + 3} ---\n<b>bold</b>\n\n")
    expect(page.locator("#runs select[name=step] option")).to_have_count(last + 1)
    expect(run.locator(".samples pre")).to_have_text("<b>bold</b>")  # the newest samples are followed
    assert run.locator("path.training").get_attribute("d") != before
    run.locator("svg").hover()
    expect(run.locator(".reading")).to_contain_text("training")
    page.click("#runs .load button")
    expect(run.locator(".loaded")).to_contain_text("now use step")
    expect(page.locator("h1")).to_contain_text("growing, step")
    # Nothing is left of what the weights before have computed.
    for selector in (".token", ".cell", ".heads button", "table.parts", ".top", ".inspector[data-drawn]", "circle"):
        expect(page.locator(f"#complete {selector}, #inside {selector}")).to_have_count(0)
    expect(page.locator("#complete .verdict")).to_have_text("\u00a0")
    page.click("#tab-inside")
    expect(page.locator("#inside-ablation .summary")).to_contain_text("What changes without one head")
    compute(page, "lens")
    expect(page.locator("#inside-lens .cell").first).to_be_visible()
    page.click("#tab-runs")
    # The other run has markup for a name.
    page.get_by_role("button", name="<img").click()
    expect(run.locator("h3")).to_have_text("<img src=x onerror=alert(1)>")


def test_where_backends_part_the_margin_is_shown(visit, run_folder):
    """A planted difference of weights makes the tokens differ, and the logits leave their bound."""

    def changed(weights):
        noise = probing_weights(new_config(weights, run_folder), seed=1)
        return {name: array + 0.3 * noise[name].astype(array.dtype) for name, array in weights.items()}

    engines = {"tiny-jax": new_engine("jax", run_folder), "tiny-torch": new_engine("torch", run_folder, changed)}
    with serving(engines) as address:
        page = visit(address).page
        complete(page, max_new_tokens=14)
        expect(page.locator("#complete .verdict")).to_have_text(re.compile(r"^equal: the first \d+ of 14 tokens$"))
        expect(page.locator("#complete .margin")).to_contain_text("from the end of the interval of")
        page.wait_for_selector("#complete .details[data-share]")
        assert float(page.locator("#complete .details").get_attribute("data-share")) > 1
        assert page.locator("#complete circle.outside").count() > 0
        complete(page, max_new_tokens=14, temperature=0)
        expect(page.locator("#complete .margin")).to_contain_text("between the two largest logits")
        complete(page, max_new_tokens=14, temperature=0, repetition_penalty=3)
        verdict = page.locator("#complete .verdict")
        expect(verdict).to_have_text(re.compile(r"^equal: the first \d+ of 14 tokens$"))
        n_equal = int(re.search(r"\d+", verdict.inner_text())[0])
        shown = page.locator("#complete .margin")
        expect(shown).to_contain_text("between the two largest logits")
        for name, engine in engines.items():
            ids = list(TEXT.encode())
            if n_equal:
                [ids] = engine.backend.generate(engine.model, [ids], n_equal, temperature=0, repetition_penalty=3)
            subject = inspect.Subject.of(engine.backend, engine.model, engine.tokenizer)
            z = inspect.token_logits(subject, ids)[-1].copy()
            seen = sorted(set(ids))
            z[seen] = np.where(z[seen] > 0, z[seen] / 3, z[seen] * 3)
            second, first = np.sort(z)[-2:]
            margin = float(re.search(rf"{name}: (\S+) between", shown.inner_text())[1])
            assert margin == pytest.approx(first - second, abs=2e-3), name


def new_config(weights, run_folder):
    from parity.training.runs import RunFolder, read_run

    return read_run(RunFolder(run_folder)).model


@pytest.fixture
def tuned():
    """(an engine whose model continues everything with "aaa", the prompts that it had)"""
    config = dataclasses.replace(TINY, n_vocab=257, n_ctx=256)
    model = gpt_torch.GPTModel(config)
    weights = {name: np.zeros_like(array) for name, array in gpt_torch.export_weights(model).items()}
    weights["ln_f.bias"] += 1
    weights["wte.weight"][ord("a")] = 1
    gpt_torch.load_weights(model, weights)
    engine = Engine("tuned", gpt_torch, gpt_torch.serving, model, load_tokenizer("bytes"), template="plain")
    asked = []
    submit = engine.submit

    def noting(rows, *rest):
        asked.append(bytes(id for id in rows[0].prompt if id < 256).decode())
        return submit(rows, *rest)

    engine.submit = noting
    return engine, asked


def say(page, text):
    page.fill("#chat textarea", text)
    page.keyboard.press("Enter")


def test_a_conversation_with_a_tuned_model(visit, tuned):
    """What the model is asked is the rendered conversation, with all turns."""
    engine, asked = tuned
    with serving({"tuned": engine}) as address:
        page = visit(address).page
        page.click("#tab-chat")
        page.fill("#chat-max_new_tokens", "5")
        for number, text in enumerate(("<b>One</b>", "Two"), 1):
            say(page, text)
            expect(page.locator("#chat .conversation li")).to_have_count(number)
            expect(page.locator("#chat button.stop")).to_be_disabled()
            expect(page.locator("#chat textarea")).to_have_value("")
        turns = page.locator("#chat .conversation li")
        assert turns.nth(0).locator("p").all_inner_texts() == ["<b>One</b>", "aaaaa"]
        first = "### Instruction:\n<b>One</b>\n\n### Response:\n"
        assert asked == [first, f"{first}aaaaa### Instruction:\nTwo\n\n### Response:\n"]
        page.click("#chat button.new")
        expect(page.locator("#chat .conversation li")).to_have_count(0)


def test_a_conversation_is_stopped_and_begun_again_during_an_answer(visit, tuned, hold):
    engine, asked = tuned
    go = hold(engine)
    with serving({"tuned": engine}) as address:
        page = visit(address).page
        page.click("#tab-chat")
        say(page, "One")
        answers = page.locator("#chat .conversation p:last-child")
        expect(answers).to_have_text("a")
        expect(page.locator("#chat textarea")).to_have_value("")
        page.fill("#chat textarea", "typed meanwhile")
        page.click("#chat button.stop")
        expect(page.locator("#chat button.stop")).to_be_disabled()
        expect(page.locator("#chat textarea")).to_have_value("typed meanwhile")
        wait_until(lambda: engine.n_running == 0)
        say(page, "Two")  # after what the model has said until it was stopped
        wait_until(lambda: len(asked) == 2)
        assert asked[1].startswith(f"{asked[0]}a")
        go.set()
        expect(page.locator("#chat button.stop")).to_be_disabled()
        go.clear()
        say(page, "Three")
        expect(answers.nth(2)).to_have_text("a")
        page.click("#chat button.new")
        expect(page.locator("#chat .conversation li")).to_have_count(0)
        expect(page.locator("#chat button.stop")).to_be_disabled()
        go.set()
        say(page, "Four")
        expect(page.locator("#chat .conversation li")).to_have_count(1)
        expect(page.locator("#chat button.stop")).to_be_disabled()
        assert asked[-1] == "### Instruction:\nFour\n\n### Response:\n"


def test_a_server_with_a_key_asks_for_it(browser, run_folder):
    with serving({"tiny-torch": new_engine("torch", run_folder)}, api_key="secret") as address:
        visit = Visit(browser, address)
        page = visit.page
        page.fill("#key input", "wrong")
        page.click("#key button")
        expect(page.locator("#key .error")).to_contain_text("--api-key")
        page.fill("#key input", "secret")
        page.click("#key button")
        page.wait_for_selector("html[data-ready]")
        complete(page)
        assert page.locator("#complete .token").count() > 0
        assert page.locator("#complete .agreement").is_hidden()
        visit.forget_refusals()
        visit.close()


CONTRAST = """(cases) => {
  const context = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
  const light = (layers) => {
    for (const [color, opacity] of layers) {
      context.globalAlpha = opacity;
      context.fillStyle = color;
      context.fillRect(0, 0, 1, 1);
    }
    const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map((x) => x / 255)
      .map((x) => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  return cases.map(([selector, property, pseudo]) => {
    const element = document.querySelector(selector);
    if (!element.checkVisibility()) throw new Error(`${selector} is hidden`);
    const {opacity} = getComputedStyle(element);
    const behind = [];
    const innermost = property === 'color' ? element : element.parentElement;
    for (let e = innermost; e; e = e.parentElement) {
      behind.unshift([getComputedStyle(e).backgroundColor, e === element ? opacity : 1]);
    }
    const [a, b] = [light(behind), light([...behind, [getComputedStyle(element, pseudo)[property], opacity]])];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_have_enough_contrast(visit, scheme):
    """WCAG AA: 4.5 for text, 3 for lines and the borders of inputs."""
    page = visit(viewport={"width": 1600, "height": 900}, color_scheme=scheme).page

    def check(least, *cases):
        found = dict(zip(cases, page.evaluate(CONTRAST, cases), strict=True))
        assert min(found.values()) >= least, found

    complete(page)
    page.wait_for_selector("#complete .details[data-share]")
    page.locator("#complete .token").first.click()
    page.wait_for_selector("#complete .inspector[data-drawn]")
    texts = ("h1", ".model-shape", ".legend", "#complete button.go", "#complete .given", "#complete .token")
    check(4.5, *((selector, "color") for selector in texts))
    check(4.5, *((f"#complete {selector}", "color") for selector in (".subject", "dt", ".alternatives td")))
    edges = ("#complete input", "#complete select", "#complete textarea", "#complete .inspector button")
    check(3, *((selector, "borderTopColor") for selector in edges))
    check(3, ("#complete svg .inside", "fill"), ("#complete svg .bound", "stroke"))
    check(3, ("#complete .bar", "backgroundColor"))
    page.click("#tab-inside")
    compute(page, "loss", "é\nab")
    page.evaluate("document.querySelectorAll('.token').forEach((token) => token.style.setProperty('--tint', '70%'))")
    marks = ("#inside-loss .token.newline", "#inside-loss .token[data-mark]")
    check(4.5, *((selector, "color", "::before") for selector in marks), ("#inside-loss .token", "color"))
    compute(page, "attention", "é\nab")
    page.locator("#inside-attention .token").first.hover()
    later = "#inside-attention .token.later"
    check(4.5, (later, "color"), *((f"{later}{mark}", "color", "::before") for mark in (".newline", "[data-mark]")))
    page.click("#tab-runs")
    expect(page.locator("#runs path.validation")).to_have_count(1)
    check(3, ("#runs path.training", "stroke"), ("#runs path.validation", "stroke"))


@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_layout_fits_and_does_not_jump(visit, width, scheme):
    page = visit(viewport={"width": width, "height": 900}, color_scheme=scheme).page
    observe = """() => {
      window.shift = 0;
      const add = (entries) => { for (const entry of entries) window.shift += entry.value; };
      window.shifts = new PerformanceObserver((list) => add(list.getEntries()));
      window.shifts.observe({type: 'layout-shift', buffered: false});
      window.total = async () => {
        for (let i = 0; i < 3; i += 1) await new Promise(requestAnimationFrame); // what was changed is drawn
        add(window.shifts.takeRecords());
        return window.shift;
      };
    }"""
    page.evaluate(observe)
    complete(page)
    page.wait_for_selector("#complete .details[data-share]")
    page.locator("#complete .column .token").nth(1).click()
    page.wait_for_selector("#complete .inspector[data-drawn]")
    page.fill("#complete-slider-topP", "0.3")
    assert page.evaluate("window.total()") < 0.01
    for tab in ("complete", "inside", "runs"):
        page.click(f"#tab-{tab}")
        if tab == "inside":
            for view in ("loss", "attention", "lens", "attribution", "ablation"):
                compute(page, view)
                assert page.evaluate("document.documentElement.scrollWidth") <= width, view
        assert page.evaluate("document.documentElement.scrollWidth") <= width, tab
    smallest = """() => Math.min(...[...document.querySelectorAll('#runs *')]
      .filter((element) => element.childElementCount === 0 && element.textContent.trim() && element.checkVisibility())
      .map((element) => parseFloat(getComputedStyle(element).fontSize) * (element.getScreenCTM?.().a ?? 1)))"""
    expect(page.locator("#runs svg path.training")).to_have_count(1)
    assert page.evaluate(smallest) >= 12  # pixels, also in charts
