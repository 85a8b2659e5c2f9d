"""The house rules that can be read off the source: who imports whom, what is imported where, sizes, inheritance."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "mint"

# What each unit (a package, or a module directly under mint) may import of MinT besides itself. A name with a dot is
# that module only. Imports inside functions and under TYPE_CHECKING count.
ALLOWED = {
    "errors": set(),
    "losses": set(),
    "settings": {"errors"},
    "types": {"errors", "losses"},
    "service": {"types", "errors"},
    "engine": {"types", "errors", "settings", "losses"},
    "hub": {"types", "errors", "settings"},
    "chat": {"types", "errors"},
    "data": {"chat", "hub", "types", "errors", "settings"},
    "local": {"service", "engine.backend", "hub", "types", "errors", "settings"},
    "client": {"service", "hub", "types", "errors"},
    "recipes": {"", "chat", "data", "hub", "types", "errors", "settings"},
    "cli": {"", "chat", "data", "hub", "types", "errors", "settings", "recipes"},
    "": {"client", "types", "errors"},  # mint/__init__.py
}
# engine/backend.py is imported by other layers, so it has limits of its own
ALLOWED_MODULES = {"engine.backend": {"types", "errors"}, "types.requests": {"errors", "losses"}}
LOSSES_FOR_TYPES = {"types.requests"}  # the one module of types that reads the losses' declarations
COMPOSITION_ROOTS = ("client.connect", "cli")

# Where a library may be imported: a unit, or a module. "types.tensor" imports torch inside functions only.
HOMES = {
    "torch": {"engine", "dist", "types.tensor"},
    "transformers": {"hub", "chat", "engine.hf"},
    "typer": {"cli", "recipes"},
    "rich": {"cli", "recipes"},
    "matplotlib": {"cli", "recipes"},
    "datasets": {"data"},
}

# Path -> why it may be longer than MAX_MODULE lines; "path::function" -> why longer than MAX_FUNCTION.
OVERSIZE = {
    "recipes/chat_sft.py::chat_sft": "a recipe is one flat function that a reader follows from top to bottom",
    "cli/sft.py::sft": "a command's parameters are its options, and this one has many",
}
MAX_MODULE, MAX_FUNCTION = 400, 60

# Handlers of every exception in which neither a `raise` nor a future's `set_exception` stands: what becomes of the error.
HANDED_ON = {
    "data/workers.py::_attempt": "the parent process raises it when the row's turn comes",
    "local/scheduler.py::_sample_unit": "_fail_samples gives it to the future of every request in the batch",
    "local/scheduler.py::_heads": "_fail gives it to the future of the one job that was refused",
    "local/scheduler.py::_train_unit": "_fail gives it to the future of every job of the pass",
}


@dataclass(frozen=True)
class Import:
    """One import of a module: `target` is the full dotted name as far as it is a module."""

    target: str
    line: int
    inside_function: bool
    type_checking: bool


@dataclass(frozen=True)
class Module:
    name: str  # "mint.local.core"
    path: str  # "local/core.py"
    tree: ast.Module
    num_lines: int

    @property
    def short(self) -> str:
        return self.name.removeprefix("mint").removeprefix(".")

    @property
    def unit(self) -> str:
        return self.short.partition(".")[0]


@cache
def modules() -> dict[str, Module]:
    found = {}
    for file in sorted(SRC.rglob("*.py")):
        relative = file.relative_to(SRC)
        parts = relative.with_suffix("").parts
        name = ".".join(["mint", *(parts[:-1] if parts[-1] == "__init__" else parts)])
        text = file.read_text(encoding="utf-8")
        found[name] = Module(name, relative.as_posix(), ast.parse(text), len(text.splitlines()))
    return found


def imports(module: Module) -> Iterator[Import]:
    yield from _imports(module, module.tree, inside_function=False, type_checking=False)


def _imports(module: Module, node: ast.AST, *, inside_function: bool, type_checking: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        inner = inside_function or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        checking = type_checking or (isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"))
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, inner, checking)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{module.path}:{child.lineno}: relative import"
            for alias in child.names:
                submodule = f"{child.module}.{alias.name}"
                target = submodule if submodule in modules() else str(child.module)
                yield Import(target, child.lineno, inner, checking)
        else:
            yield from _imports(module, child, inside_function=inner, type_checking=checking)


def own_imports(module: Module) -> Iterator[tuple[Import, str]]:
    """Imports of MinT, with the target's name below `mint`."""
    for found in imports(module):
        if found.target == "mint" or found.target.startswith("mint."):
            yield found, found.target.removeprefix("mint").removeprefix(".")


def is_within(name: str, home: str) -> bool:
    return name == home or (bool(home) and name.startswith(f"{home}."))


def functions(module: Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(module.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def test_the_source_is_found() -> None:
    assert {"mint", "mint.errors", "mint.local.core", "mint.engine.backend"} <= modules().keys()


def test_every_unit_stands_in_the_import_table() -> None:
    assert {module.unit for module in modules().values()} <= ALLOWED.keys()


def test_imports_between_units_are_those_of_the_table() -> None:
    forbidden = []
    for module in modules().values():
        if any(is_within(module.short, root) for root in COMPOSITION_ROOTS):
            continue
        allowed = ALLOWED_MODULES.get(module.short, ALLOWED[module.unit])
        for found, target in own_imports(module):
            same_unit = target.partition(".")[0] == module.unit and module.unit
            if same_unit and module.short not in ALLOWED_MODULES:
                continue
            permitted = any(is_within(target, name) if name else target == "" for name in {*allowed, module.unit})
            if not permitted:
                forbidden.append(f"{module.path}:{found.line} imports mint.{target}")
    assert forbidden == []


def test_of_types_only_requests_reads_the_losses() -> None:
    readers = {
        m.short for m in modules().values() if m.unit == "types" and any(t == "losses" for _, t in own_imports(m))
    }
    assert readers <= LOSSES_FOR_TYPES


def test_the_backend_protocol_and_the_losses_import_no_torch() -> None:
    for name in ("mint.engine.backend", "mint.losses", "mint.service"):
        assert not [i for i in imports(modules()[name]) if i.target.partition(".")[0] == "torch"]


@pytest.mark.parametrize("library", HOMES)
def test_libraries_are_imported_only_where_they_belong(library: str) -> None:
    strangers = [
        f"{module.path}:{found.line}"
        for module in modules().values()
        for found in imports(module)
        if found.target.partition(".")[0] == library
        and not any(is_within(module.short, home) for home in HOMES[library])
    ]
    assert strangers == []


def test_value_types_import_torch_only_inside_a_function() -> None:
    found = [i for i in imports(modules()["mint.types.tensor"]) if i.target.partition(".")[0] == "torch"]
    assert found
    assert all(i.inside_function or i.type_checking for i in found)


def test_no_module_imports_itself_round_a_corner() -> None:
    graph = {
        name: {f"mint.{target}" if target else "mint" for _, target in own_imports(module)}
        for name, module in modules().items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def oversize() -> set[str]:
    found = {module.path for module in modules().values() if module.num_lines > MAX_MODULE}
    for module in modules().values():
        for function in functions(module):
            assert function.end_lineno is not None
            if function.end_lineno - function.lineno + 1 > MAX_FUNCTION:
                found.add(f"{module.path}::{function.name}")
    return found


def test_modules_and_functions_stay_small() -> None:
    assert oversize() - OVERSIZE.keys() == set()


def test_the_list_of_oversize_things_holds_no_others() -> None:
    assert OVERSIZE.keys() - oversize() == set()
    assert all(OVERSIZE.values())


def test_no_class_inherits_from_another_of_ours_except_exceptions() -> None:
    ours = {
        node.name
        for module in modules().values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef) and module.name != "mint.errors"
    }
    heirs = []
    for module in modules().values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef) and module.name != "mint.errors":
                bases = {ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases}
                heirs += [f"{module.path}: {node.name}({base})" for base in bases & ours]
    assert heirs == []


def _catches_everything(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(isinstance(kind, ast.Name) and kind.id in ("Exception", "BaseException") for kind in kinds)


def _keeps_the_error(handler: ast.ExceptHandler) -> bool:
    calls = (node.func for node in ast.walk(handler) if isinstance(node, ast.Call))
    if any(isinstance(call, ast.Attribute) and call.attr == "set_exception" for call in calls):
        return True
    return any(isinstance(node, ast.Raise) for node in ast.walk(handler))


def _swallowing_handlers(node: ast.AST, where: str) -> Iterator[str]:
    """The innermost function of each handler of every exception that does not keep it."""
    for child in ast.iter_child_nodes(node):
        inner = child.name if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) else where
        if isinstance(child, ast.ExceptHandler) and _catches_everything(child) and not _keeps_the_error(child):
            yield inner
        yield from _swallowing_handlers(child, inner)


def test_who_catches_every_exception_raises_again_or_hands_it_to_a_future() -> None:
    found = {f"{m.path}::{where}" for m in modules().values() for where in _swallowing_handlers(m.tree, "module")}
    assert found == HANDED_ON.keys()
