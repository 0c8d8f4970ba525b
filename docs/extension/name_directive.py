"""The directive `public-names`: the reference of a module's public names, from their docstrings."""

import importlib
import inspect
import re
from typing import Any, ClassVar

from docutils import nodes
from public_names import MODULES, docstring, public_names
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class PublicNames(SphinxDirective):
    """Describe the module that is the argument, and all of its public names."""

    required_arguments: ClassVar[int] = 1

    def run(self) -> list[nodes.Node]:
        module = self.arguments[0]
        self.env.note_dependency(str(importlib.import_module(module).__file__))
        lines = [f".. automodule:: {module}", ""]
        for name in public_names(module):
            lines += _reference(module, name)
        return self.parse_text_to_nodes("\n".join(lines))


def _reference(module: str, name: str) -> list[str]:
    """Return the reference of a name as reStructuredText."""
    value = getattr(importlib.import_module(module), name)
    defined_in = f"{getattr(value, '__module__', module)}."
    home = max((public for public in MODULES if defined_in.startswith(f"{public}.")), key=len, default=module)
    if home != module and "." in home and "." in module:
        directive = "class" if inspect.isclass(value) else "function"
        return [f".. py:{directive}:: {name}", "", f"   This is `{home}.{name}`.", ""]
    if inspect.isclass(value):
        directive = "autoexception" if issubclass(value, BaseException) else "autoclass"
        return [f".. {directive}:: {module}.{name}", "   :members:", "   :special-members: __call__", ""]
    if inspect.isroutine(value):
        return [f".. autofunction:: {module}.{name}", ""]
    text = [f"   {line}" for line in docstring(module, name).splitlines()]
    short = [f"   :value: {value!r}"] if isinstance(value, str | int | float | tuple) and len(repr(value)) < 80 else []
    return [f".. py:data:: {name}", *short, "", *text, ""]


def keep_tables(app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    """Make the indented blocks of a module's docstring, which are tables and examples, literal blocks."""
    if what != "module":
        return
    text = "\n".join(lines)
    lines[:] = re.sub(r"(?m)^(\S.*)\n\n(?= {4})", r"\1\n\n::\n\n", text).splitlines()


def keep_colons(app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    """Write the empty type before what is returned; napoleon would take words before a colon for a type."""
    text = "\n".join(lines)
    lines[:] = re.sub(r"(?m)^(Returns|Yields):\n( +)(?=\S)", r"\1:\n\2: ", text).splitlines()


_attributes: dict[str, list[str]] = {}


def save_attribute(app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    """Save the docstring of an attribute before napoleon, which takes words before a colon for a type."""
    if what == "attribute":
        _attributes[name] = list(lines)


def restore_attribute(app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    """Restore the docstring of an attribute after napoleon."""
    if what == "attribute":
        lines[:] = _attributes[name]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.setup_extension("sphinx.ext.autodoc")
    app.add_directive("public-names", PublicNames)
    app.connect("autodoc-process-docstring", keep_tables)
    app.connect("autodoc-process-docstring", keep_colons, priority=400)  # napoleon has 500
    app.connect("autodoc-process-docstring", save_attribute, priority=400)
    app.connect("autodoc-process-docstring", restore_attribute, priority=600)
    return {"parallel_read_safe": True}
