"""The check of a built site: no link within it is dead, and no page loads anything from another host."""

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

# {tag: its attribute with the address of a file that a browser loads with the page}
ASSETS = {
    "img": "src",
    "script": "src",
    "link": "href",
    "source": "src",
    "iframe": "src",
    "video": "src",
    "embed": "src",
}


class Page(HTMLParser):
    """What a page contains.

    Attributes:
        anchors: The targets within the page.
        links: The addresses that it links to.
        assets: The addresses that it loads.
    """

    def __init__(self, text: str):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.assets: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        self.anchors.update(values[name] for name in ("id", "name") if name in values)
        if tag == "a" and "href" in values:
            self.links.add(values["href"])
        if tag in ASSETS and ASSETS[tag] in values:
            self.assets.add(values[ASSETS[tag]])


def problems(site: Path) -> list[str]:
    """Return the dead links, missing files and foreign assets of a site, one line each."""
    pages = {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    lines = []
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        lines += [f"{name}: {address} is loaded from another host" for address in page.assets if _is_foreign(address)]
        for address in sorted(page.links | page.assets):
            target = urlsplit(address)
            if _is_foreign(address) or target.scheme:
                continue
            file = (path.parent / unquote(target.path)).resolve() if target.path else path
            if not file.is_file():
                lines.append(f"{name}: {address} leads to no file")
            elif target.fragment and file in pages and unquote(target.fragment) not in pages[file].anchors:
                lines.append(f"{name}: {address} leads to no anchor")
    for path in sorted(site.rglob("*.css")):
        if "url(http" in path.read_text(encoding="utf-8").replace('"', "").replace("'", ""):
            lines.append(f"{path.relative_to(site)}: loads from another host")
    return lines


def _is_foreign(address: str) -> bool:
    return bool(urlsplit(address).netloc)


def check(app: Sphinx, exception: Exception | None) -> None:
    """Check what the builder has written.

    Raises:
        ExtensionError: For a dead link and for an asset of another host; the message lists all.
    """
    if exception is None and app.builder.format == "html" and (lines := problems(Path(app.outdir))):
        raise ExtensionError("\n".join(["the site is not complete in itself:", *lines]))


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the check."""
    app.connect("build-finished", check)
    return {"parallel_read_safe": True}
