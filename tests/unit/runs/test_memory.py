# SPDX-License-Identifier: Apache-2.0
"""The memory of a training step, foreseen without weights, against what torch's own allocator saw in a real one."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import transformers
from torch import Tensor, nn

from mirrortune.adapters.files.load import adapt
from mirrortune.adapters.inject import attach, weights_kept
from mirrortune.adapters.layers import SpectralWeight
from mirrortune.adapters.spec import AdapterSpec
from mirrortune.data.examples import IGNORE_INDEX
from mirrortune.data.loader import forward
from mirrortune.runs.size import Load, footprint
from mirrortune.system.devices import widen
from mirrortune.training.optim import build_optimizer
from tests.tiny_models import tiny_causal

BERT = transformers.BertConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512,
                               vocab_size=500)  # fmt: skip
VIT = transformers.ViTConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512,
                             image_size=64, patch_size=8)  # fmt: skip
LLAMA = transformers.LlamaConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=384,
                                 vocab_size=3000, num_key_value_heads=2, pad_token_id=0)  # fmt: skip
CLASSES = {"bert": (transformers.AutoModelForSequenceClassification, BERT),
           "vit": (transformers.AutoModelForImageClassification, VIT),
           "llama": (transformers.AutoModelForCausalLM, LLAMA)}  # fmt: skip


def batch_of(family: str) -> dict[str, Any]:
    """16 rows."""
    if family == "vit":
        return {"pixel_values": torch.rand(16, 3, 64, 64), "targets": torch.zeros(16, dtype=torch.long)}
    ids = torch.randint(1, 400, (16, 96))
    if family == "llama":
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "targets": ids.clone(), "use_cache": False}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "targets": torch.zeros(16, dtype=torch.long)}


def loss(inputs: dict[str, Any], outputs: Any, targets: Tensor) -> tuple[Tensor, int]:
    """As the kinds of task have it: of rows, or of the tokens that a mask chooses."""
    if targets.ndim == 1:
        return F.cross_entropy(outputs.logits.float(), targets, reduction="sum"), len(targets)
    wanted = targets[:, 1:]
    learned = wanted != IGNORE_INDEX
    logits = outputs.logits[:, :-1][learned].float()
    return F.cross_entropy(logits, wanted[learned], reduction="sum"), int(learned.sum())


def build(family: str, device: str) -> nn.Module:
    """A random model."""
    cls, config = CLASSES[family]
    with torch.device(device):
        model = cls.from_config(type(config).from_dict(config.to_dict()))
    assert isinstance(model, nn.Module)
    return model


def measured(family: str, spec: AdapterSpec, dtype: torch.dtype, *, is_16bit: bool) -> int:
    """Bytes at the fullest moment of the second step: what is held before it, and what the allocator's events add."""
    model = build(family, "cpu").to(dtype)
    adapt(model, spec, factor_source=lambda name, weight, rank: factorize_quickly(weight, rank))
    widen(model, model.mirrortune.targets.head)
    model.train()
    optimizer = build_optimizer(model, lr=1e-4, head_lr=1e-4, weight_decay=0.0)
    batch = batch_of(family)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_16bit):
            inputs, outputs, targets = forward(model, dict(batch), torch.device("cpu"))
            total, _ = loss(inputs, outputs, targets)
        total.backward()
        del outputs, total
        optimizer.step()
        optimizer.zero_grad()

    step()
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [m.weight for m in model.modules() if isinstance(getattr(m, "weight", None), Tensor)]
    tensors += [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    held = sum({t.data_ptr(): t.nbytes for t in tensors}.values())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    return held + peak_of(profile)


def peak_of(profile: Any) -> int:
    """Most bytes that were allocated at a time while it was recorded."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert peak > 0
    return peak


def factorize_quickly(weight: Tensor, rank: int) -> Any:
    """Orthogonal factors of the right shapes: what they are does not matter here."""
    from mirrortune.adapters.svd import Factors

    U, _ = torch.linalg.qr(torch.rand(weight.shape[0], rank, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.rand(weight.shape[1], rank, dtype=torch.float64))
    return Factors(U=U, S=torch.linspace(2, 1, rank, dtype=torch.float64), Vh=V.T.contiguous())


@pytest.mark.parametrize(
    ("family", "method", "settings", "dtype", "is_16bit"),
    [
        ("bert", "mirror", {}, torch.float32, False),
        ("bert", "mirror", {"rank": 16}, torch.float32, False),
        ("bert", "mirror", {}, torch.float32, True),
        ("bert", "none", {}, torch.float32, False),
        ("bert", "full", {}, torch.float32, False),
        ("bert", "lora", {}, torch.float32, False),
        ("vit", "mirror", {}, torch.float32, False),
        ("llama", "mirror", {"rank": 16}, torch.bfloat16, True),
    ],
)
def test_a_step_takes_what_was_foreseen(
    family: str, method: str, settings: dict[str, Any], dtype: torch.dtype, is_16bit: bool
) -> None:
    spec = AdapterSpec(method=method, **settings)
    batch = batch_of(family)
    load = Load(batch=batch, scored=batch, loss=loss, dtype=dtype, is_16bit_compute=is_16bit, device="cpu")

    foreseen = footprint(build(family, "meta"), spec, load)

    assert foreseen.is_counted
    assert foreseen.total == pytest.approx(measured(family, spec, dtype, is_16bit=is_16bit), rel=0.2)


def test_a_model_that_needs_numbers_is_sized_by_its_widths() -> None:
    class Capricious(transformers.BertForSequenceClassification):
        def forward(self, input_ids: Tensor, **more: Any) -> Any:
            return super().forward(input_ids + int(input_ids.numpy().min()) * 0, **more)

    with torch.device("meta"):
        model = Capricious(BERT)
    batch = batch_of("bert")
    load = Load(batch=batch, scored=batch, loss=loss, dtype=torch.float32, is_16bit_compute=False, device="cpu")

    guessed = footprint(model, AdapterSpec(), load)

    assert not guessed.is_counted
    assert guessed.total > guessed.weights > 0


@pytest.mark.parametrize("method", ["shira", "unilora"])
def test_a_tuner_that_reads_weights_is_sized_by_its_widths(method: str) -> None:
    batch = batch_of("bert")
    load = Load(batch=batch, scored=batch, loss=loss, dtype=torch.float32, is_16bit_compute=False, device="cpu")
    guessed = footprint(build("bert", "meta"), AdapterSpec(method=method, rank=4 if method == "shira" else None), load)
    assert not guessed.is_counted
    assert guessed.total > guessed.weights > 0


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_an_evaluation_takes_what_was_foreseen(family: str) -> None:
    """Of a language model: its logits once, and never a float32 copy of all of them."""
    from mirrortune.tasks.kinds.causal_lm import Task as CausalTask

    task: Any = object.__new__(CausalTask)
    batch = batch_of(family)
    own_loss = task.loss if family == "llama" else loss
    load = Load(
        batch=batch, scored=batch, loss=own_loss, dtype=torch.float32, is_16bit_compute=False, device="cpu"
    )  # fmt: skip
    foreseen = footprint(build(family, "meta"), AdapterSpec(rank=16), load)
    model = build(family, "cpu")
    adapt(model, AdapterSpec(rank=16), factor_source=lambda name, weight, rank: factorize_quickly(weight, rank))
    model.eval()

    def score() -> None:
        inputs, outputs, targets = forward(model, dict(batch), torch.device("cpu"))
        own_loss(inputs, outputs, targets)
        if family == "llama":
            task.judge(model, inputs, outputs, targets)

    with torch.no_grad():
        score()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            score()
    assert foreseen.evaluation == pytest.approx(peak_of(profile), rel=0.2)
    if family == "llama":
        logits = 16 * 96 * 3000 * 4
        assert foreseen.evaluation < 2 * logits, "the whole and a piece"


@pytest.mark.parametrize(
    ("family", "settings", "count", "is_counted"),
    [("Llama", {"strategy": "dense"}, 14, True), ("Mixtral", {"target_modules": ".*experts.*"}, 4, False)],
)
def test_weights_that_are_held_while_text_is_generated_are_foreseen(
    family: str, settings: dict[str, Any], count: int, is_counted: bool
) -> None:
    """All experts of a mixture take their memory twice then."""
    model, spec = tiny_causal(family), AdapterSpec(**settings)
    batch = batch_of("llama")
    batch |= {name: batch[name] % 200 for name in ("input_ids", "targets")}
    load = Load(batch=batch, scored=batch, loss=loss, dtype=torch.float32, is_16bit_compute=False, device="cpu")
    empty = copy.deepcopy(model).to("meta")
    found, plain = (footprint(empty, spec, replace(load, keeps_weights=k)) for k in (True, False))
    assert found.is_counted is plain.is_counted is is_counted

    attach(model, spec)
    with torch.no_grad(), weights_kept(model):
        model(input_ids=batch["input_ids"])
        held = [part._held for part in model.modules() if isinstance(part, SpectralWeight)]
        assert len(held) == count
        size = sum(w.numel() * w.element_size() for weights in held for w in (weights or {}).values())
    assert found.kept == size > 0
    assert plain.kept == 0
    assert found.evaluation == (plain.evaluation if is_counted else plain.activations) + size
