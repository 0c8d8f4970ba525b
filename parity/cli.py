"""Command lines of the scripts: dataclass fields become options, and their docstrings become the help text."""

import contextlib
import dataclasses
import io
import os
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, get_args, get_type_hints

import docstring_parser
import tyro

import parity
from parity.errors import InputError
from parity.storage.paths import user_path

# Old spellings of options. They still work, with a warning, in every script that has the new option.
DEPRECATED = {"--init": "--init-from", "--initial": "--init-scheme", "--validation-part": "--validation-fraction"}
# Options whose text is a name or a path.
_NAMES_OR_PATHS = {"compare", "corpus", "eval_prompts", "init_from", "model", "source", "weights"}
# The beginning of an address that was made a Path, which drops one of two slashes. A drive has one letter.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
# A line of a module's docstring that shows a command. tyro joins lines that are not indented.
_EXAMPLE = re.compile(r"^(python|torchrun) ", re.MULTILINE)

Options = TypeVar("Options")


def parse(
    cls: type[Options],
    description: str | None,
    default: Options | None = None,
    args: Sequence[str] | None = None,
) -> Options:
    """Read a command line into a dataclass.

    Args:
        cls: Dataclass of the options; a docstring below a field is the help text of its option. Fields that are
            dataclasses themselves form groups of options.
        description: First part of the help text, usually the module's `__doc__`. Lines with example commands stay
            on lines of their own; tyro joins the other lines of a paragraph into one.
        default: Values of the options that the command line does not give, instead of the class's own defaults.
        args: The command line without the program's name; `sys.argv[1:]` by default.

    Raises:
        InputError: For an argument that is not UTF-8 text, and for a value that a class of options refuses.
        SystemExit: After `--help` and `--version` with status 0, and after a wrong option with status 2.
    """
    arguments = _current_spellings(cls, sys.argv[1:] if args is None else args)
    if "--version" in arguments:
        sys.stdout.write(f"{versions()}\n")
        raise SystemExit(0)
    _add_help(cls)
    examples_indented = _EXAMPLE.sub(r"    \g<0>", (description or "").strip())
    text = f"{examples_indented}\n\nThe option --version shows the installed versions."
    with _input_errors():
        if default is None:
            options = tyro.cli(cls, description=text, args=arguments)
        else:
            options = tyro.cli(cls, description=text, args=arguments, default=default)
    return _with_paths(options)


def parse_known(cls: type[Options], args: Sequence[str] | None = None) -> Options:
    """Read only the options of `cls`, on which the defaults of the others depend, and ignore all others.

    `--help` and `--version` are ignored as well; the call of `parse` that follows handles them, and warns about
    deprecated spellings.
    """
    arguments = _current_spellings(cls, sys.argv[1:] if args is None else args, warn=False)
    with _input_errors():
        options, _ = tyro.cli(cls, args=arguments, return_unknown_args=True, add_help=False)
    return _with_paths(options)


def changed_options(options: Any, default: Any) -> list[str]:
    """Return the options, in the form --name, whose values are not those of `default`, an object of the same class."""
    changed = []
    for field in dataclasses.fields(options):
        value, before = getattr(options, field.name), getattr(default, field.name)
        if dataclasses.is_dataclass(value):
            changed += changed_options(value, before)
        elif value != before:
            changed.append(f"--{field.name.replace('_', '-')}")
    return changed


def argument_parser(cls: type, default: Any = None) -> Any:
    """Return an argparse.ArgumentParser with the options, help texts and defaults of `parse`, to list them elsewhere.

    Args:
        cls: Dataclass of the options.
        default: Values that replace the class's own defaults.
    """
    _add_help(cls)
    return tyro.extras.get_parser(cls, **({} if default is None else {"default": default}))


def _with_paths(options: Any) -> Any:
    """Expand a leading `~` in all options that are paths, or may be; see `user_path`.

    Raises:
        InputError: For an option that takes a path only and is given an address.
    """

    def expand(name: str, value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return _with_paths(value)
        if isinstance(value, tuple):
            return tuple(expand(name, part) for part in value)
        if isinstance(value, Path) and _ADDRESS.match(str(value)):
            advice = "copy the files between that address and a folder, and name the folder"
            if name == "run" and hasattr(options, "mirror"):
                advice = "name a folder, and the address as --mirror"
            scheme = str(value).partition(":")[0]  # the rest may hold a secret
            raise InputError(f"--{name.replace('_', '-')} takes a path, not an address ({scheme}://...); {advice}")
        is_path = isinstance(value, Path) or (isinstance(value, str) and name in _NAMES_OR_PATHS)
        return type(value)(user_path(value)) if is_path and str(value).startswith("~") else value

    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    changed = {name: new for name, value in values.items() if (new := expand(name, value)) is not value}
    return dataclasses.replace(options, **changed) if changed else options


@contextlib.contextmanager
def _input_errors() -> Iterator[None]:
    """Within this context, raise the InputError of a class of options, which tyro would print in a box and exit."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            yield
    except SystemExit as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, InputError):
                raise cause from None
            cause = cause.__context__
        sys.stderr.write(printed.getvalue())
        raise
    sys.stderr.write(printed.getvalue())


def read_text(path: Path, option: str) -> str:
    """Return the text of the file that an option names; raise InputError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{option} {path} is not UTF-8 text") from None


def versions() -> str:
    """One line with the versions of this project, Python and both frameworks."""
    parts = [f"gpt-parity {parity.__version__}", f"Python {platform.python_version()}"]
    for package in ("jax", "torch"):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            parts.append(f"{package} not installed")
    return ", ".join(parts)


def _current_spellings(cls: type, arguments: Sequence[str], warn: bool = True) -> list[str]:
    """Replace deprecated options by their current names, and warn about each on standard error.

    Raises:
        InputError: For an argument that is not UTF-8 text: it could neither be printed nor written to a file.
    """
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise InputError(f"the argument {os.fsencode(argument)!r} is not UTF-8 text") from None
    options = {f"--{field.name.replace('_', '-')}" for _, field, _ in _fields(cls)}
    current = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        old = name.replace("_", "-")
        if old in DEPRECATED and old not in options and DEPRECATED[old] in options:
            if warn:
                sys.stderr.write(f"warning: {old} is deprecated; use {DEPRECATED[old]}\n")
            argument = f"{DEPRECATED[old]}{equals}{value}"
        current.append(argument)
    return current


def _fields(cls: type) -> Iterator[tuple[type, dataclasses.Field, Any]]:
    """Class, field and type of all options, including those of nested dataclasses."""
    types = get_type_hints(cls)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        yield cls, field, types[field.name]
        for nested in (types[field.name], *get_args(types[field.name])):
            if isinstance(nested, type) and dataclasses.is_dataclass(nested):
                yield from _fields(nested)


def _add_help(cls: type) -> None:
    """Give each field its docstring as tyro's help metadata, unless it has such metadata already.

    tyro's own reader breaks lines wherever the source does, and shows the docstring of a nested class to the user.
    """
    for owner, field, _ in _fields(cls):
        if field.metadata.get("help"):  # a text that is computed from a table of names, or set by an earlier call
            continue
        texts = (
            parameter.description
            for base in owner.__mro__
            if dataclasses.is_dataclass(base)
            for parameter in docstring_parser.parse_from_object(base).params
            if parameter.arg_name == field.name and parameter.description
        )
        text = " ".join(next(texts, "").split())
        field.metadata = MappingProxyType({**field.metadata, "help": text})
