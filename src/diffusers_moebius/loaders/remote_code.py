"""
Code that travels with a saved pipeline, so that diffusers can run it where this package is not installed.

diffusers loads such code file by file, asks the hub for each file that another one imports, and in a local folder
copies only the direct imports. So each class travels as one file that imports nothing of ours: its module, and before
it, in the order of their imports, the modules of ours that it needs.
"""

import ast
import importlib
from importlib.util import resolve_name

_PACKAGE = __name__.partition(".")[0]  # also where this code has itself travelled in a saved pipeline


def is_ours(module_name: str | None) -> bool:
    """Whether a module belongs to this package."""
    return module_name is not None and module_name.partition(".")[0] == _PACKAGE


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

    meanings: dict[str, tuple[str, str]] = {}
    parts = ["# Generated from the package diffusers_moebius, of which it holds every module that it needs.\n"]
    for name, source in sources.items():
        tree = ast.parse(source)
        for bound, meaning in _top_level_names(tree.body, name):
            other, known = meanings.setdefault(bound, (name, meaning))
            if known != meaning:
                raise ValueError(f"{other} and {name} cannot be joined: both define `{bound}`.")
        parts.append(f"\n# {'-' * 20} {name}\n\n{_without_own_imports(source, tree, name)}")
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
    for _, imported in _own_imports(ast.parse(source), module_name):
        if imported not in sources:
            _collect(imported, sources, (*importers, module_name))
    sources[module_name] = source


def _own_imports(tree: ast.Module, module_name: str) -> list[tuple[ast.ImportFrom, str]]:
    found = []
    for node in ast.walk(tree):
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


def _without_own_imports(source: str, tree: ast.Module, module_name: str) -> str:
    lines = source.splitlines()
    for node, _ in _own_imports(tree, module_name):
        replacement = " " * node.col_offset + "pass" if node.col_offset else ""  # a block may not become empty
        lines[node.lineno - 1 : node.end_lineno] = [replacement] + [""] * (node.end_lineno - node.lineno)
    return "\n".join(lines).strip("\n") + "\n"


def _top_level_names(body: list[ast.stmt], module_name: str):
    """What each top-level name of a module is bound to, in a form that is equal for equal meanings."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            origin = getattr(node, "module", "")
            if getattr(node, "level", 0) or is_ours(origin):
                continue
            for alias in node.names:
                yield alias.asname or alias.name.partition(".")[0], f"{origin} {alias.name} {alias.asname}"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, f"{module_name}.{node.name}"
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in ast.walk(node):
                if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store):
                    yield target.id, ast.unparse(node)
        for block in ("body", "orelse", "finalbody", "handlers"):
            if isinstance(node, ast.If | ast.Try | ast.With | ast.For | ast.ExceptHandler):
                yield from _top_level_names(getattr(node, block, []), module_name)
