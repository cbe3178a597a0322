# SPDX-License-Identifier: Apache-2.0
"""bank_file: many adapters in one file or in folders, read when they are needed, damaged or not ours."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mirrortune
from mirrortune.errors import ConfigError, ResourceError, VerificationError
from mirrortune.inference import bank_file
from tests.bank_cases import Cases, logits_of, token_ids, with_classes
from tests.tiny_models import tiny_bert

SETTINGS: dict[str, dict[str, Any]] = {
    "mirror": {"method": "mirror"},
    "second": {"method": "mirror"},
    "random": {"method": "random", "rank": 9},
    "listed": {"method": "givens", "pairing": [[3, 1], [0, 2]], "rank": 6},
    "psoft": {"method": "psoft", "rank": 4},
    "portable": {"method": "speclora", "rank": 2, "form": "portable", "target_modules": "query"},
    "three": {"base": with_classes(tiny_bert(), 3), "method": "scale"},
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """Adapters of many kinds."""
    folder = tmp_path_factory.mktemp("adapters")
    return Cases.make(tiny_bert(), folder, {"input_ids": token_ids(4, 7)}, SETTINGS, logits_of)


@pytest.fixture(scope="module")
def saved(cases: Cases, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of them in one file."""
    path = tmp_path_factory.mktemp("saved") / "all.safetensors"
    cases.bank().save(path)
    return path


def check_all(cases: Cases, bank: mirrortune.AdapterBank) -> None:
    names = [*cases.names, None]
    cases.check(bank, names, [place % 4 for place in range(len(names))])


def test_one_file_holds_all(cases: Cases, saved: Path, tmp_path: Path) -> None:
    bank = mirrortune.AdapterBank.load(copy.deepcopy(cases.base), saved)
    assert bank.names == cases.names
    check_all(cases, bank)
    bank.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").stat().st_size == saved.stat().st_size
    check_all(cases, mirrortune.AdapterBank.load(copy.deepcopy(cases.base), tmp_path / "again.safetensors"))


def test_a_folder_holds_a_folder_for_each(cases: Cases, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    for name in cases.names:
        place = tmp_path / "runs" / name / ("adapter" if name == "psoft" else "")  # a run, or an adapter
        place.parent.mkdir(exist_ok=True)
        place.symlink_to(cases.folder / name)
    (tmp_path / "runs" / "notes").mkdir()
    bank = mirrortune.AdapterBank.load(copy.deepcopy(cases.base), tmp_path / "runs")
    assert sorted(bank.names) == sorted(cases.names)
    check_all(cases, bank)


def test_adapters_are_read_when_they_are_used(cases: Cases, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = bank_file._BankFile.read
    monkeypatch.setattr(bank_file._BankFile, "read", lambda self, name: (read.append(name), real(self, name))[1])
    bank = mirrortune.AdapterBank.load(copy.deepcopy(cases.base), saved)
    assert read == []
    cases.check(bank, ["psoft", None, "mirror"], [0, 1, 2])
    cases.check(bank, ["mirror", "psoft"], [0, 1])
    assert read == ["psoft", "mirror"]
    bank.remove("second")
    bank.add("second", cases.folder / "random")
    with torch.no_grad(), bank.rows(["second"] * 4):
        found = logits_of(bank.model, cases.batch)
    torch.testing.assert_close(found, cases.alone["random"], rtol=1e-6, atol=1e-6)


def test_what_adapters_have_in_common_is_stored_once(cases: Cases, tmp_path: Path) -> None:
    def size(names: list[str]) -> int:
        bank = mirrortune.AdapterBank(copy.deepcopy(cases.base))
        for index, name in enumerate(names):
            bank.add(str(index), cases.folder / name)
        bank.save(tmp_path / "some.safetensors")
        return (tmp_path / "some.safetensors").stat().st_size

    one, two = size(["mirror"]), size(["mirror", "second"])
    alone = (cases.folder / "second" / "adapter.safetensors").stat().st_size
    assert two - one < alone + 1000, "of a second adapter its own numbers are stored, and no description"


def test_a_bank_file_is_replaced_and_nothing_else(cases: Cases, saved: Path, tmp_path: Path) -> None:
    bank = cases.bank(["mirror"])
    copied = tmp_path / "bank.safetensors"
    copied.write_bytes(saved.read_bytes())
    bank.save(copied)
    assert mirrortune.AdapterBank.load(copy.deepcopy(cases.base), copied).names == ["mirror"]

    weights = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(2)}, weights)
    before = weights.read_bytes()
    for path, said in (
        (weights, "was not written by AdapterBank.save"),
        (tmp_path / "bank.bin", r"a name that ends in \.safetensors"),
        (tmp_path, "a name that ends in"),
        (tmp_path / "model.safetensors" / "bank.safetensors", "is a file"),
    ):
        with pytest.raises(ConfigError, match=said):
            bank.save(path)
    assert weights.read_bytes() == before
    (tmp_path / "link.safetensors").symlink_to(copied)
    with pytest.raises(ConfigError, match="symbolic link"):
        bank.save(tmp_path / "link.safetensors")


def test_a_file_that_cannot_be_written_leaves_the_old_one(
    cases: Cases, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = tmp_path / "bank.safetensors"
    copied.write_bytes(saved.read_bytes())

    def fail(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(bank_file, "save_file", fail)
    with pytest.raises(ResourceError, match="the disk is full"):
        cases.bank(["mirror"]).save(copied)
    assert copied.read_bytes() == saved.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["bank.safetensors"]


def test_an_open_bank_does_not_see_a_file_that_takes_its_place(cases: Cases, saved: Path, tmp_path: Path) -> None:
    copied = tmp_path / "bank.safetensors"
    copied.write_bytes(saved.read_bytes())
    bank = mirrortune.AdapterBank.load(copy.deepcopy(cases.base), copied)
    cases.bank(["mirror"]).save(copied)
    check_all(cases, bank)


def edited(saved: Path, path: Path, edit: Any, *, rehash: bool = True) -> Path:
    """A copy of the file with another description."""
    with safe_open(saved, framework="pt") as file:
        content = json.loads(file.metadata()["mirrortune_bank"])
    edit(content)
    if rehash:
        content.pop("sha256")
        content["sha256"] = bank_file._digest(content)
    save_file(load_file(saved), path, {"mirrortune_bank": json.dumps(content)})
    return path


@pytest.mark.parametrize(
    ("edit", "rehash", "said"),
    [
        (lambda c: c["adapters"].pop("mirror"), False, "another hash"),
        (lambda c: c.update(version=2), True, "version 2, upgrade mirrortune"),
        (lambda c: c["adapters"]["mirror"].update(description=99), True, "adapter 'mirror'"),
        (lambda c: c["adapters"]["mirror"]["tensors"].update({"core.theta": "t999"}), True, "adapter 'mirror'"),
        (lambda c: c["adapters"]["mirror"]["own"].update(layers={}), True, "adapter 'mirror'"),
        (lambda c: c.pop("adapters"), True, "KeyError"),
    ],
)
def test_descriptions_that_cannot_be_meant(
    edit: Any, rehash: bool, said: str, cases: Cases, saved: Path, tmp_path: Path
) -> None:
    path = edited(saved, tmp_path / "bank.safetensors", edit, rehash=rehash)
    with pytest.raises(VerificationError, match=said):
        mirrortune.AdapterBank.load(copy.deepcopy(cases.base), path)


def test_damage_is_found_when_an_adapter_is_read(cases: Cases, saved: Path, tmp_path: Path) -> None:
    tensors = load_file(saved)
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
    content = json.loads(metadata["mirrortune_bank"])
    tensors[content["adapters"]["mirror"]["tensors"]["core.theta"]][0] += 1
    save_file(tensors, tmp_path / "bank.safetensors", metadata)
    bank = mirrortune.AdapterBank.load(copy.deepcopy(cases.base), tmp_path / "bank.safetensors")
    cases.check(bank, ["second"], [0])
    with pytest.raises(VerificationError, match="has another hash"), bank.rows(["mirror"]):
        pass


def test_numbers_of_another_adapter_are_refused(cases: Cases, saved: Path, tmp_path: Path) -> None:
    def swap(content: dict[str, Any]) -> None:
        own, other = (content["adapters"][name]["tensors"] for name in ("mirror", "second"))
        own["core.theta"] = other["core.theta"]

    path = edited(saved, tmp_path / "bank.safetensors", swap)
    bank = mirrortune.AdapterBank.load(copy.deepcopy(cases.base), path)
    with pytest.raises(VerificationError, match="changes this weight differently"), bank.rows(["mirror"]):
        pass


@pytest.mark.parametrize("content", [None, b"", b"no safetensors", "plain"])
def test_what_holds_no_adapters(content: bytes | str | None, cases: Cases, tmp_path: Path) -> None:
    path = tmp_path / "bank.safetensors"
    if content == "plain":
        save_file({"w": torch.ones(2)}, path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises((ConfigError, VerificationError), match=r"no adapters are there|damaged|holds no adapters"):
        mirrortune.AdapterBank.load(copy.deepcopy(cases.base), path)
    with pytest.raises(ConfigError, match="no adapters are there"):
        mirrortune.AdapterBank.load(copy.deepcopy(cases.base), tmp_path)
