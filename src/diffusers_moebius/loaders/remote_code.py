"""
Code that travels with a saved pipeline, so that diffusers can run it where this package is not installed.

diffusers loads such code file by file, asks the hub for each file that another one imports, and in a local folder
copies only the direct imports. So each class travels as one file that imports nothing of ours: its module, and before
it, in the order of their imports, the modules of ours that it needs.
"""

import ast
import importlib
import sys
from importlib.util import resolve_name
from logging import Logger
from typing import Any

_PACKAGE = __name__.partition(".")[0]  # also where this code has itself travelled in a saved pipeline


def is_ours(module_name: str) -> bool:
    """Whether a module belongs to this package."""
    return module_name.partition(".")[0] == _PACKAGE


def module_stem(module_name: str) -> str:
    """The last part of a module's name, which is its file's name in a saved pipeline."""
    return module_name.rpartition(".")[2]


def self_contained_source(module_name: str) -> str:
    """
    The source of a module that imports nothing of this package.

    Args:
        module_name (`str`): Full name of a module of this package.

    Returns:
        `str`: The module as it is if it imports no other module of this package, else all the modules it needs in one.

    Raises:
        ValueError: If the modules cannot be joined: two of them mean different things by one name, they import each
            other, or an import does not name things of a module (`from ..module import name`).
    """
    sources: dict[str, str] = {}
    _collect(module_name, sources, ())
    if len(sources) == 1:
        return sources[module_name]

    meanings: dict[str, tuple[str, Any]] = {}
    parts = ["# Generated from the package diffusers_moebius, of which it holds every module that it needs.\n"]
    for name, source in sources.items():
        for bound, value in vars(sys.modules[name]).items():
            if bound.startswith("__") or isinstance(value, Logger):
                continue
            other, known = meanings.setdefault(bound, (name, value))
            if known is not value:
                raise ValueError(f"{other} and {name} cannot be joined: `{bound}` is not the same in both.")
        parts.append(f"\n# {'-' * 20} {name}\n\n{_without_own_imports(source, name)}")
    return "\n".join(parts)


def _collect(module_name: str, sources: dict[str, str], importers: tuple[str, ...]) -> None:
    """Adds a module's source, after those of the modules that it imports."""
    if module_name in importers:
        raise ValueError(f"{module_name} cannot be joined with what it imports: that imports it in turn.")
    module = importlib.import_module(module_name)
    if hasattr(module, "__path__"):
        raise ValueError(f"{importers[-1]} must import from the modules of {module_name}, not from the package.")
    with open(module.__file__, encoding="utf-8") as file:
        source = file.read()
    for _, imported in _own_imports(source, module_name):
        if imported not in sources:
            _collect(imported, sources, (*importers, module_name))
    sources[module_name] = source


def _own_imports(source: str, module_name: str) -> list[tuple[ast.ImportFrom, str]]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(is_ours(alias.name) for alias in node.names):
            raise ValueError(f"{module_name} must import names from our modules, not modules (line {node.lineno}).")
        if not isinstance(node, ast.ImportFrom):
            continue
        target = node.module or ""
        if node.level:
            target = resolve_name("." * node.level + target, module_name.rpartition(".")[0])
        if not is_ours(target):
            continue
        if any(alias.asname or alias.name == "*" for alias in node.names):
            raise ValueError(f"{module_name} must import names of ours as they are (line {node.lineno}).")
        found.append((node, target))
    return found


def _without_own_imports(source: str, module_name: str) -> str:
    lines = source.splitlines()
    for node, _ in _own_imports(source, module_name):
        replacement = " " * node.col_offset + "pass" if node.col_offset else ""  # a block may not become empty
        lines[node.lineno - 1 : node.end_lineno] = [replacement] + [""] * (node.end_lineno - node.lineno)
    return "\n".join(lines).strip("\n") + "\n"
