# SPDX-License-Identifier: Apache-2.0
"""cores: options, parameters and files; the mathematics is in tests/laws."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mirrortune
from mirrortune.adapters.cores import CORES, Core
from mirrortune.adapters.cores.givens import Givens
from mirrortune.adapters.inject import attach, spectral_layers
from mirrortune.adapters.methods import PRESETS, method_names, preset
from mirrortune.adapters.spec import AdapterSpec, build_core, check_spec
from mirrortune.config.recipe import override_layer, resolve
from mirrortune.errors import ConfigError
from mirrortune.runs.checks import unpack
from tests.spectral import VARIANTS, Variant
from tests.tiny_models import tiny_bert

S = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.5])
PAIRS = torch.tensor([[0, 4], [1, 3]])


def test_the_registered_cores() -> None:
    assert (
        CORES.names() == sorted(CORES._items) == ["givens", "lora-sb", "lora-xs", "psoft", "scale", "speclora", "svft"]
    )
    assert {p.core for p in PRESETS.values() if p.core} <= set(CORES.names())
    assert set(CORES.options("givens")) == {"side", "rounds", "scale_top_k", "unit"}


def test_a_cores_own_name_is_a_method() -> None:
    assert {*CORES.names(), "mirror", "none", "full"} <= set(method_names())
    for name in CORES.names():
        found, core = preset(name), CORES.get(name, "test")
        assert (found.core, found.lr, found.rank) == (name, core.default_lr, core.default_rank)
        assert found.default_lr("image-classification") == (core.image_lr or core.default_lr)
        assert found.plain == "none"
    assert (preset("psoft").rank, preset("lora-xs").rank, preset("scale").rank) == (46, 16, "full")
    assert (preset("svft").lr, preset("speclora").lr, preset("scale").lr) == (3e-2, 3e-3, 3e-2)
    assert [preset(name).default_lr("image-classification") for name in ("svft", "lora")] == [1e-2, 1e-3]
    assert (preset("givens").pairing, preset("scale").pairing) == ("mirror", None)
    with pytest.raises(ConfigError, match=r"^adapter\.method: unknown method 'lora-x'\. Did you mean 'lora-xs'"):
        preset("lora-x")


@pytest.mark.parametrize("method", ["psoft", "scale", "svft", "lora-xs", "speclora"])
def test_directions_that_no_input_reaches_are_for_rotations_of_the_output_side(method: str) -> None:
    for spec in (AdapterSpec(method=method, rank="out"), AdapterSpec(rank="out", options={"side": "input"})):
        with pytest.raises(ConfigError, match=r"^adapter\.rank: out keeps .*Allowed: full or a number"):
            check_spec(spec)
    check_spec(AdapterSpec(rank="out"))


def test_one_known_rotation() -> None:
    core = Givens(S, PAIRS, unit="angle")
    with torch.no_grad():
        core.theta.copy_(torch.tensor([torch.pi / 2, 0.0]))
    # A quarter turn in the plane (0, 4): the strongest input direction comes out on the weakest output one.
    K = core.delta_matrix() + torch.diag(S.double())
    assert float(K[4, 0]) == pytest.approx(4.0)
    assert float(K[0, 4]) == pytest.approx(-0.5)
    assert K[0, 0].abs() + K[4, 4].abs() < 1e-6
    assert K[[1, 2, 3], [1, 2, 3]].tolist() == [3.0, 2.0, 1.0]


@pytest.mark.parametrize(("top_k", "expected"), [(0, 0), (2, 2), (5, 5), ("all", 5)])
def test_scales_are_as_many_as_asked_for(top_k: int, expected: int) -> None:
    assert Givens(S, PAIRS, scale_top_k=top_k).scale.numel() == expected


@pytest.mark.parametrize("top_k", [-1, 6, 1.5, True, "most", None])
def test_a_wrong_number_of_scales_is_refused(top_k: object) -> None:
    with pytest.raises(ConfigError, match=r"^adapter\.options\.scale_top_k: got .*Allowed: 0 to 5, or all"):
        Givens(S, PAIRS, scale_top_k=top_k)


def test_another_unit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^adapter\.options\.unit: got 'degrees'.*Allowed: movement, weight, angle"):
        Givens(S, PAIRS, unit="degrees")  # type: ignore[arg-type]


@pytest.mark.parametrize("side", ["both", "left", None])
def test_a_wrong_side_is_refused(side: str) -> None:
    with pytest.raises(ConfigError, match=r"^adapter\.options\.side: got .*Allowed: output, input"):
        Givens(S, PAIRS, side=side)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_only_trained_numbers_are_in_the_state(variant: Variant) -> None:
    core = variant.build(S)
    assert set(core.state_dict()) == {name for name, _ in core.named_parameters()}


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_delta_matrix_changes_nothing(variant: Variant) -> None:
    core = variant.build(S, seed=1)
    before = copy.deepcopy(core)
    delta = core.delta_matrix()
    assert (delta.dtype, delta.requires_grad) == (torch.float64, False)
    for name, tensor in before.state_dict(keep_vars=True).items():
        assert torch.equal(core.get_parameter(name), tensor)
        assert core.get_parameter(name).dtype == torch.float32
    assert torch.equal(core.get_buffer("S"), S)


def test_a_core_without_its_two_methods_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="abstract methods"):
        Core()  # type: ignore[abstract]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("mirror", {"side": "left"}),
        ("mirror", {"scale_top_k": [1]}),
        ("scale", {"top_k": 9}),
        ("scale", {"top_k": "few"}),
        ("psoft", {"neumann_terms": -1}),
        ("psoft", {"neumann_terms": 1.5}),
        ("psoft", {"vectors": "yes"}),
        ("svft", {"pattern": "stripes"}),
        ("svft", {"bands": -1}),
        ("svft", {"bands": True}),
        ("svft", {"pattern": "random", "pattern_seed": -1}),
        ("svft", {"pattern": "random", "pattern_seed": "a"}),
        ("speclora", {"lora_rank": 0}),
        ("speclora", {"lora_rank": True}),
        ("speclora", {"lora_alpha": float("nan")}),
        ("speclora", {"lora_alpha": "8"}),
        ("speclora", {"init_seed": 1.5}),
        ("speclora", {"init_seed": 10**15}),
        ("speclora", {"init_seed": -1}),
        ("speclora", {"top_k": -1}),
        ("speclora", {"top_k": None}),
    ],
)
def test_a_wrong_option_is_a_configuration_error(method: str, options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    (key,) = set(options) - {"pattern"} or {"pattern"}
    with pytest.raises(ConfigError, match=rf"^adapter\.options\.{key}: got .*Allowed: ") as caught:
        attach(model, AdapterSpec(method=method, rank=5, options=options))
    assert caught.value.exit_code == 2
    assert isinstance(model[0], nn.Linear)
    assert model[0].weight.requires_grad


def test_the_rank_of_speclora_is_that_of_its_branch() -> None:
    layer = {"model.name": "m", "task.kind": "text-classification", "data.path": "d.csv", "adapter.method": "speclora"}

    def built(*more: str) -> Any:
        recipe = resolve([override_layer([*(f"{key}={value}" for key, value in layer.items()), *more])]).recipe
        return build_core(unpack(recipe).adapter, torch.ones(32), "layer", (32, 24))

    default, four, more = built(), built("adapter.rank=4"), built("adapter.rank=4", "adapter.options.top_k=3")

    assert (default.lora_A.shape, default.scale.shape, default.factor) == ((8, 24), (16,), 1.0)
    assert (four.lora_A.shape, four.scale.shape, four.factor) == ((4, 24), (16,), 1.0)
    assert (more.lora_B.shape, more.scale.shape) == ((32, 4), (3,))
    assert built("adapter.options.lora_rank=4").lora_A.shape == (4, 24)
    assert built("adapter.rank=4", "adapter.options.lora_alpha=8").factor == 2.0
    with pytest.raises(ConfigError, match=r"adapter\.options\.lora_rank: it is the same as adapter\.rank"):
        built("adapter.rank=4", "adapter.options.lora_rank=4")
    with pytest.raises(ConfigError, match=r"adapter\.rank: got 'full'\. Allowed: a number, for method 'speclora'"):
        built("adapter.rank=full")


def test_the_branch_of_speclora_starts_anew_in_every_layer_and_run() -> None:
    def start(*shape: int, seed: int = 0, name: str = "a", **options: Any) -> torch.Tensor:
        spec = AdapterSpec(method="speclora", seed=seed, options=options)
        return build_core(spec, torch.ones(shape), name, (9, 7)).get_parameter("lora_A").detach()

    first = start(6)
    assert torch.equal(first, start(6))
    assert float(first.abs().max()) <= 7**-0.5
    for other in (start(6, seed=1), start(6, name="b"), start(6, init_seed=1)):
        assert not torch.equal(first, other)
    one, two = start(2, 6)
    assert not torch.equal(one, two)


def test_in_python_too(tmp_path: Path) -> None:
    model = mirrortune.attach(tiny_bert(), method="speclora", rank=3, target_modules="query")

    layer = next(iter(spectral_layers(model).values()))
    assert layer.core.lora_A.shape[0] == 3
    mirrortune.save_adapter(model, tmp_path / "adapter")
    again = mirrortune.load_adapter(tiny_bert(), tmp_path / "adapter")
    assert next(iter(spectral_layers(again).values())).core.lora_A.shape[0] == 3
    with pytest.raises(ConfigError, match=r"^rank: got 'full'"):
        mirrortune.attach(tiny_bert(), method="speclora", rank="full")


@torch.no_grad()
def positions_moved(model: nn.Module) -> dict[str, list[int]]:
    """Train each core a little, and return the columns of its positions."""
    for layer in spectral_layers(model).values():
        layer.core.get_parameter("values").copy_(torch.linspace(-0.2, 0.2, len(layer.core.get_parameter("values"))))
    return {name: layer.core.get_buffer("columns").tolist() for name, layer in spectral_layers(model).items()}


def test_random_positions_of_svft_follow_the_seed_and_are_loaded_with_it(tmp_path: Path) -> None:
    base, ids = tiny_bert(), torch.tensor([[5, 6, 7]])
    found: list[dict[str, list[int]]] = []
    for own in ({"seed": 0}, {"seed": 1}, {"seed": 2**32 + 1}, {"seed": 5, "pattern_seed": 0}):
        model = mirrortune.attach(copy.deepcopy(base), method="svft", pattern="random", **own)
        found.append(positions_moved(model))
        folder = tmp_path / str(len(found))
        mirrortune.save_adapter(model, folder)
        loaded = mirrortune.load_adapter(copy.deepcopy(base), folder)
        assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)
    assert found[0] != found[1]
    assert found[1] == found[2]
    assert found[0] == found[3]


def test_a_run_gives_its_seed_to_random_positions_of_svft_alone() -> None:
    words = ["train.seed=7", "adapter.method=svft", "model.name=m", "data.path=d.csv", "task.kind=text-classification"]
    options = [
        unpack(resolve([override_layer([*words, f"adapter.options.pattern={p}"])]).recipe).adapter.options
        for p in ("plain", "banded", "random")
    ]
    assert options == [{"pattern": "plain"}, {"pattern": "banded"}, {"pattern": "random", "pattern_seed": 7}]
