"""Measurements as a table on the terminal, JSON, Markdown and a picture."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from measure.turns import Figures


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Peers beside the first of them, which is ours."""

    title: str
    unit: str
    """Of a call: step, load, ..."""
    amount: float
    """What a call does, in `of`"""
    of: str
    peers: Mapping[str, Figures]
    facts: Sequence[str] = ()
    """Lines below the table"""

    @property
    def columns(self) -> list[str]:
        return ["", f"ms a {self.unit}", "spread", f"{self.of}/s", "times ours", "peak MB"]

    @property
    def rows(self) -> list[list[str]]:
        ours = next(iter(self.peers.values())).median
        return [
            [
                name,
                f"{figures.median * 1e3:,.0f}",
                f"{min(figures.seconds) * 1e3:,.0f} to {max(figures.seconds) * 1e3:,.0f}",
                f"{self.amount / figures.median:,.1f}",
                f"{figures.median / ours:.2f}" if number else "",
                f"{figures.peak / 1e6:,.0f}" if figures.peak else "",
            ]
            for number, (name, figures) in enumerate(self.peers.items())
        ]

    def show(self, console: Console) -> None:
        table = Table(Column(self.columns[0], no_wrap=True), *self.columns[1:], title=self.title)
        for row in self.rows:
            table.add_row(*row)
        console.print(table)
        for fact in self.facts:
            console.print(fact, highlight=False)

    def to_json(self) -> dict[str, Any]:
        ours = next(iter(self.peers.values())).median
        peers = {
            name: {
                "median_s": figures.median,
                "min_s": min(figures.seconds),
                "max_s": max(figures.seconds),
                "seconds": figures.seconds,
                "rate": self.amount / figures.median,
                "ratio": figures.median / ours,
                "peak_bytes": figures.peak,
            }
            for name, figures in self.peers.items()
        }
        return {"title": self.title, "unit": self.unit, "of": self.of, "peers": peers, "facts": list(self.facts)}

    def to_markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        return f"## {self.title}\n\n{table}\n" + "".join(f"\n{fact}\n" for fact in self.facts)


def write(folder: Path, command: str, machine: str, measurements: Sequence[Measurement]) -> None:
    """results.json, results.md and results.png."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = {"command": command, "machine": machine, "measurements": [m.to_json() for m in measurements]}
    (folder / "results.json").write_text(json.dumps(entries, indent=2) + "\n")
    head = f"# `{command}`\n\n{machine}. Medians; the peers took turns.\n\n"
    (folder / "results.md").write_text(head + "\n".join(m.to_markdown() for m in measurements))
    _draw(folder / "results.png", measurements)


def _draw(target: Path, measurements: Sequence[Measurement]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    heights = [1.2 + 0.35 * len(m.peers) for m in measurements]
    figure, grid = plt.subplots(
        len(measurements), figsize=(9, sum(heights)), height_ratios=heights, layout="constrained", squeeze=False
    )
    for axes, measurement in zip(grid[:, 0], measurements, strict=True):
        names, figures = list(measurement.peers), list(measurement.peers.values())
        medians = [f.median * 1e3 for f in figures]
        spread = [
            [median - min(f.seconds) * 1e3 for f, median in zip(figures, medians, strict=True)],
            [max(f.seconds) * 1e3 - median for f, median in zip(figures, medians, strict=True)],
        ]
        colors = ["tab:blue"] + ["tab:gray"] * (len(names) - 1)
        axes.barh(names, medians, xerr=spread, color=colors, ecolor="black", capsize=2)
        axes.invert_yaxis()
        axes.set_xlabel(f"ms a {measurement.unit}, least to most")
        axes.set_title(measurement.title, fontsize=9)
    figure.savefig(target, dpi=120)
    plt.close(figure)
