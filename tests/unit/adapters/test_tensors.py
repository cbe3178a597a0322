# SPDX-License-Identifier: Apache-2.0
"""adapter_parts: the form in which an adapter is saved if none is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mirrortune
from mirrortune.adapters.files.adapter_file import read_adapter
from mirrortune.adapters.files.load import load_into
from mirrortune.adapters.files.tensors import usual_form
from mirrortune.adapters.inject import adapter_parameters
from mirrortune.adapters.svd import Factors, factorize
from mirrortune.errors import VerificationError

SIZE = 96  # more directions than a fingerprint keeps probes of


def model_of(fill: Callable[[Tensor], object]) -> nn.Module:
    """Two linear layers, the first of them with weights of ``fill``."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 8))
    with torch.no_grad():
        fill(model[0].weight)
    return model


def saved(folder: Path, fill: Callable[[Tensor], object], **options: object) -> nn.Module:
    """A trained adapter of such a model."""
    model = mirrortune.attach(model_of(fill), target_modules="0", **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.normal_(std=0.3)
    mirrortune.save_adapter(model, folder)
    return model


def form_of(folder: Path) -> str:
    """The form of a saved adapter."""
    return str(json.loads((folder / "adapter.json").read_text())["form"])


def turned(name: str, weight: Tensor, rank: int) -> Factors:
    """The factors of a weight whose singular values are all the same, as another driver may find them."""
    found = factorize(weight, rank, name=name)
    turn = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    return Factors(U=found.U @ turn, S=found.S, Vh=turn.T @ found.Vh)


@pytest.mark.parametrize("rank", [4, 40, "full"])
def test_an_adapter_is_compact_where_its_basis_can_be_found_again(tmp_path: Path, rank: int | str) -> None:
    saved(tmp_path / "adapter", lambda weight: weight, rank=rank)
    assert form_of(tmp_path / "adapter") == "compact"


def test_it_carries_a_basis_that_no_driver_finds_again(tmp_path: Path) -> None:
    model, x = saved(tmp_path / "adapter", nn.init.orthogonal_), torch.randn(5, SIZE)
    assert form_of(tmp_path / "adapter") == "portable"
    loaded = model_of(nn.init.orthogonal_)
    load_into(loaded, read_adapter(tmp_path / "adapter"), turned)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-6, atol=1e-6)
    mirrortune.save_adapter(model, tmp_path / "compact", form="compact")
    with pytest.raises(VerificationError, match="form='portable'"):
        load_into(model_of(nn.init.orthogonal_), read_adapter(tmp_path / "compact"), turned)


def test_it_carries_the_kept_part_of_a_run_of_equal_values(tmp_path: Path) -> None:
    saved(tmp_path / "adapter", nn.init.orthogonal_, rank=12)
    assert form_of(tmp_path / "adapter") == "portable"


def test_a_basis_in_which_the_adapter_does_nothing_is_left_out(tmp_path: Path) -> None:
    saved(tmp_path / "adapter", nn.init.zeros_)
    assert form_of(tmp_path / "adapter") == "compact"


def test_large_matrices_are_not_decomposed_again_where_their_factors_are_small() -> None:
    bert, llama = (768, 768), (4096, 4096)
    assert usual_form([(bert, 8, 1)] * 24) == "compact"
    assert usual_form([(llama, 8, 1)] * 64) == "portable"
    assert usual_form([(llama, 1024, 1)] * 64) == "compact"  # a quarter of the directions: as large as the weights
    assert usual_form([(bert, 8, 1)] * 24 + [(bert, 768, 1)]) == "compact"
    assert usual_form([((1024, 1024), 8, 128)]) == "portable"  # experts
    assert usual_form([]) == "compact"
