# SPDX-License-Identifier: Apache-2.0
"""adapter_format: every adapter that a version of ours has written loads in this one, with the same effect.

``tests/golden/adapter-format-N`` was written by the last version of format N and is never written again: a base of two
linear layers, its adapter, and what the adapter adds to each weight. A new format adds its golden folder.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import mirrortune
from mirrortune.adapters.files.description import FORMAT_VERSION, description_text, migrate, read_description
from mirrortune.adapters.inject import spectral_layers
from mirrortune.errors import VerificationError
from tests.spectral import relative

GOLDEN = Path(__file__).parents[2] / "golden"
FOLDERS = sorted(GOLDEN.glob("adapter-format-*"))


def base_of(folder: Path) -> nn.Module:
    """The golden base."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    model.load_state_dict(load_file(folder / "base.safetensors"))
    return model


def test_every_format_has_its_golden_folder() -> None:
    assert [folder.name for folder in FOLDERS] == [f"adapter-format-{n}" for n in range(1, FORMAT_VERSION + 1)]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_an_old_adapter_loads_and_does_what_it_did(folder: Path, tmp_path: Path) -> None:
    model = mirrortune.load_adapter(base_of(folder), folder / "adapter")
    expected = load_file(folder / "effect.safetensors")
    layers = spectral_layers(model)
    assert layers.keys() == expected.keys()
    for name, layer in layers.items():
        assert relative(layer.delta_weight(), expected[name]) <= 1e-6
    # Saved again it is of the present format, by the numbers of the weights and not by their bytes.
    mirrortune.save_adapter(model, tmp_path / "again")
    described = json.loads((tmp_path / "again" / "adapter.json").read_text())
    assert described["format_version"] == FORMAT_VERSION
    assert all(layer["weight"].startswith("values:") for layer in described["layers"].values())
    again = mirrortune.load_adapter(base_of(folder), tmp_path / "again")
    for name, layer in spectral_layers(again).items():
        assert relative(layer.delta_weight(), expected[name]) <= 1e-6


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_an_old_adapter_refuses_another_base(folder: Path) -> None:
    model = base_of(folder)
    with torch.no_grad():
        model.get_parameter("0.weight")[0, 0] += 1e-6
    with pytest.raises(VerificationError, match="the base weight is not the one"):
        mirrortune.load_adapter(model, folder / "adapter")


def test_the_present_format_is_left_as_it_is() -> None:
    description = {"format_version": FORMAT_VERSION, "layers": {"a": {"weight": "values:00"}}}
    assert migrate(description) == description


def test_the_text_is_the_description(tmp_path: Path) -> None:
    description = {"format_version": FORMAT_VERSION, "layers": {"é": {"n": [1, 2]}, "b": {}}, "task": None}
    (tmp_path / "adapter.json").write_text(description_text(description), encoding="utf-8")
    assert read_description(tmp_path) == description
    (tmp_path / "adapter.json").write_text(description_text({**description, "layers": {}}), encoding="utf-8")
    assert read_description(tmp_path) == {**description, "layers": {}}


@pytest.mark.parametrize("version", [0, -1, FORMAT_VERSION + 1, "1", True, None, 1.0, [1]])
def test_other_versions_are_refused(tmp_path: Path, version: object) -> None:
    (tmp_path / "adapter.json").write_text(description_text({"format_version": version, "layers": {}}))
    with pytest.raises(VerificationError, match=r"format version|damaged"):
        read_description(tmp_path)
