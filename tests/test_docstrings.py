"""Every public name has a complete docstring: arguments, shapes, dtypes, units, results, errors and sources."""

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
import typing

import docstring_parser
import pytest
from public_names import MODULES, docstring, public_names
from support import raised_errors as source
from support.raised_errors import is_one_of, raised_errors

from parity.errors import InputError

ARRAY = re.compile(r"Tensor|Array|ndarray")
SHAPE = re.compile(r"\[[A-Z\d.][^\]]*\]|\bscalar\b|any shape|format\b|`shapes`|\{name")  # a format has all shapes
DTYPE = re.compile(r"\b(u?int\d*|[Ii]ntegers?|b?float\d*|bool|dtypes?|format)\b")
IN_NATS = re.compile(r"loss|logprob")
SOURCES = {
    "GPTModel": r"Radford et al\. 2019",
    "LoraConfig": r"Hu et al\. 2021",
    "initial_weights": r"Radford et al\. 2019",
    "uniforms": r"Salmon et al\. 2011",
    "logit_lens": r"nostalgebraist 2020",
    "direct_logit_attribution": r"Elhage et al\. 2021",
    "patching_sweep": r"Meng et al\. 2022",
    "induction_scores": r"Olsson et al\. 2022",
    "LAYER_NORM_EPS": r"openai/gpt-2",
    "generate_text_simple": r"LLMs-from-scratch",
    "load_weights_into_gpt": r"LLMs-from-scratch",
    "train_model_simple": r"LLMs-from-scratch",
    "calc_loss_batch": r"LLMs-from-scratch",
    "create_dataloader_v1": r"LLMs-from-scratch",
}
NAMES = [(module, name) for module in MODULES for name in public_names(module)]


def parse(text):
    return docstring_parser.parse(text, docstring_parser.DocstringStyle.GOOGLE)


def section(text, *titles):
    """Return the text of a section of a docstring."""
    found = re.search(rf"^(?:{'|'.join(titles)}):\n((?:[ ]+.*\n?|\n)+)", text, re.MULTILINE)
    return found[1] if found else ""


def check_array(what, annotation, description):
    """Yield what a description of an array lacks."""
    annotation = str(annotation)
    if ARRAY.search(annotation) and "Callable" not in annotation:
        if not SHAPE.search(description):
            yield f"the axes of {what}"
        if not DTYPE.search(description):
            yield f"the dtype of {what}"


def check_errors(errors, parsed):
    """Yield the errors that a docstring names neither themselves nor by a class that they are derived from."""
    named = {error.type_name for error in parsed.raises}
    if missing := sorted(error.__name__ for error in errors if not is_one_of(error, named)):
        yield f"that it raises {', '.join(missing)}"


def check_callable(function, text, cls=None, is_constructor=False):
    """Yield what the docstring of a function, method or constructor lacks."""
    signature, parsed = inspect.signature(inspect.unwrap(function)), parse(text)
    parameters = [p for p in signature.parameters.values() if not (cls and p.name in ("self", "cls"))]
    described = {p.arg_name.lstrip("*"): p.description or "" for p in parsed.params}
    if not text.split("\n\n")[0].rstrip().endswith((".", ":")):
        yield "a sentence at its beginning"
    for parameter in parameters:
        if not described.get(parameter.name):
            yield f"the argument {parameter.name}"
        else:
            yield from check_array(parameter.name, parameter.annotation, described[parameter.name])
    if unknown := described.keys() - {p.name for p in parameters}:
        yield f"no {', '.join(unknown)}, which is no argument"
    result = signature.return_annotation
    returned = section(text, "Returns", "Yields") or (text if re.match(r"(Return|Yield)\s", text) else "")
    if not is_constructor and result not in (None, typing.NoReturn, inspect.Signature.empty):
        if not returned:
            yield f"what it returns: {result}"
        yield from check_array("the result", result, returned)
    if any(IN_NATS.search(name) for name in [getattr(function, "__name__", ""), *described]) and "nats" not in text:
        yield "the unit, nats"
    yield from check_errors(raised_errors(function, cls), parsed)


def fields(cls):
    """Return {field: its text} of a dataclass, named tuple or TypedDict, with those that it inherits."""
    texts = {}
    for base in reversed([*getattr(cls, "__orig_bases__", ()), *cls.__mro__]):
        if not inspect.isclass(base) or base.__module__.split(".")[0] not in source.OURS:
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        for node, below in zip(body, [*body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign):
                has_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                texts[node.target.id] = below.value.value if has_text else texts.get(node.target.id, "")
        texts |= {p.arg_name: p.description for p in parse(inspect.getdoc(base) or "").params}
    return texts


def check_class(cls):
    """Yield what the docstrings of a class, of its fields and of its public methods lack."""
    if dataclasses.is_dataclass(cls) or typing.is_typeddict(cls) or hasattr(cls, "_fields"):
        yield from (f"the field {name}" for name, text in fields(cls).items() if not text and not name.startswith("_"))
        constructor = vars(cls).get("__post_init__")
        yield from check_errors(raised_errors(constructor, cls) if constructor else (), parse(inspect.getdoc(cls)))
    elif "__init__" in vars(cls) and not issubclass(cls, BaseException):
        yield from check_callable(cls.__init__, inspect.getdoc(cls) or "", cls, is_constructor=True)
    for name, value in vars(cls).items():
        if name.startswith("_") and name != "__call__":
            continue
        text = inspect.getdoc(getattr(value, "__func__", value)) or ""
        if isinstance(value, property):
            problems = [] if text else ["a docstring"]
        elif inspect.isroutine(value):
            problems = check_callable(getattr(value, "__func__", value), text, cls)
        else:
            continue
        yield from (f"{name}(): {problem}" for problem in problems)


def lacks(value, text):
    """Return what the docstring of a public value lacks."""
    if not text:
        return ["a docstring"]
    if inspect.isclass(value):
        return list(check_class(value))
    return list(check_callable(value, text)) if inspect.isroutine(value) else []


@pytest.mark.parametrize("module", MODULES)
def test_docstrings_are_complete(module):
    problems = []
    for name in public_names(module):
        text = docstring(module, name)
        lacking = lacks(getattr(importlib.import_module(module), name), text)
        if name in SOURCES and not re.search(SOURCES[name], text):
            lacking.append(f"the source {SOURCES[name]}")
        problems += [f"{module}.{name} lacks {problem}" for problem in lacking]
    assert not problems, "\n".join(problems)


def test_every_source_belongs_to_a_name():
    assert not SOURCES.keys() - {name for _, name in NAMES}
    assert len(NAMES) > 120


# The check itself


def _refuse(x):
    if x:
        raise InputError("x")


def _refuse_silently(x):
    try:
        _refuse(x)
    except InputError:
        return


def complete(logits: "np.ndarray", count: int = 1) -> "np.ndarray":  # noqa: F821
    """Return losses.

    Args:
        logits: Logits [B, T, V], float32.
        count: How many.

    Returns:
        Losses float32 [B, T], in nats.

    Raises:
        InputError: For a count.
    """
    _refuse(count)


COMPLETE = inspect.getdoc(complete)


@pytest.mark.parametrize(
    ("old", "new", "lacking"),
    [
        ("", "", []),
        ("    count: How many.\n", "", ["the argument count"]),
        ("[B, T, V], float32", "of the model, float32", ["the axes of logits"]),
        ("[B, T, V], float32", "[B, T, V]", ["the dtype of logits"]),
        ("float32 [B, T]", "float32 of each token", ["the axes of the result"]),
        ("float32 [B, T]", "[B, T]", ["the dtype of the result"]),
        (", in nats", "", ["the unit, nats"]),
        ("InputError: For", "OSError: For", ["that it raises InputError"]),
        ("Return losses.", "Losses", ["a sentence at its beginning"]),
        ("count: How", "counts: How", ["the argument count", "no counts, which is no argument"]),
    ],
)
def test_an_incomplete_docstring_is_refused(old, new, lacking, monkeypatch):
    monkeypatch.setattr(complete, "__name__", "calc_loss")
    monkeypatch.setattr("support.raised_errors.OURS", (__name__,))
    assert lacks(complete, COMPLETE.replace(old, new)) == lacking


def test_caught_errors_are_not_raised(monkeypatch):
    monkeypatch.setattr("support.raised_errors.OURS", (__name__,))
    assert raised_errors(_refuse) == {InputError}
    assert raised_errors(_refuse_silently) == frozenset()


@dataclasses.dataclass
class Options:
    """Options."""

    width: int
    height: int
    """Height in pixels."""

    def area(self):
        """Return the area."""

    def ratio(self):
        pass


def test_a_name_without_a_docstring_is_refused(monkeypatch):
    monkeypatch.setattr("support.raised_errors.OURS", (__name__,))
    assert lacks(3, "") == ["a docstring"]
    assert lacks(Options, "Options.") == ["the field width", "ratio(): a sentence at its beginning"]
