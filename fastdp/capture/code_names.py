"""Tells what code names: globals, attributes, and modules that it imports where it runs."""

from __future__ import annotations

import dis
import functools
import sys
import types
from collections.abc import Iterator

_BY_NAME = frozenset({"modules", "import_module", "__import__"})  # what finds a module by its name


def names_in_code(code: types.CodeType) -> Iterator[str]:
    """The names of globals and attributes in a function and the functions nested in it."""
    yield from code.co_names
    for nested in _nested(code):
        yield from names_in_code(nested)


@functools.lru_cache(maxsize=1024)
def global_names(code: types.CodeType) -> frozenset[str]:
    """The names of globals that a function and the functions nested in it load.

    Without those that no program can write: pytest's, which it puts into code for `assert`.
    """
    found = {one.argval for one in dis.get_instructions(code) if one.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    written = (name for name in found if not name.startswith("@"))
    return frozenset(written).union(*map(global_names, _nested(code)))


def strings_in_code(code: types.CodeType) -> Iterator[str]:
    """The strings among the constants of a function and the functions nested in it."""
    yield from (constant for constant in code.co_consts if isinstance(constant, str))
    for nested in _nested(code):
        yield from strings_in_code(nested)


def modules_of(function: types.FunctionType) -> list[types.ModuleType]:
    """The modules that a function names: its globals, those that it imports, and those that it finds by their names."""
    known, code = function.__globals__, function.__code__
    found = [known[name] for name in global_names(code) & known.keys() if isinstance(known[name], types.ModuleType)]
    names = set(_imported(code, str(known.get("__package__") or "")))
    if not _BY_NAME.isdisjoint(names_in_code(code)):
        names |= {*strings_in_code(code), str(known.get("__name__"))}
    return found + [sys.modules[name] for name in names & sys.modules.keys()]


def _imported(code: types.CodeType, package: str) -> Iterator[str]:
    """The full names that the modules which code imports may have, with those of the packages that they are in."""
    parents = package.split(".") if package else []
    for one in dis.get_instructions(code):
        if one.opname == "IMPORT_NAME":
            name = str(one.argval)
            yield from (name, name.partition(".")[0])
            for i in range(len(parents)):  # `from . import name`, from any level
                yield ".".join([*parents[: i + 1], *([name] if name else [])])
    for nested in _nested(code):
        yield from _imported(nested, package)


def _nested(code: types.CodeType) -> list[types.CodeType]:
    return [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
