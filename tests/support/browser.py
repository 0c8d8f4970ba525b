"""The browser of this machine, for tests of pages."""

import shutil

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
EXECUTABLE = next(filter(None, map(shutil.which, BROWSERS)), None)
ARGUMENTS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run",
]  # fmt: skip

needs_browser = pytest.mark.skipif(
    EXECUTABLE is None, reason=f"there is no browser: none of {', '.join(BROWSERS)} is on the path"
)


def launch(playwright):
    """Start the browser, without a window."""
    return playwright.chromium.launch(executable_path=EXECUTABLE, args=ARGUMENTS, headless=False)
