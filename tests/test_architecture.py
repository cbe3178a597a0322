# SPDX-License-Identifier: Apache-2.0
"""The shape of the source, read from its syntax trees: rooms and the order of their imports, lengths, printing."""

from __future__ import annotations

import ast
import functools
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mirrortune"
ROOMS = (
    "system", "config", "adapters", "models", "data", "tasks", "reports", "training", "merging", "runs", "inference",
    "compare", "analyze", "cli",
)  # fmt: skip
"""In the order of imports: a module imports from its own room and from rooms before it."""
ROOT_FILES = {"__init__.py", "__main__.py", "api.py", "errors.py", "registry.py", "trainers.py", "py.typed"}
FOR_EVERY_ROOM = {"errors", "registry", "__init__"}
HEAVY = {"accelerate", "datasets", "deepspeed", "huggingface_hub", "matplotlib", "numpy", "peft", "pyarrow",
         "safetensors", "scipy", "sklearn", "tokenizers", "torch", "transformers"}  # fmt: skip
# What --help, a wrong flag and a wrong recipe need: they must answer at once.
LIGHT = (
    "__main__", "errors", "registry", "config.recipe", "config.schema", "config.strict_yaml", "config.foreign_names",
    "adapters.methods", "system.paths", "system.console", "cli.app", "cli.flags", "cli.exports", "cli.reports",
    "cli.recipes", "cli.predictions", "cli.chat",
)  # fmt: skip
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__") or "__init__"
    for path in PACKAGE.rglob("*.py")
)


def room(module: str) -> str:
    """The room of a module, or the module itself for one that lies in none."""
    return module.split(".", maxsplit=1)[0]


def test_the_package_holds_rooms_and_a_few_files() -> None:
    entries = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert {name for name in entries if not (PACKAGE / name).is_dir()} <= ROOT_FILES
    assert {name for name in entries if (PACKAGE / name).is_dir()} <= set(ROOMS)


def test_rooms_have_a_purpose() -> None:
    for folder in {path.parent for path in PACKAGE.rglob("*.py")}:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))), folder


@pytest.mark.parametrize("name", [name for name in ROOMS if (PACKAGE / name).is_dir()])
def test_a_room_is_neither_a_cupboard_nor_a_hall(name: str) -> None:
    for folder in {path.parent for path in (PACKAGE / name).rglob("*.py")}:
        count = len([path for path in folder.glob("*.py") if path.name != "__init__.py"])
        assert (3 if folder.name == name else 1) <= count <= 15, folder.name


@pytest.mark.parametrize("module", [m for m in MODULES if room(m) in ROOMS])
def test_a_module_imports_only_from_its_room_and_those_before(module: str) -> None:
    allowed = {*ROOMS[: ROOMS.index(room(module)) + 1], *FOR_EVERY_ROOM}
    if room(module) == "cli":
        allowed |= {"api"}
    assert {name for name in ours(module) if room(name) not in allowed} == set()


@pytest.mark.parametrize("module", MODULES)
def test_imports_across_rooms_go_through_doors(module: str) -> None:
    reached = {name for name in ours(module, for_types=True) if room(name) in ROOMS and room(name) != room(module)}
    assert {name for name in reached if not is_public(name)} == set()


@pytest.mark.parametrize("name", ROOMS)
def test_a_door_lists_what_other_rooms_use(name: str) -> None:
    users = [module for module in MODULES if room(module) != name]
    used = {found for module in users for found in ours(module, for_types=True) if room(found) == name}
    doors = [package for package in packages(name) if is_public(package)]
    assert [found for package in doors for found in imports(package, only_at_import=False)] == []
    listed = {f"{package}.{entry}" for package in doors for entry in door(package)}
    assert listed == {parent for module in used for parent in with_parents(module) if parent != name}


@pytest.mark.parametrize("name", ["compare", "analyze"])
def test_a_room_of_one_command_can_be_deleted_with_one_function(name: str) -> None:
    users = set()
    for module in (m for m in MODULES if room(m) != name):
        for node in tree(module).body:
            inner = [n.module or "" for n in ast.walk(node) if isinstance(n, ast.ImportFrom)]
            if any(found.split(".")[:2] == ["mirrortune", name] for found in inner):
                users.add((module, getattr(node, "name", "at import")))
    assert [user for _, user in users] == [name]


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module: {name for name in ours(module, only_at_import=True) if name != module} for module in MODULES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names them


@pytest.mark.parametrize("module", [m for m in MODULES if room(m) == "adapters"])
def test_adapters_know_no_task_no_data_and_no_command(module: str) -> None:
    assert {room(name) for name in ours(module)} <= {"adapters", "system", *FOR_EVERY_ROOM}
    assert foreign(module) & HEAVY <= {"torch", "numpy", "scipy", "safetensors", "peft"}


def test_a_public_name_is_defined_once() -> None:
    places: dict[str, list[str]] = {}
    for module in MODULES:
        # The command line and the Python API use the names of what they call; every kind of task defines a Task.
        if room(module) in ("cli", "api") or module.startswith("tasks.kinds."):
            continue
        for node in tree(module).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(module)
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_unit_tests_are_named_after_what_they_test() -> None:
    tests = Path(__file__).parent / "unit"
    known = {f"{room(module)}/test_{module.rpartition('.')[2]}" for module in MODULES}
    found = {path.relative_to(tests).with_suffix("").as_posix() for path in tests.glob("*/test_*.py")}
    # test_trainer.py, and test_trainer_fp16.py for one aspect of the module
    assert {name for name in found if not any(f"{name}_".startswith(f"{module}_") for module in known)} == set()


@pytest.mark.parametrize("module", LIGHT)
def test_what_answers_at_once_imports_nothing_heavy(module: str) -> None:
    code = f"import sys, mirrortune.{module}; print(*sorted(set({sorted(HEAVY)}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("module", MODULES)
def test_no_import_needs_posix(module: str) -> None:
    assert foreign(module, only_at_import=True) & {"fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"} == set()


def test_pydantic_stays_at_the_edge() -> None:
    assert {name for name in MODULES if "pydantic" in foreign(name)} == {"config.schema", "config.recipe"}


@pytest.mark.parametrize("module", [m for m in MODULES if m != "system.console"])
def test_only_the_console_prints(module: str) -> None:
    spoken = [
        ast.unparse(node)
        for node in ast.walk(tree(module))
        if (isinstance(node, ast.Name) and node.id == "print")
        or (isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stdout", "sys.stderr", "typer.echo"))
        or (isinstance(node, ast.Attribute) and node.attr in ("print_exc", "print_exception"))
    ]
    # The version is printed without the time it takes to import rich; a bug's traceback is for --debug.
    assert spoken == (["typer.echo", "traceback.print_exc"] if module == "cli.app" else [])


def test_only_one_module_draws() -> None:
    assert {name for name in MODULES if "matplotlib" in foreign(name)} == {"reports.drawing"}
    assert not any("matplotlib" in foreign(name, only_at_import=True) for name in MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_are_short(module: str) -> None:
    assert len(path_of(module).read_text(encoding="utf-8").splitlines()) <= 500
    functions = [n for n in ast.walk(tree(module)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [f.name for f in functions if (f.end_lineno or 0) - f.lineno + 1 > 60] == []


@pytest.mark.parametrize("module", MODULES)
def test_files_carry_their_licence(module: str) -> None:
    assert path_of(module).read_text(encoding="utf-8").startswith("# SPDX-License-Identifier: Apache-2.0\n")


def test_only_the_projects_own_files_are_tracked() -> None:
    if not (PACKAGE.parent / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=PACKAGE.parent, capture_output=True, text=True, check=True).stdout
    top = {line.split("/")[0] for line in listed.splitlines()}
    assert top - {".ci", ".gitignore", "docs"} == {
        "mirrortune", "tests", "recipes", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "constraints.txt"
    }  # fmt: skip


def path_of(module: str) -> Path:
    """The file of a module."""
    folder = PACKAGE.joinpath(*module.split("."))
    return folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")


@functools.cache
def tree(module: str) -> ast.Module:
    """The syntax tree of a module."""
    return ast.parse(path_of(module).read_text(encoding="utf-8"))


def packages(name: str) -> list[str]:
    """A room and its subfolders."""
    return [module for module in MODULES if room(module) == name and path_of(module).name == "__init__.py"]


def with_parents(module: str) -> list[str]:
    """A module and the packages that hold it, the room first."""
    parts = module.split(".")
    return [".".join(parts[: count + 1]) for count in range(len(parts))]


def door(package: str) -> list[str]:
    """The modules that a package lists in ``__all__``: those that other rooms may import."""
    for node in tree(package).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def is_public(module: str) -> bool:
    """Whether a room's door, and those of its subfolders on the way, list a module."""
    return all(name.rpartition(".")[2] in door(name.rpartition(".")[0]) for name in with_parents(module)[1:])


def imports(module: str, *, only_at_import: bool, for_types: bool = False) -> Iterator[str]:
    """Dotted names that a module imports; ``from a import b`` gives ``a.b``.

    Args:
        module: name below the package.
        only_at_import: leave out what is imported when a function is called.
        for_types: count what only type checkers import as well.
    """
    waiting: list[ast.AST] = [tree(module)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not for_types:
            continue
        if only_at_import and isinstance(node, ast.FunctionDef):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name their module in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        waiting += ast.iter_child_nodes(node)


@functools.cache
def ours(module: str, *, only_at_import: bool = False, for_types: bool = False) -> set[str]:
    """Modules of this package that a module imports; ``__init__`` for the package itself."""
    found = set()
    for name in imports(module, only_at_import=only_at_import, for_types=for_types):
        if name.split(".")[0] == "mirrortune":
            inner = name.removeprefix("mirrortune").removeprefix(".")
            while inner and inner not in MODULES:
                inner = inner.rpartition(".")[0]
            found.add(inner or "__init__")
    return found


def foreign(module: str, *, only_at_import: bool = False) -> set[str]:
    """Top-level packages of others that a module imports."""
    return {name.split(".")[0] for name in imports(module, only_at_import=only_at_import)} - {"mirrortune"}
