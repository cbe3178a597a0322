# SPDX-License-Identifier: Apache-2.0
"""The guarantee: a reloaded adapter does what the trained one did, to 1e-4 (compact) or 1e-6 (portable) of itself, or
is refused. It never loads wrong.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mirrortune.adapters.files.adapter_file import Form
from mirrortune.adapters.spec import AdapterSpec
from tests.reload_cases import DRIVERS, SPECS, WEIGHTS, random_weight, reload_error, saved

BOUNDS: dict[Form, float] = {"compact": 1e-4, "portable": 1e-6}


# One core of each side, and one of low rank; the others in the slow tests.
METHODS = [pytest.param(m, marks=() if m in ("mirror", "svft banded", "psoft") else pytest.mark.slow) for m in SPECS]


@pytest.mark.parametrize("form", BOUNDS)
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("method", METHODS)
def test_a_reloaded_adapter_is_right_or_refused(tmp_path: Path, form: Form, kind: str, method: str) -> None:
    check_all_drivers(tmp_path, form, kind, method, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["random", "exactly repeated", "exactly rank-deficient"])
def test_so_it_is_in_16_bits(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    check_all_drivers(tmp_path, "compact", kind, "mirror", dtype)


def check_all_drivers(folder: Path, form: Form, kind: str, method: str, dtype: torch.dtype) -> None:
    """Save one adapter and load it by every driver's basis."""
    weight = WEIGHTS[kind](32, 40).to(dtype)
    expected = saved(weight, SPECS[method], folder / "adapter", form)
    for name, driver in DRIVERS.items():
        error = reload_error(weight, folder / "adapter", driver, expected)
        assert error is None or error <= BOUNDS[form], name
        # What must load: the same driver, any good one where the basis is unique, any at all beside the factors.
        is_easy = name == "the same" or form == "portable" or (kind == "random" and name != "gesdd in float32")
        assert error is not None or not is_easy, name


@pytest.mark.parametrize("name", ["gesvd", "eigh of the Gram matrix", "permuted and flipped", "gesdd"])
@pytest.mark.parametrize("kind", ["repeated singular values", "rank-deficient"])
@pytest.mark.parametrize("method", ["mirror", "svft banded", "input side"])
def test_near_equal_singular_values_are_repaired(tmp_path: Path, kind: str, method: str, name: str) -> None:
    """In float64 these are equal to rounding: every driver mixes their vectors, and they are turned back."""
    weight = WEIGHTS[kind](48, 48)
    expected = saved(weight, SPECS[method], tmp_path / "adapter", "compact")
    error = reload_error(weight, tmp_path / "adapter", DRIVERS[name], expected)
    if kind == "rank-deficient" and name.startswith("eigh"):
        assert error is None or error <= 1e-4  # Gram matrices have no vectors of value zero to offer on one side
    else:
        assert error is not None
        assert error <= 1e-6


@pytest.mark.parametrize("form", BOUNDS)
def test_a_weight_stored_in_16_bits_may_be_loaded_in_32(tmp_path: Path, form: Form) -> None:
    for stored in (torch.bfloat16, torch.float16):
        weight = random_weight(40, 48).to(stored)
        expected = saved(weight, AdapterSpec(), tmp_path / "narrow", form)
        error = reload_error(weight.float(), tmp_path / "narrow", DRIVERS["gesvd"], expected)
        assert error is not None
        assert error <= BOUNDS[form]
        # The other way its factors would be rounded.
        expected = saved(weight.float(), AdapterSpec(), tmp_path / "wide", form)
        assert reload_error(weight, tmp_path / "wide", DRIVERS["gesvd"], expected) is None


def test_other_weights_are_refused_in_every_form(tmp_path: Path) -> None:
    weight = random_weight(40, 48).float()
    for form in BOUNDS:
        expected = saved(weight, AdapterSpec(rank=4), tmp_path / form, form)
        other = weight.clone()
        other[3, 4] = torch.nextafter(other[3, 4], torch.tensor(9.0))
        assert reload_error(other, tmp_path / form, DRIVERS["the same"], expected) is None
