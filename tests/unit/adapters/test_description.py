# SPDX-License-Identifier: Apache-2.0
"""description: the text of adapter.json, and a stored adapter that every later version must read with the same effect.

``tests/golden/adapter-format-1`` is never written again: a base of two linear layers, its adapter, and what the adapter
adds to each weight.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import mirrortune
from mirrortune.adapters.files.description import FORMAT_VERSION, description_text, read_description
from mirrortune.adapters.inject import spectral_layers
from mirrortune.errors import VerificationError
from tests.spectral import relative

GOLDEN = Path(__file__).parents[2] / "golden" / "adapter-format-1"


def base() -> nn.Module:
    """The golden base."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    model.load_state_dict(load_file(GOLDEN / "base.safetensors"))
    return model


def test_the_golden_adapter_loads_and_does_what_it_did(tmp_path: Path) -> None:
    model = mirrortune.load_adapter(base(), GOLDEN / "adapter")
    expected = load_file(GOLDEN / "effect.safetensors")
    layers = spectral_layers(model)
    assert layers.keys() == expected.keys()
    for name, layer in layers.items():
        assert relative(layer.delta_weight(), expected[name]) <= 1e-6
    # Saved again it says the same, and names the base's other weights (it was written before these were recorded).
    mirrortune.save_adapter(model, tmp_path / "again")
    hashes = {"tensors_sha256", "mirrortune_version"}
    stored, again = (
        {key: value for key, value in json.loads((folder / "adapter.json").read_text()).items() if key not in hashes}
        for folder in (GOLDEN / "adapter", tmp_path / "again")
    )
    assert len(again.pop("frozen")) == 2 * 8, "of two biases"
    assert {**again, "description_sha256": ""} == {**stored, "description_sha256": ""}
    before, after = (load_file(f / "adapter.safetensors") for f in (GOLDEN / "adapter", tmp_path / "again"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-6 if name == "effects" else 0, atol=0)


def test_the_golden_adapter_refuses_another_base() -> None:
    model = base()
    with torch.no_grad():
        model.get_parameter("0.weight")[0, 0] += 1e-6
    with pytest.raises(VerificationError, match="the base weight is not the one"):
        mirrortune.load_adapter(model, GOLDEN / "adapter")


def test_the_text_is_the_description(tmp_path: Path) -> None:
    description = {"format_version": FORMAT_VERSION, "layers": {"é": {"n": [1, 2]}, "b": {}}, "task": None}
    (tmp_path / "adapter.json").write_text(description_text(description), encoding="utf-8")
    assert read_description(tmp_path) == description
    (tmp_path / "adapter.json").write_text(description_text({**description, "layers": {}}), encoding="utf-8")
    assert read_description(tmp_path) == {**description, "layers": {}}


@pytest.mark.parametrize("version", [0, -1, 2, 3, 4, FORMAT_VERSION + 1, "1", True, None, 1.0, [1]])
def test_other_versions_are_refused(tmp_path: Path, version: object) -> None:
    (tmp_path / "adapter.json").write_text(description_text({"format_version": version, "layers": {}}))
    with pytest.raises(VerificationError, match=r"format version .*Allowed: 1\. Upgrade mirrortune"):
        read_description(tmp_path)
