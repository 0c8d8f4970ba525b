"""Measurements as a table on the terminal, as JSON and as Markdown."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from measure.timing import Timings
from parity.console import PlainConsole


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The timings of several peers; the others are compared with the first one."""

    title: str
    call: str
    """Name of one call: step, load, ..."""
    amount: float
    """Amount that one call processes, in `unit`."""
    unit: str
    """Unit of the amount: tokens, MB, ..."""
    peers: Mapping[str, Timings]
    notes: Sequence[str] = ()
    """Lines below the table."""

    @property
    def columns(self) -> list[str]:
        first = next(iter(self.peers))
        return ["", f"ms per {self.call}", "min to max", f"{self.unit}/s", f"time / {first}", "peak MB"]

    @property
    def rows(self) -> list[list[str]]:
        first = next(iter(self.peers.values())).median
        return [
            [name, f"failed: {timings.failure}", "", "", "", ""]
            if timings.failure
            else [
                name,
                f"{timings.median * 1e3:,.0f}",
                f"{min(timings.seconds) * 1e3:,.0f} to {max(timings.seconds) * 1e3:,.0f}",
                f"{self.amount / timings.median:,.1f}",
                f"{timings.median / first:.2f}" if number else "",
                f"{timings.peak / 1e6:,.0f}" if timings.peak else "",
            ]
            for number, (name, timings) in enumerate(self.peers.items())
        ]

    def show(self, console: PlainConsole) -> None:
        table = Table(Column(self.columns[0], no_wrap=True), *self.columns[1:], title=self.title)
        for row in self.rows:
            table.add_row(*row)
        console.print(table)
        for note in self.notes:
            console.print(note)

    def to_json(self) -> dict[str, Any]:
        first = next(iter(self.peers.values())).median
        peers = {
            name: {"failure": timings.failure}
            if timings.failure
            else {
                "median_s": timings.median,
                "min_s": min(timings.seconds),
                "max_s": max(timings.seconds),
                "seconds": timings.seconds,
                "rate": self.amount / timings.median,
                "ratio": timings.median / first,
                "peak_bytes": timings.peak,
            }
            for name, timings in self.peers.items()
        }
        return {"title": self.title, "call": self.call, "unit": self.unit, "peers": peers, "notes": list(self.notes)}

    def to_markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        return f"## {self.title}\n\n{table}\n" + "".join(f"\n{note}\n" for note in self.notes)


def write(folder: Path, command: str, machine: str, measurements: Sequence[Measurement]) -> None:
    """Write results.json and results.md into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = {"command": command, "machine": machine, "measurements": [m.to_json() for m in measurements]}
    (folder / "results.json").write_text(json.dumps(entries, indent=2) + "\n")
    head = f"# `{command}`\n\n{machine}. Medians; the peers took turns.\n\n"
    (folder / "results.md").write_text(head + "\n".join(m.to_markdown() for m in measurements))
