"""The page in a real browser: every feature by clicking and by keyboard, without a console error or another host."""

import dataclasses
import json
import re
import shutil
from types import SimpleNamespace

import pytest
from playwright.sync_api import expect, sync_playwright
from support.browser import launch, needs_browser
from support.models import TINY, probing_weights
from support.sampling_rules import RULES, check_rules, rule_cases
from support.served import run_engine, serving

import gpt_torch.serving
from parity.data.tokenizer import load_tokenizer
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
        page.locator(f"#slider-{name}").first.fill(value)
    assert rows.nth(0).inner_text() != before
    kept = int(fact(page, "kept").split()[0])
    assert 1 <= kept <= 5
    assert page.locator("#complete .alternatives tr.dropped").count() >= 10 - kept
    page.locator("#slider-temperature").first.fill("0")
    assert rows.nth(0).locator("td").nth(2).inner_text() == "100.0%"
    page.click("#complete .inspector button")
    assert rows.nth(0).inner_text() == before
    assert len(visit.requests) == n_requests


def test_the_sliders_follow_the_rules_in_this_browser(visit):
    page = visit().page
    program = f"(cases) => import('/static/sampling.js').then((rules) => ({RULES})(cases, rules))"
    check_rules(page.evaluate(program, rule_cases()))


def test_the_page_works_with_the_keyboard_alone(visit):
    page = visit().page
    page.focus("#tab-complete")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#inside")).to_be_visible()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Tab")
    page.keyboard.press("ControlOrMeta+A")
    page.keyboard.type("To be")
    page.focus("#complete-max_new_tokens")
    page.keyboard.press("ControlOrMeta+A")
    page.keyboard.type("9")
    page.keyboard.press("Enter")
    expect(page.locator("#complete .verdict")).to_have_text(re.compile("^equal"))
    page.locator("#complete .column .token").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#complete .token[aria-selected=true]")).to_have_attribute("data-index", "2")
    page.keyboard.press("End")
    last = page.locator("#complete .column").first.locator(".token").count() - 1
    expect(page.locator("#complete .token[aria-selected=true]")).to_have_attribute("data-index", str(last))
    page.wait_for_selector("#complete .inspector[data-drawn]")
    page.focus("#slider-temperature")
    page.keyboard.press("Home")
    assert page.locator("#complete .sliders output").first.inner_text() == "greedy"
    # Each control can be reached, and shows that it has the focus.
    page.focus("#tab-complete")
    for _ in range(6):
        page.keyboard.press("Tab")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"


def test_stop_ends_the_generation(visit, served):
    page = visit().page
    page.select_option("#complete select", "tiny-jax")
    # The next completion streams until it is stopped, however fast the machine is.
    endless = """() => {
      const fetched = window.fetch;
      window.fetch = (path, options) => path !== 'page/complete' ? fetched(path, options) : new Promise((resolve) => {
        const encode = (data) => new TextEncoder().encode(`data: ${JSON.stringify(data)}\\n\\n`);
        resolve(new Response(new ReadableStream({start(controller) {
          controller.enqueue(encode({prompt: [65]}));
          controller.enqueue(encode({tokens: [{id: 66, text: 'B', logprob: -1}], finish_reason: null}));
          options.signal.addEventListener('abort', () => controller.error(options.signal.reason));
        }})));
      });
    }"""
    page.evaluate(endless)
    page.fill("#complete textarea", "A")
    page.click("#complete button.go")
    expect(page.locator("#complete .column:visible .token")).to_have_count(1)
    page.click("#complete button.stop")
    expect(page.locator("#complete .column:visible .status")).to_have_text("stopped")
    expect(page.locator("#complete button.go")).to_be_enabled()
    assert page.locator("#complete form .error").inner_text() == ""


def test_errors_are_shown_where_they_happened(visit):
    visit = visit()
    page = visit.page
    complete(page, top_p=3)
    expect(page.locator("#complete form .error")).to_contain_text("Top-p: ")
    page.fill("#complete-top_p", "")
    page.evaluate("document.querySelector('#complete-max_new_tokens').max = 9999")
    complete(page, max_new_tokens=5000)
    expect(page.locator("#complete form .error")).to_contain_text("5000 more were requested")
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
    page.click("#tab-runs")
    page.get_by_role("button", name="growing").click()
    run = page.locator("#runs .run")
    expect(run.locator("h3")).to_have_text("growing")
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


def new_config(weights, run_folder):
    from parity.training.runs import RunFolder, read_run

    return read_run(RunFolder(run_folder)).model


def test_a_conversation_with_a_tuned_model(visit):
    """The model is not a good one; what it is asked is the rendered conversation, with all turns."""
    config = dataclasses.replace(TINY, n_vocab=257, n_ctx=256)
    model = gpt_torch.GPTModel(config)
    engine = Engine("tuned", gpt_torch, gpt_torch.serving, model, load_tokenizer("bytes"), template="plain")
    asked = []
    submit = engine.submit
    engine.submit = lambda rows, *rest: (asked.append(rows[0].prompt), submit(rows, *rest))[1]
    with serving({"tuned": engine}) as address:
        visit = visit(address)
        page = visit.page
        page.click("#tab-chat")
        page.fill("#chat-max_new_tokens", "5")
        page.fill("#chat-temperature", "1")
        for number, text in enumerate(("<b>One</b>", "Two"), 1):
            page.fill("#chat textarea", text)
            page.keyboard.press("Enter")
            expect(page.locator("#chat .conversation li")).to_have_count(number)
            expect(page.locator("#chat button.stop")).to_be_disabled()
            expect(page.locator("#chat textarea")).to_have_value("")
        turns = page.locator("#chat .conversation li")
        assert turns.nth(0).locator("p").nth(0).inner_text() == "<b>One</b>"
        answer = turns.nth(0).locator("p").nth(1).inner_text()
        assert answer
        first, second = (bytes(ids).decode("utf-8", "replace") for ids in ([i for i in a if i < 256] for a in asked))
        assert first == "### Instruction:\n<b>One</b>\n\n### Response:\n"
        assert second.startswith(first)
        assert second.endswith("### Instruction:\nTwo\n\n### Response:\n")
        page.click("#chat button.new")
        expect(page.locator("#chat .conversation li")).to_have_count(0)
        visit.close()
        visit.problems = []


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


@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_layout_fits_and_does_not_jump(visit, width, scheme):
    page = visit(viewport={"width": width, "height": 900}, color_scheme=scheme).page
    contrast = """() => {
      const channels = (color) => color.match(/[\\d.]+/g).slice(0, 3).map((x) => x / 255)
        .map((x) => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
      const light = (color) => { const [r, g, b] = channels(color); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
      const paper = light(getComputedStyle(document.body).backgroundColor);
      return ['h1', '.model-shape', '.legend', 'button.go'].map((selector) => {
        const style = getComputedStyle(document.querySelector(selector));
        const back = style.backgroundColor.includes('0, 0, 0, 0') ? paper : light(style.backgroundColor);
        const text = light(style.color);
        return (Math.max(text, back) + 0.05) / (Math.min(text, back) + 0.05);
      });
    }"""
    assert min(page.evaluate(contrast)) >= 4.5  # WCAG AA
    observe = """() => { window.shift = 0; new PerformanceObserver((list) => {
      for (const entry of list.getEntries()) window.shift += entry.value;
    }).observe({type: 'layout-shift', buffered: false}); }"""
    page.evaluate(observe)
    complete(page)
    page.wait_for_selector("#complete .details[data-share]")
    page.locator("#complete .column .token").nth(1).click()
    page.wait_for_selector("#complete .inspector[data-drawn]")
    page.locator("#slider-topP").first.fill("0.3")
    page.wait_for_timeout(200)
    assert page.evaluate("window.shift") < 0.01
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
