# SPDX-License-Identifier: Apache-2.0
"""optim: groups of parameters, and the learning rate as a function of the step."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mirrortune.adapters.inject import adapter_parameters, attachment, plain_parameters
from mirrortune.adapters.spec import AdapterSpec
from mirrortune.training.optim import Schedule, build_optimizer, lr_factor, set_lr
from tests.tiny_runs import adapt

SCHEDULES: list[Schedule] = ["linear", "cosine", "constant"]
TOTALS = st.integers(1, 300)


def factors(total: int, warmup: int, schedule: Schedule) -> list[float]:
    """The factor of every step of a run."""
    return [lr_factor(step, total_steps=total, warmup_steps=warmup, schedule=schedule) for step in range(total)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(total=TOTALS, share=st.floats(0, 1))
def test_every_step_moves_and_none_exceeds_the_peak(schedule: Schedule, total: int, share: float) -> None:
    found = factors(total, math.ceil(share * total), schedule)
    assert all(0 < factor <= 1 for factor in found)


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(total=st.integers(2, 300), share=st.floats(0, 0.9))
def test_it_rises_to_the_peak_and_falls_from_it(schedule: Schedule, total: int, share: float) -> None:
    warmup = math.ceil(share * total)
    found = factors(total, warmup, schedule)
    assert found[: warmup + 1] == sorted(found[: warmup + 1])
    assert found[warmup:] == sorted(found[warmup:], reverse=True)
    if warmup < total:
        assert found[warmup] == 1
    steps = [b - a for a, b in itertools.pairwise(found[: warmup + 1])]
    assert steps == pytest.approx([1 / (warmup + 1)] * len(steps))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@given(total=TOTALS, share=st.floats(0, 0.9))
def test_the_step_after_the_last_would_not_move(schedule: Schedule, total: int, share: float) -> None:
    warmup = min(math.ceil(share * total), total - 1)
    assert lr_factor(total, total_steps=total, warmup_steps=warmup, schedule=schedule) == pytest.approx(0, abs=1e-12)
    assert lr_factor(total + 5, total_steps=total, warmup_steps=warmup, schedule=schedule) == pytest.approx(
        0, abs=1e-12
    )


def test_known_values() -> None:
    assert factors(4, 0, "linear") == [1, 0.75, 0.5, 0.25]
    assert factors(5, 1, "linear") == [0.5, 1, 0.75, 0.5, 0.25]
    assert factors(4, 0, "constant") == [1, 1, 1, 1]
    assert factors(4, 0, "cosine") == pytest.approx([1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4])
    assert factors(1, 1, "linear") == [0.5]  # all of it warm-up


def named_groups(spec: AdapterSpec) -> list[tuple[set[str], float, float]]:
    """(names, peak learning rate, decay) of every group."""
    model = adapt(spec).model
    names = {id(p): n for n, p in {**adapter_parameters(model), **plain_parameters(model)}.items()}
    optimizer = build_optimizer(model, lr=3e-2, head_lr=1e-3, weight_decay=0.1)
    return [({names[id(p)] for p in g["params"]}, g["peak_lr"], g["weight_decay"]) for g in optimizer.param_groups]


def test_angles_and_biases_do_not_decay() -> None:
    cores, biases, matrices = named_groups(AdapterSpec(options={"scale_top_k": 2}))
    assert cores[1:] == (3e-2, 0.0)
    assert {name.rsplit(".", 1)[-1] for name in cores[0]} == {"theta", "scale"}
    assert biases == ({"classifier.bias"}, 1e-3, 0.0)
    assert matrices == ({"classifier.weight"}, 1e-3, 0.1)


@pytest.mark.parametrize("method", ["mirror", "none", "bitfit", "full"])
def test_every_trained_parameter_is_in_one_group(method: str) -> None:
    model = adapt(AdapterSpec(method=method)).model
    optimizer = build_optimizer(model, lr=1e-3, head_lr=1e-2, weight_decay=0.1)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters() if p.requires_grad and p.numel()}
    assert len(grouped) == len({id(p) for p in grouped})
    head = {id(p) for n, p in model.named_parameters() if n in attachment(model).targets.head}
    for group in optimizer.param_groups:
        inside = {id(p) in head for p in group["params"]}
        assert inside == {group["peak_lr"] == 1e-2}
        decays = group["weight_decay"] > 0
        assert all((p.ndim >= 2) == decays for p in group["params"])


def test_set_lr_scales_every_groups_own_peak() -> None:
    optimizer = build_optimizer(adapt().model, lr=3e-2, head_lr=1e-3, weight_decay=0.1)
    set_lr(optimizer, 0.5)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [5e-4, 1.5e-2]
    set_lr(optimizer, 1.0)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [1e-3, 3e-2]


def test_the_optimizer_is_adamw_with_its_usual_numbers() -> None:
    optimizer = build_optimizer(adapt().model, lr=3e-2, head_lr=1e-3, weight_decay=0.0)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.9, 0.999), 1e-8)}
