"""The public names of the project, and their docstrings; without Sphinx, as the tests use it too."""

import ast
import importlib
import inspect
import itertools
import sys
from types import ModuleType
from typing import Any

MODULES = (
    "parity",
    "gpt_torch",
    "gpt_jax",
    "parity.config",
    "parity.weights",
    "parity.taps",
    "parity.sampling",
    "parity.interpret",
    "parity.notebook",
    "gpt_torch.notebook",
    "gpt_jax.notebook",
)
"""The modules whose public names are stable."""


def public_names(module_name: str) -> list[str]:
    """Return the public names of a module.

    Returns:
        The names in `__all__`, in alphabetical order. A module without it has as public names what it defines itself
        and what does not begin with an underscore, in the order of the source.
    """
    module = importlib.import_module(module_name)
    if hasattr(module, "__all__"):
        return sorted(module.__all__, key=str.lower)
    names = []
    for node in _tree(module).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        names += _assigned(node)
    return list(dict.fromkeys(name for name in names if not name.startswith("_")))


def docstring(module_name: str, name: str) -> str:
    """Return the docstring of a public name, with its indentation removed; "" if there is none."""
    module = importlib.import_module(module_name)
    value = getattr(module, name)
    if inspect.isclass(value) or inspect.isroutine(value):
        return inspect.getdoc(value) or ""
    return _value_docstring(module, name, value)


def _value_docstring(module: ModuleType, name: str, value: Any) -> str:
    """Return the docstring below a value, in this module or in the one of the same package that defines it."""
    package = module.__name__.partition(".")[0]
    others = [other for key, other in sorted(sys.modules.items()) if key.startswith(f"{package}.")]
    for candidate in (module, *others):
        if vars(candidate).get(name) is value and (text := value_docstrings(candidate).get(name)):
            return text
    return ""


def value_docstrings(module: ModuleType) -> dict[str, str]:
    """Return {name: docstring} of the values of a module below which there is one."""
    body = _tree(module).body
    docstrings = {}
    for node, below in itertools.pairwise(body):
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            docstrings.update(dict.fromkeys(_assigned(node), inspect.cleandoc(str(below.value.value))))
    return docstrings


def _assigned(node: ast.stmt) -> list[str]:
    """Return the names to which a statement assigns a value."""
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return [node.target.id] if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) else []


def _tree(module: ModuleType) -> ast.Module:
    return ast.parse(inspect.getsource(module))
