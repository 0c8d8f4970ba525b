"""The HTML page of a parity report, with its pictures inside the file."""

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np

from parity.comparison.report import COLUMNS, Row, by_section
from parity.figures import new_figure

_HEAD = """<!doctype html><meta charset='utf-8'><title>parity report</title>
<style>
body { font-family: sans-serif; margin: 2em }
table { border-collapse: collapse; margin: 1em 0 }
td, th { padding: .2em .6em; border-bottom: 1px solid #ddd; text-align: right; font-variant-numeric: tabular-nums }
td:first-child, th:first-child, td:last-child { text-align: left }
.failed { background: #fdd }
</style>"""


def html_page(title: str, verdict: str, rows: Sequence[Row]) -> str:
    """Render the rows of a report as one self-contained HTML file.

    Args:
        title: What was compared, in one line.
        verdict: The result, in one line.
        rows: All rows, in order.
    """
    parts = [_HEAD, f"<h1>Parity report</h1><p>{escape(title)}</p><p><b>{escape(verdict)}</b></p>"]
    for section, members in by_section(rows).items():
        parts.append(f"<h2>{escape(section)}</h2>")
        if len(members) > 2:
            parts.append(f"<img alt='errors and bounds' src='data:image/png;base64,{_picture(members)}'>")
        parts.append("<table><tr>" + "".join(f"<th>{escape(name)}</th>" for name in (*COLUMNS, "detail")) + "</tr>")
        for row in members:
            cells = "".join(f"<td>{escape(text)}</td>" for text in (*row.cells(), row.detail))
            parts.append(f"<tr>{cells}</tr>" if row.ok else f"<tr class='failed'>{cells}</tr>")
        parts.append("</table>")
    return "\n".join(parts) + "\n"


def _picture(rows: Sequence[Row]) -> str:
    """Plot the errors and bounds of a section, and return the PNG in base64."""
    figure = new_figure(figsize=(10, 3.5), layout="constrained")
    axes = figure.subplots()
    x = np.arange(len(rows))
    axes.plot(x, [row.bound for row in rows], color="black", label="bound")
    axes.plot(x, [row.difference for row in rows], ".", label="|A-B|")
    for label, errors in (("A", [row.error_a for row in rows]), ("B", [row.error_b for row in rows])):
        present = [error for error in errors if error is not None]
        if len(present) == len(rows):
            axes.plot(x, present, "_", label=f"|{label}-ref|")
    axes.set_yscale("log")
    step = max(1, len(rows) // 30)
    axes.set_xticks(x[::step], [row.name for row in rows][::step], rotation=90, fontsize=6)
    axes.set_ylabel("worst error")
    axes.legend(fontsize=7, ncols=4, loc="lower right")
    stream = io.BytesIO()
    figure.savefig(stream, dpi=110)
    return base64.b64encode(stream.getvalue()).decode()
