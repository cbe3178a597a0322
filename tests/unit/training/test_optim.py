# SPDX-License-Identifier: Apache-2.0
"""optim: groups, learning rates, and every optimizer: it learns, continues and skips, or is refused."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from mirrortune.adapters.files.adapter_file import read_adapter
from mirrortune.adapters.inject import adapter_parameters, attachment, plain_parameters
from mirrortune.adapters.spec import AdapterSpec
from mirrortune.config.recipe import override_layer, resolve
from mirrortune.errors import ConfigError, DivergedError, InterruptedRun
from mirrortune.runs.checks import problems_of_names
from mirrortune.system.distributed.processes import make_accelerator
from mirrortune.training.optim import OptimizerSettings, build_optimizer, hidden_matrices, set_lr
from mirrortune.training.schedules import Schedule, lr_factor, whole_steps
from mirrortune.training.trainer import Trainer
from tests import tiny_runs
from tests.tiny_runs import Adapted, adapt, make_trainer, terminate_after

SCHEDULES: list[Schedule] = ["linear", "cosine", "constant", "wsd", "inverse-sqrt"]
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


def test_known_values_of_transformers_schedules() -> None:
    assert factors(4, 0, "cosine-restarts") == pytest.approx([1, 0.5, 1, 0.5])
    assert lr_factor(3, total_steps=6, warmup_steps=0, schedule="cosine-restarts", num_cycles=1) == pytest.approx(0.5)
    decays = [lr_factor(s, total_steps=8, warmup_steps=2, schedule="wsd", decay_ratio=0.25) for s in range(9)]
    assert decays == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 0.5, 0])
    assert factors(9, 4, "inverse-sqrt")[4:] == pytest.approx([(4 / s) ** 0.5 for s in range(4, 9)])
    assert factors(5, 0, "inverse-sqrt") == pytest.approx([s**-0.5 for s in range(1, 6)])  # without a warm-up


@pytest.mark.parametrize("schedule", ["linear", "cosine", "cosine-restarts", "wsd"])
def test_a_floor_is_where_a_decay_ends(schedule: Schedule) -> None:
    def at(step: int) -> float:
        return lr_factor(step, total_steps=9, warmup_steps=1, schedule=schedule, min_lr_ratio=0.1)

    assert at(0) == 0.5  # warm-up starts as without it
    assert at(1) == 1
    assert at(9) == pytest.approx(0.1)
    assert min(map(at, range(1, 9))) > 0.1


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


def test_steps_are_rounded_up_but_for_the_rounding_of_their_product() -> None:
    assert 0.07 * 100 > 7
    assert [whole_steps(n) for n in (0.07 * 100, 1.1 * 10, 0.0, 0.1, 7.0, 7.001)] == [7, 11, 0, 1, 7, 8]


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


FULL = AdapterSpec(method="full")
# The adapters that are used are vectors; muon needs matrices, and 8-bit moments start at 4,096 numbers.
OPTIMIZERS: dict[str, tuple[AdapterSpec, dict[str, Any]]] = {
    "adamw": (tiny_runs.MIRROR, {"betas": (0.8, 0.9), "eps": 1e-7}),
    "sgd": (tiny_runs.MIRROR, {"momentum": 0.8}),
    "adafactor": (FULL, {}),
    "adamw-8bit": (FULL, {"lr": 1e-3}),
    "schedule-free": (tiny_runs.MIRROR, {"schedule": "constant"}),
    "muon": (FULL, {"lr": 1e-3}),
}


def run(folder: Path, name: str, *, adapted: Adapted | None = None, **given: Any) -> Trainer:
    """A loop with an optimizer, of 8 steps."""
    spec, settings = OPTIMIZERS[name]
    return make_trainer(folder, adapted=adapted or adapt(spec, trained=None), optimizer=name, **{**settings, **given})


def trained(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Copies of the trained parameters."""
    model = trainer.bare_model
    return {n: p.detach().clone() for n, p in {**adapter_parameters(model), **plain_parameters(model)}.items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_interrupted_run_ends_with_the_bits_of_another(tmp_path: Path, name: str) -> None:
    """It stops at a step at which the other neither evaluates nor saves."""
    whole = run(tmp_path / "whole", name)
    before = trained(whole)
    whole.fit()
    assert all(not torch.equal(before[n], p) for n, p in trained(whole).items())
    with pytest.raises(InterruptedRun):
        run(tmp_path / "cut", name, progress=terminate_after(3)).fit()
    resumed = run(tmp_path / "cut", name, fresh=False)
    resumed.resume()
    resumed.fit()
    assert (tmp_path / "cut/metrics.jsonl").read_text() == (tmp_path / "whole/metrics.jsonl").read_text()
    for file in ("adapter.safetensors", "training.safetensors"):
        first, second = (load_file(one.run.checkpoint(8) / file) for one in (whole, resumed))
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_is_not_finite_moves_nothing(tmp_path: Path, name: str) -> None:
    trainer = run(tmp_path, name, log_every_steps=99, eval_every_steps=99, max_steps=4)
    bias = trainer.bare_model.get_parameter("classifier.bias")
    calls: list[int] = []
    bias.register_hook(lambda gradient: gradient * math.nan if calls.append(1) or len(calls) == 3 else gradient)
    seen: list[dict[str, torch.Tensor]] = []
    trainer.progress.on_step = lambda *_: seen.append(trained(trainer))
    with pytest.raises(DivergedError, match="step 3"):
        trainer.fit()
    assert any(not torch.equal(seen[0][n], tensor) for n, tensor in seen[1].items())
    assert all(torch.equal(seen[1][n], tensor) for later in seen[2:] for n, tensor in later.items())


@pytest.mark.parametrize("name", ["adafactor", "schedule-free", "muon"])
def test_steps_are_skipped_in_float16_by_every_optimizer(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, alone: None
) -> None:
    monkeypatch.setattr(tiny_runs, "make_accelerator", lambda: make_accelerator("fp16"))
    trainer = run(tmp_path, name, max_steps=3)
    bias, calls = trainer.bare_model.get_parameter("classifier.bias"), []
    bias.register_hook(lambda gradient: gradient * math.inf if calls.append(1) or len(calls) == 2 else gradient)
    seen: list[dict[str, torch.Tensor]] = []
    trainer.progress.on_step = lambda *_: seen.append(trained(trainer))
    assert trainer.fit().skipped_steps == 1
    assert all(torch.equal(seen[0][n], tensor) for n, tensor in seen[1].items())
    assert any(not torch.equal(seen[1][n], tensor) for n, tensor in seen[2].items())


@pytest.fixture
def alone() -> Iterator[None]:
    """accelerate's state of a process that has just begun, for this test alone."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_schedule_free_scores_and_saves_its_average(tmp_path: Path) -> None:
    trainer = run(tmp_path, "schedule-free", max_steps=4, eval_every_steps=2)
    scored: list[dict[str, torch.Tensor]] = []
    trainer.progress.on_evaluate = lambda rows: scored.append(trained(trainer))
    points: list[dict[str, torch.Tensor]] = []
    trainer.progress.on_step = lambda *_: points.append(trained(trainer))
    trainer.fit()
    saved = read_adapter(trainer.run.checkpoint(4)).tensors
    weights = trained(trainer)
    for name, tensor in scored[-1].items():
        assert not torch.equal(points[-1][name], tensor), name
        assert torch.equal(weights[name], points[-1][name]), "training goes on from where it was"
        z = trainer.optimizer.optimizer.state[dict(adapter_parameters(trainer.bare_model)).get(name)].get("z")
        if z is not None:  # y = (1 - beta1) z + beta1 x
            torch.testing.assert_close(points[-1][name], 0.1 * z + 0.9 * tensor)
    assert torch.equal(saved["param.classifier.bias"], scored[-1]["classifier.bias"])


def test_muon_leaves_vectors_embeddings_and_the_head_to_adamw() -> None:
    model = adapt(FULL, trained=None).model
    hidden = set(hidden_matrices(model))
    assert "bert.encoder.layer.0.output.dense.weight" in hidden
    assert not {n for n in hidden if "embeddings" in n or "classifier" in n or "bias" in n}
    optimizer = build_optimizer(
        model, lr=1e-3, head_lr=1e-2, weight_decay=0.1, settings=OptimizerSettings(name="muon", momentum=0.9)
    )
    ids = {id(p) for group in optimizer.param_groups if group["is_hidden_matrix"] for p in group["params"]}
    assert ids == {id(p) for n, p in model.named_parameters() if n in hidden}
    assert {g["momentum"] for g in optimizer.param_groups if g["is_hidden_matrix"]} == {0.9}
    assert len([p for g in optimizer.param_groups for p in g["params"]]) == len(list(model.parameters()))


def test_muon_is_refused_where_nothing_is_a_matrix() -> None:
    with pytest.raises(ConfigError, match=r"muon updates matrices, and 'mirror-scale' trains none.*adamw, sgd"):
        build_optimizer(adapt().model, lr=1e-3, head_lr=1e-3, weight_decay=0.0, settings=OptimizerSettings(name="muon"))


def problems(*words: str) -> str:
    """What is wrong with a recipe before anything is loaded."""
    return "\n".join(map(str, problems_of_names(resolve([override_layer(list(words))]).recipe)))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("train.optimizer=sgd", "train.betas=[0.9, 0.99]"), "train.betas: sgd has none, got (0.9, 0.99)"),
        (("train.momentum=0.9",), "train.momentum: adamw has none"),
        (("train.optimizer=schedule-free",), "Set train.schedule=constant"),
        (("train.schedule=constant", "train.min_lr_ratio=0.1"), "train.min_lr_ratio: constant has none"),
        (("task.kind=text-classification", "train.neftune_alpha=5"), "it is for language models"),
        (("train.neftune_alpha=5", "train.compile=true"), "untested with --compile"),
        (("train.optimizer=muon", "train.momentum=0.9", "train.betas=[0.9, 0.95]"), ""),
    ],
)
def test_settings_that_would_change_nothing_are_refused(words: tuple[str, ...], said: str) -> None:
    assert said in problems(*words)
    assert bool(said) == bool(problems(*words))


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [("adamw-8bit", "bitsandbytes", "quantised"), ("schedule-free", "schedulefree", "schedule-free")],
)
def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, name: str, package: str, extra: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda found: None if found == package else find(found))
    found = problems(f"train.optimizer={name}", "train.schedule=constant")
    assert f"{name} needs the package {package}" in found
    assert f"pip install 'mirrortune[{extra}]'" in found


def test_a_torch_without_muon_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    assert "pip install 'torch>=2.9'" in problems("train.optimizer=muon")
