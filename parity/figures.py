"""Matplotlib figures for files, without pyplot and independent of the backend that the environment selects."""

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(**options: Any) -> "Figure":
    """Return a figure that needs no backend and leaves the caller's backend unchanged.

    Args:
        options: Arguments of matplotlib.figure.Figure.
    """
    if "matplotlib" not in sys.modules and (backend := os.environ.pop("MPLBACKEND", None)) is not None:
        # matplotlib cannot be imported if MPLBACKEND names a backend that is not installed. Notebooks set it for all
        # programs that they start, and these may use another environment.
        try:
            import matplotlib
        finally:
            os.environ["MPLBACKEND"] = backend
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
    from matplotlib.figure import Figure

    return Figure(**options)
