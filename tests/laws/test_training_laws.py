# SPDX-License-Identifier: Apache-2.0
"""Laws of the loop: what may move, what must not matter, and that a run can be cut in two without a trace."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from mirrortune.adapters.inject import adapter_parameters, plain_parameters, spectral_layers
from mirrortune.adapters.spec import AdapterSpec
from mirrortune.data.examples import TokenExamples
from mirrortune.errors import InterruptedRun
from mirrortune.tasks.objective import Objective
from mirrortune.training.evaluate import EvalResult, evaluate_split
from tests.tiny_models import FAMILIES, tiny_bert
from tests.tiny_runs import (
    Adapted,
    Watcher,
    adapt,
    classification,
    make_trainer,
    sentences,
    terminate_after,
    terminate_after_rows,
)

SPECS = {
    "mirror": AdapterSpec(),
    "rank 5": AdapterSpec(rank=5),
    "scaled": AdapterSpec(method="neighbor", options={"scale_top_k": "all"}),
    "input side": AdapterSpec(method="random", options={"side": "input"}),
    "all outputs": AdapterSpec(rank="out"),
    "listed rounds": AdapterSpec(pairing=[[[0, 3], [1, 2]], [[0, 1]]], options={"rounds": 2}),
}


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Copies of everything that an adapted model trains."""
    return {n: p.detach().clone() for n, p in {**adapter_parameters(model), **plain_parameters(model)}.items()}


def frozen(model: nn.Module) -> dict[str, Tensor]:
    """Copies of everything else, and of the base weights that factored layers keep outside of their parameters."""
    tensors = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    tensors |= dict(model.named_buffers())
    tensors |= {f"{n}.weight": layer.base_layer.weight for n, layer in spectral_layers(model).items()}
    return {n: t.detach().clone() for n, t in tensors.items()}


def with_dropout(trained: int | None = None) -> Adapted:
    """An adapted model that draws random numbers at every training step."""
    return adapt(model=tiny_bert(dropout=0.2), trained=trained)


def seed_everything(seed: int) -> None:
    """Every generator that a model may draw from."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_only_the_core_and_the_head_move(tmp_path: Path, spec: AdapterSpec) -> None:
    adapted = adapt(spec, trained=None)
    before, still = trained(adapted.model), frozen(adapted.model)
    make_trainer(tmp_path / "run", adapted=adapted, max_steps=3).fit()
    after = frozen(adapted.model)
    assert after.keys() == still.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in still.items())
    moved = trained(adapted.model)
    assert all(not torch.equal(moved[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_its_core_and_head_alone(family: str) -> None:
    adapted = adapt(model=FAMILIES[family](), trained=None)
    still = frozen(adapted.model)
    optimizer = torch.optim.AdamW([p for p in adapted.model.parameters() if p.requires_grad], lr=1e-2)
    before = trained(adapted.model)
    ids = torch.randint(5, 45, (4, 9), generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        loss = nn.functional.cross_entropy(adapted.model(input_ids=ids).logits, torch.tensor([0, 1, 1, 0]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(tensor, still[name]) for name, tensor in frozen(adapted.model).items())
    assert all(not torch.equal(tensor, before[name]) for name, tensor in trained(adapted.model).items())


@pytest.mark.parametrize("weights", [None, np.array([0.2, 2], np.float32)])
def test_how_a_batch_is_cut_does_not_matter(tmp_path: Path, weights: Any) -> None:
    """30 ragged rows in global batches of 8: the last one has 6, so that some of 8 micro-batches are empty."""
    results = {}
    for batch_size, accumulation in ((8, 1), (4, 2), (2, 4), (1, 8)):
        adapted = adapt(trained=None)
        adapted.model.double()  # so that rounding is far below Adam's epsilon, which would turn it into steps
        watcher = Watcher()
        trainer = make_trainer(
            tmp_path / f"{batch_size}x{accumulation}",
            adapted=adapted,
            progress=watcher,
            batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            epochs=1.5,
            objective=Objective(classification(), weights=weights),
        )
        trainer.fit()
        assert sorted(watcher.rows[:4]) == [6, 8, 8, 8]
        results[batch_size] = trained(adapted.model), watcher.losses
    for numbers, losses in results.values():
        # Logits are float64; the loss itself is taken in float32, of which 2e-7 is two roundings.
        np.testing.assert_allclose(losses, results[8][1], rtol=2e-7)
        for name, tensor in numbers.items():
            torch.testing.assert_close(tensor, results[8][0][name], rtol=1e-5, atol=1e-7)


def test_the_step_is_that_of_the_mean_loss_over_the_global_batch(tmp_path: Path) -> None:
    """Against a plain loop: one batch, mean cross-entropy, AdamW."""
    train = sentences(6)
    adapted, reference = adapt(trained=None), adapt(trained=None)
    for one in (adapted, reference):
        one.model.double()
    options: dict[str, Any] = {"warmup_ratio": 0.0, "schedule": "constant", "weight_decay": 0.0, "max_grad_norm": 1e9}
    trainer = make_trainer(
        tmp_path, adapted=adapted, train=train, batch_size=2, gradient_accumulation_steps=3, max_steps=1, **options
    )
    trainer.fit()
    cores = list(adapter_parameters(reference.model).values())
    heads = list(plain_parameters(reference.model).values())
    optimizer = torch.optim.AdamW([{"params": cores, "lr": 3e-2}, {"params": heads, "lr": 1e-2}], weight_decay=0.0)
    batch = train.batch(np.arange(6))
    targets = batch.pop("targets")
    nn.functional.cross_entropy(reference.model(**batch).logits, targets).backward()
    optimizer.step()
    for name, tensor in trained(adapted.model).items():
        torch.testing.assert_close(tensor, trained(reference.model)[name], rtol=1e-5, atol=1e-7)


class Killed(BaseException):
    """The process is gone, as after SIGKILL: nothing is saved any more."""


def kill_after(step: int) -> Watcher:
    """A progress that ends the process after ``step``."""

    def act(done: int) -> None:
        if done == step:
            raise Killed

    return Watcher(act)


def differences(a: Path, b: Path) -> list[str]:
    """What two run directories do not agree on, bit for bit, of everything that the loop decides."""
    found = [] if (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes() else ["metrics.jsonl"]
    files = [{p.relative_to(run) for p in run.glob("*/**/*") if p.is_file()} for run in (a, b)]
    assert files[0], "nothing to compare"
    found += [str(path) for path in files[0] ^ files[1]]
    for path in files[0] & files[1]:
        if path.suffix != ".safetensors":
            is_same = path.suffix != ".json" or _decided(a / path) == _decided(b / path)
            found += [] if is_same else [str(path)]
            continue
        one, other = load_file(a / path), load_file(b / path)
        found += [f"{path}: {n}" for n in {*one} | {*other} if not _equal(one.get(n), other.get(n))]
    return sorted(found)


def _decided(path: Path) -> Any:
    content = json.loads(path.read_bytes())
    times = {"train_seconds", "median_step_seconds"} if path.name == "state.json" else set()
    return {key: value for key, value in content.items() if key not in times}


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


UNEQUAL = Objective(
    classification(), weights=np.array([1, 3], np.float32), smoothing=0.1, classes=np.arange(30) % 5 // 4
)
# 30 rows in batches of 8: four steps an epoch. Step 5 is in the middle of the second epoch, step 4 at its border.
CUTS: dict[str, tuple[Watcher, dict[str, Any]]] = {
    "terminated in an epoch": (terminate_after(5), {}),
    "terminated between epochs": (terminate_after(4), {}),
    "terminated after the first step": (terminate_after(1), {}),
    "terminated in an evaluation that was the best": (terminate_after_rows(16), {}),
    "terminated in a later evaluation": (terminate_after_rows(36), {"save_every_steps": 3, "keep": 2}),
    "terminated in the last evaluation": (terminate_after_rows(56), {}),
    "terminated where nothing was due, and more are kept": (terminate_after(5), {"save_every_steps": 2, "keep": 3}),
    "killed two steps after a checkpoint": (
        kill_after(8),
        {"save_every_steps": 3, "eval_every_steps": 6, "log_every_steps": 1},
    ),
    "killed before any checkpoint": (kill_after(2), {}),
    "terminated where classes are weighed and drawn evenly": (terminate_after(5), {"objective": UNEQUAL}),
}


@pytest.mark.parametrize("cut", CUTS)
def test_ten_steps_are_five_and_five(tmp_path: Path, cut: str) -> None:
    watcher, settings = CUTS[cut]
    settings = {"epochs": 10, "max_steps": 10, "log_every_steps": 2, **settings}
    seed_everything(1)
    whole = make_trainer(tmp_path / "whole", adapted=with_dropout(), **settings)
    whole.fit()
    seed_everything(1)
    first = make_trainer(tmp_path / "cut", adapted=with_dropout(), progress=watcher, **settings)
    with pytest.raises((InterruptedRun, Killed)):
        first.fit()
    begins_anew = cut == "killed before any checkpoint"
    seed_everything(1 if begins_anew else 999)  # a run that begins anew is seeded by its caller
    # Other numbers in core and head: every one of them must come from the checkpoint.
    adapted = with_dropout(trained=None if begins_anew else 7)
    second = make_trainer(tmp_path / "cut", adapted=adapted, fresh=False, **settings)
    second.resume()
    assert second.fit().metrics == whole.state.best_metrics
    assert differences(tmp_path / "whole", tmp_path / "cut") == []
    for name, tensor in trained(whole.bare_model).items():
        assert torch.equal(trained(adapted.model)[name], tensor)


def test_a_cut_run_differs_without_its_random_state(tmp_path: Path) -> None:
    """That dropout takes part in the law above: with another seed the second half comes out differently."""
    runs = []
    for seed in (1, 2):
        seed_everything(seed)
        trainer = make_trainer(tmp_path / str(seed), adapted=with_dropout(), max_steps=3)
        trainer.fit()
        runs.append((tmp_path / str(seed) / "metrics.jsonl").read_bytes())
    assert runs[0] != runs[1]


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_the_same_seed_gives_the_same_run(tmp_path: Path, spec: AdapterSpec) -> None:
    for name in ("a", "b"):
        seed_everything(4)
        adapted = adapt(spec, model=tiny_bert(dropout=0.2), trained=None)
        make_trainer(tmp_path / name, adapted=adapted, max_steps=5, seed=3).fit()
    assert differences(tmp_path / "a", tmp_path / "b") == []


def test_threads_that_make_batches_change_nothing(tmp_path: Path) -> None:
    for workers in (0, 1, 4):
        seed_everything(4)
        settings = {"max_steps": 6, "gradient_accumulation_steps": 2, "batch_size": 4, "num_workers": workers}
        make_trainer(tmp_path / str(workers), adapted=with_dropout(), **settings).fit()
    assert differences(tmp_path / "0", tmp_path / "1") == []
    assert differences(tmp_path / "0", tmp_path / "4") == []


def test_another_seed_gives_another_order(tmp_path: Path) -> None:
    losses = []
    for seed in (0, 1):
        watcher = Watcher()
        make_trainer(tmp_path / str(seed), progress=watcher, max_steps=3, seed=seed).fit()
        losses.append(watcher.losses)
    assert losses[0] != losses[1]


def score(model: nn.Module, encoded: TokenExamples, batch_size: int) -> EvalResult:
    """A split's evaluation."""
    accelerator = Accelerator(cpu=True)
    return evaluate_split(model, classification(), encoded, accelerator, batch_size=batch_size, source="rows")


def reordered(encoded: TokenExamples, order: list[int]) -> TokenExamples:
    """The same rows in another order."""
    pieces = [slice(encoded.offsets[i], encoded.offsets[i + 1]) for i in order]
    return replace(
        encoded,
        features={n: np.concatenate([values[piece] for piece in pieces]) for n, values in encoded.features.items()},
        offsets=np.concatenate([[0], np.cumsum(encoded.lengths[order])]),
        targets=encoded.targets[order],
    )


@pytest.mark.parametrize("batch_size", [1, 2, 7, 20, 64])
def test_scores_do_not_depend_on_padding(batch_size: int) -> None:
    # In float64, so that the order of sums, which the padded shapes decide, is far below what is compared (the loss and
    # the returned logits are float32).
    model, rows = adapt().model.double(), sentences(20)
    alone, found = score(model, rows, 1), score(model, rows, batch_size)
    np.testing.assert_allclose(found.judged, alone.judged, rtol=2e-7)
    assert found.metrics == pytest.approx(alone.metrics, rel=2e-7)
    assert found.rows == 20


def test_scores_do_not_depend_on_the_order_or_the_company_of_rows() -> None:
    model, rows = adapt().model.double(), sentences(20)
    found = score(model, rows, 8)
    order = list(np.random.default_rng(1).permutation(20))
    turned = score(model, reordered(rows, order), 8)
    np.testing.assert_allclose(turned.judged, np.stack(found.judged)[order], rtol=2e-7)
    assert turned.metrics == pytest.approx(found.metrics, rel=2e-7)
    halves = [score(model, reordered(rows, part), 8) for part in (order[:10], order[10:])]
    for name, value in found.metrics.items():  # both are means over rows
        assert sum(half.metrics[name] for half in halves) / 2 == pytest.approx(value, rel=2e-7)


def test_the_training_loss_does_not_depend_on_padding(tmp_path: Path) -> None:
    losses = []
    for batch_size in (8, 1):
        watcher, adapted = Watcher(), adapt(trained=None)
        adapted.model.double()
        make_trainer(
            tmp_path / str(batch_size),
            adapted=adapted,
            progress=watcher,
            train=sentences(8),
            batch_size=batch_size,
            gradient_accumulation_steps=8 // batch_size,
            max_steps=1,
        ).fit()
        losses += watcher.losses
    assert losses[1] == pytest.approx(losses[0], rel=2e-7)


@pytest.mark.parametrize("make", [lambda: adapt(trained=None), with_dropout], ids=["without dropout", "with dropout"])
def test_every_row_is_trained_on_once_an_epoch(tmp_path: Path, make: Callable[[], Adapted]) -> None:
    watcher = Watcher()
    make_trainer(tmp_path, adapted=make(), progress=watcher, epochs=2).fit()
    assert watcher.rows.count(8) == 6
    assert watcher.rows.count(6) == 2
    assert sum(watcher.rows) == 60


def test_rotations_learn_what_the_head_alone_cannot(tmp_path: Path) -> None:
    """One random seed; 400 sentences, 8 epochs. Guessing gives a loss of 0.69."""
    losses = {}
    for method in ("none", "mirror"):
        trainer = make_trainer(
            tmp_path / method,
            adapted=adapt(AdapterSpec(method=method), trained=None),
            train=sentences(400),
            validation=sentences(100, seed=5),
            epochs=8,
            batch_size=16,
            lr=5e-2,
            head_lr=3e-2,
        )
        losses[method] = trainer.fit().metrics["loss"]
    assert losses["none"] > 0.65
    assert losses["mirror"] < 0.6
