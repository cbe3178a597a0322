# SPDX-License-Identifier: Apache-2.0
"""Calibration: what it measures is the gradient of the angles, and the model is left as it was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

import mirrortune
from mirrortune.adapters.files.adapter_file import read_adapter
from mirrortune.adapters.files.load import stored_pairs
from mirrortune.adapters.inject import adapter_parameters, attach
from mirrortune.adapters.spec import AdapterSpec, make_pairs
from mirrortune.adapters.svd import Factors, factorize
from mirrortune.adapters.targets import find_targets
from mirrortune.config import recipe
from mirrortune.data.loader import epoch_batches
from mirrortune.errors import ConfigError, DataError
from mirrortune.merging import write
from mirrortune.runs.evaluate import evaluate
from mirrortune.runs.train import train
from mirrortune.system.console import Reporter
from mirrortune.tasks.objective import Objective
from mirrortune.training.calibration import Calibration, CalibrationSettings
from tests.tiny_models import tiny_bert
from tests.tiny_runs import HEAD, classification, sentences

SPEC = AdapterSpec(method="adaptive")


def settings(**changes: Any) -> CalibrationSettings:
    """All of 12 sentences in one batch, without a warm-up, unless changed."""
    fields = {
        "saliency": "mean",
        "num_batches": 1,
        "warmup_steps": 0,
        "batch_size": 12,
        "head_lr": 1e-2,
        "side": "output",
        "unit": "movement",
        "seed": 0,
    }
    return CalibrationSettings(**{**fields, **changes})


def calibration(model: Any, spec: AdapterSpec, **changes: Any) -> Calibration:
    return Calibration(
        model=model, targets=find_targets(model, spec, HEAD), objective=Objective(classification()),
        examples=sentences(12), settings=settings(**changes), accelerator=Accelerator(cpu=True),
    )  # fmt: skip


def measure(model: Any, **changes: Any) -> dict[str, Tensor]:
    """Saliency of the tiny model on 12 sentences, all of them in one batch unless changed."""
    return calibration(model, SPEC, **changes).measure_saliency(lambda name, weight, rank: factorize(weight, rank))


@pytest.mark.parametrize(
    ("side", "unit"), [("output", "movement"), ("input", "movement"), ("output", "weight"), ("output", "angle")]
)
def test_it_measures_the_gradient_of_every_trained_number(side: str, unit: str) -> None:
    model = tiny_bert()
    saliency = measure(copy.deepcopy(model), side=side, unit=unit)
    spec = AdapterSpec(method="givens", options={"side": side, "unit": unit})
    adapted = attach(model.eval(), spec, new_parameters=HEAD)
    rows = sentences(12)
    batch = rows.batch(np.arange(12))
    targets = batch.pop("targets")
    total, items = classification().loss(batch, adapted(**batch), targets)
    (total / items).backward()
    for name, theta in adapter_parameters(adapted).items():
        layer = name.rsplit(".", 1)[0]
        pairs = adapted.get_submodule(layer).core.pairs
        found = saliency[layer][pairs[:, 0], pairs[:, 1]]
        torch.testing.assert_close(found.float(), theta.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("saliency", ["mean", "rms"])
def test_the_model_is_left_as_it_was(saliency: str) -> None:
    model = tiny_bert().train()
    before = copy.deepcopy(model.state_dict())
    wanted = {n: p.requires_grad for n, p in model.named_parameters()}
    first = measure(model, saliency=saliency, warmup_steps=3, num_batches=2, batch_size=4)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == wanted
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    again = measure(model, saliency=saliency, warmup_steps=3, num_batches=2, batch_size=4)
    assert all(torch.equal(first[n], again[n]) for n in first)


def test_rms_counts_what_batches_pull_in_opposite_directions() -> None:
    mean = measure(tiny_bert(), num_batches=3, batch_size=4)
    rms = measure(tiny_bert(), saliency="rms", num_batches=3, batch_size=4)
    for name, found in mean.items():
        assert (rms[name] >= found.abs() / 3**0.5 - 1e-9).all()  # |sum| <= sqrt(3) times the root of the sum of squares
        assert torch.equal(rms[name], rms[name].T)


def bases_of(model: Any, **changes: Any) -> dict[str, Factors]:
    """Bases of the tiny model's gradients, three directions of each weight."""
    return calibration(model, AdapterSpec(method="lora-sb", rank=3), **changes).measure_bases()


def test_bases_are_those_of_adams_first_step() -> None:
    exact = tiny_bert().eval().double()
    found = bases_of(copy.deepcopy(exact), num_batches=3, batch_size=4)
    order = epoch_batches(sentences(12).lengths, 4, 0, 0, None)
    for rows in order:  # the mean of three batches of equal size, at once
        batch = sentences(12).batch(rows)
        targets = batch.pop("targets")
        total, items = classification().loss(batch, exact(**batch), targets)
        (total / items).backward()
    assert len(found) == 13
    for name, factors in found.items():
        slope = exact.get_submodule(name).weight.grad
        U, S, Vh = torch.linalg.svd(-slope.sign())
        torch.testing.assert_close(factors.U * factors.S @ factors.Vh, U[:, :3] * S[:3] @ Vh[:3])
        torch.testing.assert_close(factors.U.T @ factors.U, torch.eye(3, dtype=torch.float64))


def test_measuring_bases_leaves_the_model_as_it_was() -> None:
    model = tiny_bert().train()
    before = copy.deepcopy(model.state_dict())
    wanted = {n: p.requires_grad for n, p in model.named_parameters()}
    first = bases_of(model, warmup_steps=3, num_batches=2, batch_size=4)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == wanted
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    again = bases_of(model, warmup_steps=3, num_batches=2, batch_size=4)
    assert all(torch.equal(first[n].U, again[n].U) for n in first)


def test_a_weight_without_a_gradient_has_a_basis_and_one_that_is_not_finite_is_named() -> None:
    model = tiny_bert().eval()
    with torch.no_grad():
        model.classifier.weight.zero_()  # so that no gradient comes back
    found = bases_of(model)
    assert all(not factors.S.any() and torch.isfinite(factors.U).all() for factors in found.values())
    with torch.no_grad():
        model.classifier.weight.fill_(float("inf"))
    with pytest.raises(DataError, match=r"pooler|encoder.*gradient of this weight is not finite"):
        bases_of(model)


def test_bases_need_a_task() -> None:
    with pytest.raises(ConfigError, match=r"^method: the bases of 'lora-sb' are measured on a task.*train"):
        mirrortune.attach(tiny_bert(), method="lora-sb", rank=3)


def test_without_a_task_it_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="measured on a task"):
        make_pairs(SPEC, 4, "layer")


@pytest.mark.slow
def test_a_run_keeps_its_pairs_and_a_resumed_run_uses_them(tiny_model_dir: Path, tmp_path: Path) -> None:
    words = ("good", "bad")
    rows = "".join(f"the film was very {words[i % 2]},{words[i % 2]}\n" for i in range(40))
    (tmp_path / "films.csv").write_text("text,label\n" + rows)
    values = {
        "model": {"name": str(tiny_model_dir)},
        "task": {"kind": "text-classification"},
        "data": {"path": str(tmp_path / "films.csv")},
        "adapter": {"method": "adaptive", "calibration_batches": 2, "calibration_warmup_steps": 2},
        "train": {"batch_size": 8, "epochs": 2},
        "output_dir": str(tmp_path / "run"),
    }
    resolved = recipe.resolve([recipe.Layer(values=values, origin="test")])
    quiet = Reporter(verbosity=-1)
    train(resolved, quiet, recipe_name=None)
    pairs = stored_pairs(read_adapter(tmp_path / "run" / "adapter"))
    assert pairs
    assert any(p.tolist() != [[k, len(p) * 2 - 1 - k] for k in range(len(p))] for p in pairs.values())
    scored = evaluate(str(tmp_path / "run"), resolved.recipe, quiet)
    assert scored.metrics["accuracy"] == train(resolved, quiet, recipe_name=None, resume=True).metrics["accuracy"]
    verdict = write.merge([str(tmp_path / "run")], quiet, output_dir=str(tmp_path / "merged"))
    assert verdict.passed


def test_the_warm_up_reads_each_batch_through_the_base_once() -> None:
    model = tiny_bert()
    calls = []
    model.base_model.encoder.register_forward_hook(lambda *_: calls.append(1))
    measure(model, warmup_steps=9, batch_size=4)
    assert len(calls) == 9 + 1  # 9 different batches (of later epochs too), and the one that is measured
    calls.clear()
    measure(model, warmup_steps=200, batch_size=4)
    assert len(calls) == 32 + 1
    assert "forward" not in vars(model.base_model)


def test_a_remembered_base_trains_the_head_as_a_computed_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    remembered = measure(tiny_bert(), warmup_steps=20)
    monkeypatch.setattr(type(tiny_bert()), "base_model_prefix", "nothing")  # so that no base is found
    computed = measure(tiny_bert(), warmup_steps=20)
    for name, saliency in computed.items():
        torch.testing.assert_close(remembered[name], saliency)
