# SPDX-License-Identifier: Apache-2.0
"""The README says what is so: its tree names every module, its examples run, its tables match the code."""

from __future__ import annotations

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


def test_the_tree_names_every_module() -> None:
    tree = next(block for block in blocks("text") if block.startswith("mirrortune/\n"))
    modules = {path.name for path in (ROOT / "mirrortune").rglob("*.py") if path.name[0] != "_"}
    cores_and_tasks = {path.name for path in (ROOT / "mirrortune" / "tasks").glob("*.py")}
    assert {name for name in modules - cores_and_tasks if name not in tree} == set()
    named = set(re.findall(r"\b(\w+\.py)\b", tree))
    assert named - {path.name for path in (ROOT / "mirrortune").rglob("*.py")} == set()


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


def test_the_example_pairing_works_as_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PAIRINGS, "_items", dict(PAIRINGS._items))
    example = next(block for block in blocks("python") if "PAIRINGS.register" in block)
    namespace = {"PAIRINGS": PAIRINGS, "torch": torch, "Generator": torch.Generator, "Tensor": torch.Tensor}
    exec(compile(example, "README.md", "exec"), namespace)
    pairs = spec.make_pairs(spec.AdapterSpec(pairing="halves"), 7, "layer")
    assert pairs.tolist() == [[0, 3], [1, 4], [2, 5]]


def test_the_python_example_runs_as_printed(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "merged").symlink_to(tiny_model_dir)
    for example in (block for block in blocks("python") if "mirrortune.attach" in block):
        exec(compile(example, "README.md", "exec"), {})
    assert (tmp_path / "my-adapter" / "adapter.safetensors").is_file()
    assert (tmp_path / "out" / "checkpoint-2" / "adapter" / "adapter.safetensors").is_file()
