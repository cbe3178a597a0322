# SPDX-License-Identifier: Apache-2.0
"""The shape of the source, read from its syntax trees: who may import whom, who may print, how long things may be."""

from __future__ import annotations

import ast
import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mirrortune"
# From the bottom up; a module imports only from layers below its own. A new module is given its place here, but for a
# new file in one of FOLDERS: those of a folder are of one layer, and may import each other.
LAYERS = (
    "adapter_packing adapters adapters.layouts adapters.matching adapters.pair_codes arrow_arrays errors "
    "json_rows precision row_places signals significance tally text_tables",
    "adapter_validity adapters.decompositions adapters.kinds adapters.layer_names atomic column_problems "
    "disk_space examples forward_modes hardware locations merge_contents metrics ranks registry report row_chunks "
    "row_stream shards strict_yaml text_files zero",
    "adapter_format adapters.factorize adapters.packed adapters.pair_lists adapters.presets adapters.strategies "
    "batching claims class_folders column_contents compiling figures load_errors model_card model_outputs packing "
    "processes schema sharding table_parts token_cache token_scores tracking",
    "adapters.basis adapters.candidates adapters.core adapters.pairings angle_figures columns comparison "
    "drawn_inputs feeding flags launching outputs quantised recipe redaction rehearsal tables",
    "adapters.core_stack adapters.cores adapters.products checkpoint comparison_figures editor_schema "
    "factor_cache hub index_checks labels pages predictions recipe_commands run_figures spectra stream_feeding",
    "adapters.effect adapters.spec adapters.spectral conversations data parcel remote_code run_status",
    "adapters.spectral_linear adapters.spectral_weight adapters.targets chat file_cells model one_of_classes "
    "peft_configs run_page streaming tokens",
    "adapters.inject adapters.timing duplicates images lazy_model recordings",
    "adapter_parts optim part_loading peft_tuners probes",
    "loop peft_file tasks",
    "adapter_file calibration evaluation planning previews recipe_values stepping",
    "adapting packed_bases preflight snapshots",
    "assembly merging peft_layers training weights",
    "comparing environment matrices peft_weights run_recording scoring stored_model strategy_choice",
    "analysis comparison_report loading merge_plan",
    "analysis_figures export merge_checks opening preparing records",
    "analysis_report commands export_gguf merge_folder",
    "cli_reports sharing",
    "api cli_exports",
    "cli trainers",
    "__main__",
)
RANKS = {module: rank for rank, layer in enumerate(LAYERS) for module in layer.split()}
FOLDERS = ("adapters.cores", "spectra", "tasks")
HEAVY = {"accelerate", "datasets", "deepspeed", "huggingface_hub", "matplotlib", "numpy", "peft", "pyarrow",
         "safetensors", "scipy", "sklearn", "tokenizers", "torch", "transformers"}  # fmt: skip
# What --help, a wrong flag and a wrong recipe need: they must answer at once.
LIGHT = ("errors", "strict_yaml", "registry", "locations", "schema", "recipe", "flags", "report", "signals",
         "adapters.presets", "cli", "cli_exports", "cli_reports", "recipe_commands", "text_tables", "__main__",
         "__init__")  # fmt: skip
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
)


def place(module: str) -> str:
    """The entry of ``LAYERS`` that a module belongs to."""
    folder = module.rpartition(".")[0]
    return folder if folder in FOLDERS else module


def test_every_module_has_a_layer() -> None:
    assert {place(module) for module in MODULES} - {"__init__"} == set(RANKS)


@pytest.mark.parametrize("module", [m for m in MODULES if m != "__init__"])
def test_a_module_imports_only_from_layers_below(module: str) -> None:
    # `from mirrortune import __version__` is the one thing that everybody may have of the package itself.
    others = {place(name) for name in ours(module)} - {"__init__", place(module)}
    assert {name for name in others if RANKS[name] >= RANKS[place(module)]} == set()


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith(("adapters", "spectra"))])
def test_the_mathematics_could_be_lifted_out(module: str) -> None:
    mathematics = "adapters" if module.startswith("adapters") else ("adapters", "spectra")
    assert {name for name in ours(module) if not name.startswith(mathematics)} <= {"registry", "errors"}
    assert foreign(module) & HEAVY <= {"torch", "numpy", "scipy"}


@pytest.mark.parametrize("module", LIGHT)
def test_what_answers_at_once_imports_nothing_heavy(module: str) -> None:
    reached, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += ours(name, only_at_import=True)
    assert {name: heavy for name in reached if (heavy := foreign(name, only_at_import=True) & HEAVY)} == {}


@pytest.mark.parametrize("module", MODULES)
def test_no_import_needs_posix(module: str) -> None:
    assert foreign(module, only_at_import=True) & {"fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"} == set()


def test_pydantic_stays_at_the_edge() -> None:
    assert {name for name in MODULES if "pydantic" in foreign(name)} == {"schema", "recipe"}


@pytest.mark.parametrize("module", [m for m in MODULES if m != "report"])
def test_only_report_prints(module: str) -> None:
    spoken = [
        ast.unparse(node)
        for node in ast.walk(tree(module))
        if (isinstance(node, ast.Name) and node.id == "print")
        or (isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stdout", "sys.stderr", "typer.echo"))
        or (isinstance(node, ast.Attribute) and node.attr in ("print_exc", "print_exception"))
    ]
    # The version is printed without the time it takes to import rich; a bug's traceback is for --debug.
    assert spoken == (["sys.stdout", "traceback.print_exc"] if module == "cli" else [])


def test_only_figures_draw() -> None:
    assert {name for name in MODULES if "matplotlib" in foreign(name)} == {"figures"}
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


def imports(module: str, *, only_at_import: bool) -> Iterator[str]:
    """Dotted names that a module imports; ``from a import b`` gives ``a.b``. Those for type checkers only do not count.

    Args:
        module: name below the package.
        only_at_import: leave out what is imported when a function is called.
    """
    waiting: list[ast.AST] = [tree(module)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if only_at_import and isinstance(node, ast.FunctionDef):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name their module in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        waiting += ast.iter_child_nodes(node)


def ours(module: str, *, only_at_import: bool = False) -> set[str]:
    """Modules of this package that a module imports; ``__init__`` for the package itself."""
    found = set()
    for name in imports(module, only_at_import=only_at_import):
        if name.split(".")[0] == "mirrortune":
            inner = name.removeprefix("mirrortune").removeprefix(".")
            while inner and inner not in MODULES:
                inner = inner.rpartition(".")[0]
            found.add(inner or "__init__")
    return found


def foreign(module: str, *, only_at_import: bool = False) -> set[str]:
    """Top-level packages of others that a module imports."""
    return {name.split(".")[0] for name in imports(module, only_at_import=only_at_import)} - {"mirrortune"}
