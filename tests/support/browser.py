"""The browser of this machine, for tests of pages."""

import os
import shutil

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
EXECUTABLE = next(filter(None, map(shutil.which, BROWSERS)), None)
ARGUMENTS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run",
]  # fmt: skip

_ABSENT = f"there is no browser: none of {', '.join(BROWSERS)} is on the path"
# On GitHub, where CI is set, the tests fail instead.
needs_browser = pytest.mark.skipif(EXECUTABLE is None and "CI" not in os.environ, reason=_ABSENT)


def launch(playwright):
    """Start the browser, without a window."""
    assert EXECUTABLE is not None, _ABSENT
    return playwright.chromium.launch(executable_path=EXECUTABLE, args=ARGUMENTS, headless=False)
