"""The documentation site: it is built without a warning, describes everything, and is complete in itself."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from playwright.sync_api import sync_playwright
from public_names import MODULES, public_names
from support.browser import launch, needs_browser
from support.runs import ROOT

from parity.cli import argument_parser

pytestmark = [pytest.mark.docs, pytest.mark.timeout(1800)]

WIDTHS = (390, 1400)  # of a phone and of a laptop, in CSS pixels
NOTEBOOK = """# %% [markdown]
# # A notebook

# %%
assert {condition}
print("it was " "executed")
"""


def build(source, target, *options):
    """Build a site as `make docs` does; returns the exit status and what was printed."""
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", *options, source, target]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=1700)
    return SimpleNamespace(status=done.returncode, output=done.stdout + done.stderr)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site with all notebooks executed, which takes minutes."""
    pytest.importorskip("sphinx", reason="needs the extra docs")
    folder = tmp_path_factory.mktemp("site")
    result = build(ROOT / "docs", folder)
    assert result.status == 0, result.output  # kernels print, so the output may not be empty
    return folder


def test_every_public_name_is_described(site):
    from sphinx.util.inventory import InventoryFile

    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="").data
    described = {name for kind, entries in inventory.items() if kind.startswith("py:") for name in entries}
    expected = {f"{module}.{name}" for module in MODULES for name in public_names(module)}
    assert not expected - described
    assert {f"{module}.__call__" for module in ("gpt_jax.GPTModel",)} <= described
    pages = {module: (site / "reference" / "python" / f"{module}.html").read_text() for module in MODULES}
    assert "The largest number" not in pages["parity.config"]
    assert "Number of tokens in the vocabulary: the tokenizer" in pages["parity.config"]  # a colon ends no type


def test_every_option_is_described(site):
    page = (site / "reference" / "command-line.html").read_text()
    scripts = [path for path in (ROOT / "scripts").glob("*.py") if '"__main__"' in path.read_text()]
    assert len(scripts) > 15
    for path in scripts:
        assert f'<section id="{path.stem.replace("_", "-")}-py">' in page
        if path.stem == "eval_harness":  # has the options of another program
            continue
        arguments = importlib.import_module(path.stem).Args
        parser = argument_parser(arguments, arguments() if path.stem.startswith("train_") else None)
        options = [option for action in parser._actions for option in action.option_strings]
        for option in set(options) - {"-h", "--help"}:
            assert f'id="cmdoption-scripts-{path.stem}.py-{option.lstrip("-")}"' in page, (path.stem, option)


def test_every_page_of_the_documentation_is_in_the_site(site):
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert not {page for page in pages if not (site / page).is_file()}
    sidebar = (site / "index.html").read_text()
    for page in pages - {Path("index.html")}:
        assert f'href="{page}"' in sidebar, page


def test_notebooks_show_what_they_print_and_draw(site):
    sources = [ROOT / "docs" / "notebook.py", *(ROOT / "docs" / "notebooks").glob("*.py")]
    notebooks = [path.relative_to(ROOT / "docs").with_suffix(".html") for path in sources]
    assert len(notebooks) > 5
    for name in notebooks:
        page = (site / name).read_text()
        assert 'class="cell_output' in page, name
        assert "_images/" in page, name


@needs_browser
def test_no_page_is_wider_than_the_screen_or_loads_from_elsewhere(site):
    names = [path.relative_to(site) for path in sorted(site.rglob("*.html")) if "_static" not in path.parts]
    wide, foreign = [], []
    with sync_playwright() as playwright:
        browser = launch(playwright)
        for width in WIDTHS:
            page = browser.new_page(viewport={"width": width, "height": 900})
            page.on("request", lambda request: request.url.startswith("file:") or foreign.append(request.url))
            page.on("pageerror", lambda error: foreign.append(str(error)))
            for name in names:
                page.goto((site / name).as_uri())
                if page.evaluate("document.documentElement.scrollWidth") > width:
                    wide.append(f"{name} at {width}")
            page.close()
        browser.close()
    assert len(names) > 40
    assert not wide
    assert not foreign


def test_dead_links_and_foreign_assets_are_found(site, tmp_path):
    pytest.importorskip("sphinx", reason="needs the extra docs")
    from site_check import problems

    shutil.copytree(site, tmp_path / "site")
    assert problems(tmp_path / "site") == []
    page = tmp_path / "site" / "install.html"
    links = '<a href="absent.html">a</a><a href="index.html#absent">b</a><a href="https://example.org">c</a>'
    assets = '<img src="absent.png"><script src="https://example.org/x.js"></script>'
    page.write_text(page.read_text().replace("</body>", f"{links}{assets}</body>"))
    with (tmp_path / "site" / "_static" / "site.css").open("a") as file:
        file.write('@import url("https://example.org/font.css");')
    assert sorted(problems(tmp_path / "site")) == [
        "_static/site.css: loads from another host",
        "install.html: absent.html leads to no file",
        "install.html: absent.png leads to no file",
        "install.html: https://example.org/x.js is loaded from another host",
        "install.html: index.html#absent leads to no anchor",
    ]


@pytest.mark.parametrize(("condition", "status"), [("1 + 1 == 2", 0), ("1 + 1 == 3", 1)])
def test_notebooks_are_executed_and_may_fail(condition, status, tmp_path):
    pytest.importorskip("sphinx", reason="needs the extra docs")
    source = tmp_path / "docs"
    (source / "static").mkdir(parents=True)
    (source / "static" / "site.css").touch()
    (source / "index.py").write_text(NOTEBOOK.format(condition=condition))
    result = build(source, tmp_path / "site", "-c", ROOT / "docs")
    assert (result.status != 0) == status, result.output
    if status:
        assert "AssertionError" in result.output
    else:
        assert "it was executed" in (tmp_path / "site" / "index.html").read_text()
