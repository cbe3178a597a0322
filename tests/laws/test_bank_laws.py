# SPDX-License-Identifier: Apache-2.0
"""The law of the bank: a row of a mixed batch is what its adapter gives it alone, whatever the others are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mirrortune
from mirrortune.adapters.cores import CORES
from tests.bank_cases import Cases, logits_of, token_ids, with_classes
from tests.spectral import VARIANTS, Problem, Variant, problems
from tests.tiny_models import tiny_bert, tiny_causal

ROWS = 6
EVERY_CORE: dict[str, dict[str, Any]] = {
    "mirror": {"method": "mirror"},
    "mirror again": {"method": "mirror"},
    "mirror, rank 7": {"method": "mirror", "rank": 7},
    "mirror, inputs": {"method": "mirror", "side": "input", "rounds": 3, "rank": 9},
    "scaled": {"method": "mirror", "scale_top_k": "all"},
    "random": {"method": "random", "seed": 3},
    "random, other pairs": {"method": "random", "seed": 9},
    "random, rounds": {"method": "random", "seed": 4, "rounds": 2, "rank": 5},
    "neighbor": {"method": "neighbor", "unit": "angle"},
    "listed": {"method": "givens", "pairing": [[0, 3], [1, 2]], "rank": 6},
    "scale": {"method": "scale", "top_k": 3},
    "svft": {"method": "svft"},
    "svft, banded": {"method": "svft", "pattern": "banded", "rank": 8},
    "svft, random": {"method": "svft", "pattern": "random", "bands": 1, "rank": 5},
    "psoft": {"method": "psoft", "rank": 8},
    "psoft again": {"method": "psoft", "rank": 8},
    "psoft, series": {"method": "psoft", "rank": 3, "neumann_terms": 6, "vectors": False},
    "lora-xs": {"method": "lora-xs", "rank": 4},
    "lora-xs, all": {"method": "lora-xs", "rank": "full"},
    "speclora": {"method": "speclora", "rank": 3, "top_k": 2},
    "speclora again": {"method": "speclora", "rank": 3, "top_k": 2},
    "some layers": {"method": "mirror", "target_modules": "query|output.dense"},
    "other layers": {"method": "psoft", "rank": 4, "target_modules": "value|intermediate.dense"},
    "portable": {"method": "mirror", "rank": 4, "form": "portable"},
    "head alone": {"method": "none"},
    "biases": {"method": "bitfit"},
}


def vision() -> nn.Module:
    """A ViT whose patches are a convolution, which is adapted."""
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3)
    return noisy(transformers.ViTForImageClassification(config))


def convolutional() -> nn.Module:
    """A ResNet: convolutions throughout, and a head that reads pooled maps."""
    import transformers

    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    return noisy(transformers.ResNetForImageClassification(config))


def encoder_decoder() -> nn.Module:
    """A T5."""
    import transformers

    sizes = {"vocab_size": 60, "d_model": 16, "d_ff": 24, "d_kv": 4, "num_layers": 1, "num_heads": 4}
    tokens = {"decoder_start_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "dropout_rate": 0.0}
    return noisy(transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **tokens)))


@torch.no_grad()
def noisy(model: nn.Module) -> nn.Module:
    """Weights with noise, so that no two singular values are the same."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(ROWS, 3, 8, 8, generator=torch.Generator().manual_seed(2))}


FEW = ("mirror", "random", "random, other pairs", "svft, banded", "psoft, series", "lora-xs", "speclora")
ANY = {name: EVERY_CORE[name] for name in FEW}
PATCHES = {name: {**own, "target_modules": "all-layers"} for name, own in ANY.items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Cases, mirrortune.AdapterBank]]:
    """A bank of every family."""
    folder = tmp_path_factory.mktemp("banks")
    ids = {"input_ids": token_ids(ROWS, 7)}
    three = {"three classes": {"base": with_classes(tiny_bert(), 3), "method": "mirror"}}
    causal = {**ANY, "some": {"method": "mirror", "target_modules": "q_proj|down_proj"}}
    fused = {
        "fused": {"method": "mirror"},
        "in parts": {"method": "mirror", "split": {"c_attn": 3}},
        "low": ANY["lora-xs"],
    }
    tokens = {**ids, "decoder_input_ids": token_ids(ROWS, 4, seed=5)}
    families: dict[str, Any] = {
        "bert": (tiny_bert(), ids, {**EVERY_CORE, **three}),
        "llama": (tiny_causal(), ids, causal),
        "gpt2": (tiny_causal("GPT2"), ids, fused),
        "vit": (vision(), pixels(), PATCHES),
        "resnet": (convolutional(), pixels(), PATCHES),
        "t5": (encoder_decoder(), tokens, ANY),
    }
    found = {}
    for name, (base, batch, own) in families.items():
        cases = Cases.make(base, folder / name, batch, own, logits_of)
        found[name] = cases, cases.bank()
    return found


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@given(problem=problems(), count=st.integers(1, 4), is_delta=st.booleans(), seed=st.integers(0, 2**16))
def test_rows_are_mixed_by_their_own_coefficients(
    variant: Variant, problem: Problem, count: int, is_delta: bool, seed: int
) -> None:
    S = problem.weight().svd().S[: problem.rank]
    shape = problem.out_features, problem.in_features
    cores = [variant.build(S, seed + row, shape) for row in range(count)]
    each = [[t.detach() for t in core.coefficients(delta=is_delta)] for core in cores]
    rows = [torch.stack(own) for own in zip(*each, strict=True)]
    z = problem.rows(count, 3)[..., :1] * S
    for is_shared in (False, True):  # pairs and singular values, which all rows have in common
        dims = [None if is_shared and all(torch.equal(t, own[0]) for t in own) else 0 for own in rows]
        given = [own[0] if dim is None else own for own, dim in zip(rows, dims, strict=True)]
        found = cores[0].mix_rows(z, dims, *given)
        expected = torch.stack([core.mix(z[row], *each[row]) for row, core in enumerate(cores)])
        torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-12)


def test_every_core_is_mixed() -> None:
    presets = {mirrortune.adapters.methods.preset(own["method"]).core for own in EVERY_CORE.values()}
    # Those of a task's gradients are mixed in tests/cli/test_measured_bases.py, which trains.
    assert presets >= {name for name in CORES.names() if CORES.get(name, "test").basis == "weight"}


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "vit", "resnet", "t5"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
@given(data=st.data())
def test_a_row_is_what_its_adapter_gives_it_alone(
    family: str, made: dict[str, tuple[Cases, mirrortune.AdapterBank]], data: st.DataObject
) -> None:
    cases, bank = made[family]
    names = data.draw(st.lists(st.sampled_from([None, *cases.names]), min_size=1, max_size=12))
    rows = data.draw(st.lists(st.integers(0, ROWS - 1), min_size=len(names), max_size=len(names)))
    cases.check(bank, names, rows)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "vit", "resnet", "t5"])
def test_all_of_them_at_once(family: str, made: dict[str, tuple[Cases, mirrortune.AdapterBank]]) -> None:
    cases, bank = made[family]
    names = [None, *cases.names, *reversed(cases.names), None]
    cases.check(bank, names, [place % ROWS for place in range(len(names))])


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "vit", "resnet", "t5"])
def test_outside_of_rows_the_model_is_the_base(
    family: str, made: dict[str, tuple[Cases, mirrortune.AdapterBank]]
) -> None:
    cases, bank = made[family]
    with torch.no_grad():
        assert torch.equal(cases.run(bank.model, cases.batch), cases.run(cases.base, cases.batch))
        with bank.rows([None] * ROWS):
            assert torch.equal(cases.run(bank.model, cases.batch), cases.run(cases.base, cases.batch))
