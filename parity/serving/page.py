"""The routes of the page."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from starlette.routing import BaseRoute

from parity.serving.engine import Engine


def routes(engines: Mapping[str, Engine], runs: Sequence[Path]) -> list[BaseRoute]:
    """Return the routes of the page and of what it requests.

    Args:
        engines: {name of the model in the API: engine}.
        runs: Run folders that the page shows.
    """
    return []
