"""The results of protocols for people."""

from typing import Any

from parity.console import PlainConsole
from parity.evaluation.catalog import PROTOCOLS


def show(console: PlainConsole, result: dict[str, Any]) -> None:
    """Print the results of a protocol, one metric per line."""
    source = result["data"]
    details = [
        f"{'the first ' if result['limit'] else ''}{result['items']:,} items",
        *["each with another one's context (control)"] * result["control"],
        *[f"{result['truncated_items']:,} contexts cut"] * bool(result["truncated_items"]),
        f"{result['backend']}, {result['dtype']}, {result['device']}",
        f"tokenizer {result['tokenizer']}",
        f"data {source['name']}, sha256 {source['sha256'][:8]}",
    ]
    console.print(f"{result['protocol']} (version {result['version']}): {'; '.join(details)}", soft_wrap=True)
    for model in result["models"]:
        console.print(f"  {model['name']}, sha256 {model['weights_sha256'][:8]}", soft_wrap=True)
        for name, metric in model["metrics"].items():
            line = _line(name, metric)
            if published := metric.get("published"):
                line += f"; published: {published['value']} ({published['source']})"
                if (errors := published.get("difference_in_standard_errors")) is not None:
                    line += f", difference {errors:+.1f} standard errors"
            console.print(line, soft_wrap=True)
    if differences := result.get("differences"):
        console.print("  second model - first model, paired", soft_wrap=True)
        for name, metric in differences.items():
            console.print(_line(name, metric, "+"), soft_wrap=True)


def _line(name: str, metric: dict[str, Any], sign: str = "") -> str:
    error = "" if metric["standard_error"] is None else f" ± {metric['standard_error']:.4f}"
    value = "too large" if metric["value"] is None else f"{metric['value']:{sign}.4f}"
    return f"    {name:24} {value}{error} {metric['unit']}"


def show_list(console: PlainConsole) -> None:
    """Print all protocols with their data and the published numbers."""
    for protocol in PROTOCOLS.values():
        console.print(f"{protocol.name} (version {protocol.version})", style="bold")
        console.print(f"    {protocol.description}", soft_wrap=True)
        if protocol.data is not None:
            file = protocol.data.file
            member = f", member {protocol.data.member}" * bool(protocol.data.member)
            console.print(f"    data: {protocol.data.addresses[0]}{member}, sha256 {file.sha256}", soft_wrap=True)
        for size, metrics in protocol.published.items():
            for name, number in metrics.items():
                console.print(f"    published: {size} {name} {number.value} ({number.source})", soft_wrap=True)
