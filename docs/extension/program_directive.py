"""The directive `programs`: the reference of all scripts and their options, from the scripts themselves."""

import argparse
import ast
import importlib
import re
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from parity.cli import argument_parser

SCRIPTS = Path(__file__).parents[2] / "scripts"
OTHER_PROGRAM = "eval_harness"
"""The script whose options are those of lm-evaluation-harness; its docstring alone is shown."""

GROUPS = {
    "model options": "The model",
    "settings options": "Data, optimization and reports",
    "tune options": "Tuning",
}
"""{title of a group of options in argparse: its heading}; the options of other groups come first, without one."""


def programs() -> list[Path]:
    """Return the scripts that are programs, in alphabetical order."""
    return sorted(path for path in SCRIPTS.glob("*.py") if '"__main__"' in path.read_text(encoding="utf-8"))


def describe(path: Path) -> str:
    """Return the reference of a script as reStructuredText."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    name = f"scripts/{path.name}"
    lines = [path.name, "-" * len(path.name), "", f".. program:: {name}", "", *_docstring_lines(docstring), ""]
    if path.stem != OTHER_PROGRAM:
        arguments = importlib.import_module(path.stem).Args
        default = arguments() if path.stem.startswith("train_") else None
        for title, actions in _groups(argument_parser(arguments, default)):
            lines += [f"**{title}**", ""] if title else []
            for action in actions:
                lines += _option_lines(action)
    return "\n".join(lines)


def _groups(parser: argparse.ArgumentParser) -> list[tuple[str, list[argparse.Action]]]:
    """Return the options of a parser under their headings; those without a heading are in the first group."""
    groups: dict[str, list[argparse.Action]] = {"": []}
    for group in parser._action_groups:
        heading = GROUPS.get(group.title or "", "")
        groups.setdefault(heading, []).extend(a for a in group._group_actions if a.dest != "help")
    return list(groups.items())


def _docstring_lines(docstring: str) -> list[str]:
    """Return a script's docstring with its example commands as blocks of code."""
    lines: list[str] = []
    indent = None  # of the commands of an example
    for line in docstring.splitlines():
        command = re.match(r"( *)(python|torchrun) ", line)
        if command and indent is None:
            indent = len(command[1])
            lines += ["", ".. code-block:: text", ""]
        elif indent is not None and not command and not re.match(r" *#", line):  # a comment goes on in the next line
            indent = None
            lines.append("")
        lines.append(_escaped(line.strip()) if indent is None else f"   {line[indent:]}")
    return lines


def _option_lines(action: argparse.Action) -> list[str]:
    """Return an option, or a positional argument, with its help text."""
    metavar = str(action.metavar or "").replace("{None}|", "")
    if action.option_strings:
        signature = ", ".join(" ".join([option, metavar]).strip() for option in action.option_strings)
    else:
        signature = metavar
    text = " ".join(str(action.help or "").split()).removesuffix(" (default: None)")
    return [f".. option:: {signature}", "", f"   {_escaped(text)}", ""]


def _escaped(text: str) -> str:
    """Return text in which reStructuredText sees no markup, other than options, which become code."""
    text = re.sub(r"([\\*`|_])", r"\\\1", text)
    return re.sub(r"(?<![\w-])(--[a-z][\w-]*)", r"``\1``", text)


class Programs(SphinxDirective):
    """Describe every script."""

    required_arguments: ClassVar[int] = 0

    def run(self) -> list[nodes.Node]:
        for path in programs():
            self.env.note_dependency(str(path))
        return self.parse_text_to_nodes("\n\n".join(map(describe, programs())), allow_section_headings=True)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("programs", Programs)
    return {"parallel_read_safe": True}
