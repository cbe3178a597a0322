# SPDX-License-Identifier: Apache-2.0
"""planning: what is said of a run before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from mirrortune import attach, save_adapter
from mirrortune.adapters.spec import AdapterSpec
from mirrortune.runs.size import Plan, make_plan, percent
from tests.tiny_models import tiny_bert, tiny_causal


def test_a_share_shows_its_first_two_digits() -> None:
    shares = (0.5, 0.01234567, 0.000314159, 3.14159e-6, 3.14159e-9, 0.0)
    assert [percent(share) for share in shares] == [
        "50.000%", "1.235%", "0.031%", "0.00031%", "0.00000031%", "0.000%"
    ]  # fmt: skip


def test_a_model_without_a_head_has_none_in_its_plan() -> None:
    with_head = make_plan(tiny_bert(), AdapterSpec()).lines()[-1]
    without = make_plan(tiny_causal(), AdapterSpec()).lines()[-1]
    assert "in the task head" in with_head
    assert "head" not in without


def bert_base(rank: int | str) -> Plan:
    """Query and value of a BERT-base."""
    with torch.device("meta"):
        model = BertModel(BertConfig())
    spec = AdapterSpec(rank=rank, target_modules="query|value")  # type: ignore[arg-type]
    return make_plan(model, spec)


@pytest.mark.parametrize("rank", [8, 32, 64, "full"])
def test_the_form_and_its_size_are_said_before_the_run(rank: int | str) -> None:
    plan = bert_base(rank)
    said = plan.stored_as("auto", torch.float32)
    assert said is not None
    assert ", compact form (" in said
    assert "adapter.form=portable" in said
    other = plan.stored_as("portable", torch.float32)
    assert other is not None
    assert ", portable form (" in other
    assert "adapter.form=compact" in other


def test_large_matrices_travel_with_their_bases_where_those_are_small() -> None:
    with torch.device("meta"):
        model = nn.ModuleList([nn.Linear(4096, 4096) for _ in range(2)])
    for rank, form in ((16, "portable"), (512, "portable"), (1024, "compact"), ("full", "compact")):
        spec = AdapterSpec(rank=rank)  # type: ignore[arg-type]
        said = make_plan(model, spec).stored_as("auto", torch.bfloat16)
        assert said is not None
        assert f", {form} form (" in said


def test_tuners_of_peft_have_no_form() -> None:
    pytest.importorskip("peft")
    plan = make_plan(tiny_causal(), AdapterSpec(method="lora", rank=2))
    assert plan.stored_as("auto", torch.float32) is None


def test_the_size_that_is_said_is_nearly_that_of_the_file(tmp_path: Path) -> None:
    for form in ("compact", "portable"):
        model = attach(tiny_causal(), rank=8)
        save_adapter(model, tmp_path / form, form=form)  # type: ignore[arg-type]
        size = sum(file.stat().st_size for file in (tmp_path / form).iterdir())
        said = make_plan(tiny_causal(), AdapterSpec(rank=8)).stored_as(form, torch.float32)  # type: ignore[arg-type]
        assert said is not None
        kilobytes = float(said.split("about ")[1].split(" kB")[0])
        assert kilobytes == pytest.approx(size / 1000, rel=0.2)
