# SPDX-License-Identifier: Apache-2.0
"""The README says what is so: its examples run, its tables match the code."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch

from mirrortune import errors
from mirrortune.adapters import spec
from mirrortune.adapters.pairings import PAIRINGS
from mirrortune.adapters.presets import method_names
from mirrortune.recipe import shipped_recipes

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_no_output_is_left_to_be_filled_in() -> None:
    assert "@@" not in README


def test_every_method_recipe_and_exit_code_is_named() -> None:
    for method in method_names():
        assert f"`{method}`" in README
    for name in shipped_recipes():
        assert name in README
    codes = {
        e.exit_code for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.MirrortuneError)
    }
    for code in codes:
        assert re.search(rf"^\| {code} \|", README, flags=re.MULTILINE)


@pytest.mark.parametrize("results", ["movie-sentences", "fashion-mnist", "rates"])
def test_tables_of_results_are_those_that_are_kept(results: str) -> None:
    kept = (ROOT / "tests" / "bench" / "results" / results / "table.md").read_text(encoding="utf-8")
    assert [line for line in kept.splitlines() if line.startswith("|") and line not in README.splitlines()] == []


def test_the_table_of_steps_is_that_of_the_bench() -> None:
    kept = (ROOT / "tests" / "bench" / "results" / "methods-cpu-1024" / "table.md").read_text(encoding="utf-8")
    measured = {cells[1].strip(): cells[4:8] for line in kept.splitlines() if len(cells := line.split("|")) == 10}
    table = README[README.index("| method | step | step, of the frozen backbone's |") :].partition("\n\n")[0]
    rows = [line.split("|") for line in table.splitlines()[2:]]
    assert len(rows) > 5
    for cells in rows:
        assert cells[2:6] == measured[cells[1].strip().replace(" --rank ", " r=")]


def test_the_example_pairing_works_as_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PAIRINGS, "_items", dict(PAIRINGS._items))
    example = next(block for block in blocks("python") if "PAIRINGS.register" in block)
    namespace = {"PAIRINGS": PAIRINGS, "torch": torch, "Generator": torch.Generator, "Tensor": torch.Tensor}
    exec(compile(example, "README.md", "exec"), namespace)
    pairs = spec.make_pairs(spec.AdapterSpec(pairing="halves"), 7, "layer")
    assert pairs.tolist() == [[0, 3], [1, 4], [2, 5]]


def examples() -> list[str]:
    """What the README does in Python, in order; one goes on where another ended."""
    section = README[README.index("## In Python") : README.index("## What is where")]
    return re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)


def run_all(some: list[str], namespace: dict[str, object] | None = None) -> dict[str, object]:
    """Run examples one after another, as printed; returns the names that they leave."""
    namespace = {} if namespace is None else namespace
    for example in some:
        exec(compile(example, "README.md", "exec"), namespace)
    return namespace


def test_the_python_examples_run_as_printed(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # The same graphs; what a C++ compiler makes of them is the slow tests' to see.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    (tmp_path / "merged").symlink_to(tiny_model_dir)
    assert len(examples()) == 5
    run_all([example for example in examples() if "import trl" not in example])
    assert (tmp_path / "my-adapter" / "adapter.safetensors").is_file()
    assert (tmp_path / "out" / "checkpoint-2" / "adapter" / "adapter.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # what torch's own compiler imports
def test_they_run_with_the_default_compiler(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "merged").symlink_to(tiny_model_dir)
    plain, compiled = examples()[:2]
    left = run_all([plain])
    saved = tmp_path / "my-adapter" / "adapter.safetensors"
    before = saved.read_bytes()
    run_all([compiled], left)
    assert saved.read_bytes() != before, "the step through the compiled model moved nothing"


@pytest.mark.sft
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # TRL's own
def test_the_example_of_trl_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    from tests.tiny_models import write_tiny_causal

    monkeypatch.chdir(tmp_path)
    write_tiny_causal(tmp_path / "language-model")
    run_all(["import mirrortune", *(example for example in examples() if "import trl" in example)])
    assert (tmp_path / "sft" / "checkpoint-2" / "adapter" / "adapter.safetensors").is_file()
    assert not list((tmp_path / "sft").rglob("model*.safetensors"))
