"""Which errors a function of the project raises, itself or in the functions that it calls, read from the source."""

import ast
import builtins
import inspect
import textwrap
import types

OURS = ("parity", "gpt_torch", "gpt_jax")
INTERNAL = {"AssertionError", "AttributeError", "StopIteration"}
"""Errors of the project's own mistakes and of Python's protocols, which no docstring mentions."""

_known: dict[tuple, frozenset] = {}


def raised_errors(function, cls=None):
    """Return the classes of the errors that a call may raise.

    Args:
        function: A function, method or property.
        cls: The class of a method, in which `self` is looked up.

    Returns:
        A lower bound: the errors in `raise` statements that no `try` around them catches, also in the functions,
        methods of `self` and constructors of the project that are called by name. Calls of methods of other objects
        are not followed.
    """
    function = inspect.unwrap(getattr(function, "fget", None) or getattr(function, "__func__", function))
    if not isinstance(function, types.FunctionType):
        return frozenset()
    if (function, cls) not in _known:
        _known[function, cls] = frozenset()  # of a recursive call
        if function.__code__.co_filename.startswith("<"):  # dataclasses made it
            return frozenset()
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        visitor = _Visitor(function, cls)
        for statement in tree.body[0].body:
            visitor.visit(statement)
        _known[function, cls] = frozenset(error for error in visitor.errors if not is_one_of(error, INTERNAL))
    return _known[function, cls]


def is_one_of(error, names):
    """Return whether an error, or a class that it is derived from, has one of the names."""
    return any(base.__name__ in names for base in error.__mro__)


class _Visitor(ast.NodeVisitor):
    def __init__(self, function, cls):
        self.function, self.cls = function, cls
        self.errors: set[type[BaseException]] = set()
        self.caught: frozenset[str] = frozenset()

    def visit_Try(self, node):
        outer = self.caught
        types_ = [handler.type for handler in node.handlers if handler.type is not None]
        parts = [part for t in types_ for part in (t.elts if isinstance(t, ast.Tuple) else [t])]
        self.caught = outer | {_last_name(part) for part in parts}
        for statement in node.body:
            self.visit(statement)
        self.caught = outer
        for statement in [*node.handlers, *node.orelse, *node.finalbody]:
            self.visit(statement)

    def visit_Raise(self, node):
        raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        if raised is not None and _is_error(error := self.resolve(raised)):
            self.add({error})
        self.generic_visit(node)

    def visit_Call(self, node):
        called = self.resolve(node.func)
        if (getattr(called, "__module__", None) or "").split(".")[0] in OURS and not _is_error(called):
            if inspect.isclass(called):
                for method in filter(None, map(vars(called).get, ("__init__", "__post_init__"))):
                    self.add(raised_errors(method, called))
            else:
                self.add(raised_errors(called, self.cls))
        self.generic_visit(node)

    def add(self, errors):
        self.errors |= {error for error in errors if not is_one_of(error, self.caught)}

    def resolve(self, node):
        """Return the value of a name, of an attribute of a module or class, or of a method of self; None for others."""
        if isinstance(node, ast.Name):
            return self.function.__globals__.get(node.id, getattr(builtins, node.id, None))
        if not isinstance(node, ast.Attribute):
            return None
        if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls") and self.cls:
            return inspect.getattr_static(self.cls, node.attr, None)
        owner = self.resolve(node.value)
        return getattr(owner, node.attr, None) if isinstance(owner, types.ModuleType | type) else None


def _is_error(value):
    return inspect.isclass(value) and issubclass(value, BaseException)


def _last_name(node):
    return node.id if isinstance(node, ast.Name) else node.attr
