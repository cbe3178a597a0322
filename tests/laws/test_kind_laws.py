# SPDX-License-Identifier: Apache-2.0
"""Laws of every kind of module that holds matrices, for every core: an adapted module computes and differentiates what
the plain module does with W' in place of W, however that is run.

W' is built by its formula in float64 (``tests.spectral.dense_change``) and put into an untouched copy of the module.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from mirrortune.adapters.files.adapter_file import read_adapter, write_adapter
from mirrortune.adapters.files.load import FingerprintBook, load_into
from mirrortune.adapters.inject import adapter_parameters, attach, attachment, spectral_layers
from mirrortune.adapters.spec import AdapterSpec
from mirrortune.adapters.strategies import Strategy
from mirrortune.adapters.svd import Factors, factorize
from mirrortune.adapters.targets import KINDS
from mirrortune.errors import ConfigError
from tests.spectral import dense_change, relative, train_a_little

METHODS: dict[str, AdapterSpec] = {
    "mirror": AdapterSpec(),
    "mirror rank 2": AdapterSpec(rank=2),
    "random input": AdapterSpec(method="random", options={"side": "input", "scale_top_k": "all"}),
    "scale": AdapterSpec(method="scale"),
    "speclora": AdapterSpec(method="speclora", options={"lora_rank": 2, "top_k": 1}),
    "psoft": AdapterSpec(method="psoft"),
    "psoft series": AdapterSpec(method="psoft", rank=2, options={"neumann_terms": 5}),
    "svft": AdapterSpec(method="svft", options={"pattern": "banded", "bands": 1}),
    "lora-xs": AdapterSpec(method="lora-xs"),
}
STRATEGIES: list[Strategy | None] = [None, "branch", "dense"]


class OwnForward(nn.Linear):
    """A linear layer that does more than one."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight, dim=1), self.bias)


class Experts(nn.Module):
    """Gated experts as transformers fuses them, every expert on every row; the stack is read once an expert."""

    def __init__(self, num_experts: int = 3, width: int = 4, inner: int = 5, *, is_transposed: bool = False) -> None:
        super().__init__()
        self.num_experts, self.is_transposed = num_experts, is_transposed
        shapes = [(2 * inner, width), (width, inner)]
        up, down = (shape[::-1] if is_transposed else shape for shape in shapes)
        self.gate_up_proj = nn.Parameter(torch.randn(num_experts, *up))
        self.down_proj = nn.Parameter(torch.randn(num_experts, *down))

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for index in range(self.num_experts):
            up, down = self.gate_up_proj[index], self.down_proj[index]
            gate, value = (x @ (up if self.is_transposed else up.T)).chunk(2, dim=-1)
            total = total + torch.tanh(gate) * value @ (down if self.is_transposed else down.T)
        return total


class Shared(nn.Module):
    """Two layers and an embedding around them that hold one weight; one module with two parents."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.output = nn.Linear(4, 7, bias=False)
        self.output.weight = self.embedding.weight
        self.inner = nn.Linear(4, 4)
        self.again = nn.ModuleList([self.inner])

    def forward(self, ids: Tensor) -> Tensor:
        return self.output(self.again[0](torch.tanh(self.inner(self.embedding(ids)))))


class Projection(nn.Module):
    """A parameter of no module of torch's, used on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(3, 4))
        self.stack = nn.Parameter(torch.randn(2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.rows.T @ (self.stack[0] + self.stack[1])


class SelfAttention(nn.MultiheadAttention):
    """Attention of a row to its neighbours, as one input and one output."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


def conv1d_linear() -> nn.Module:
    """The layer of GPT-2."""
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(6, 4)
    nn.init.normal_(layer.weight)
    return layer


def numbers(*shape: int) -> Callable[[], Tensor]:
    """Inputs of that shape."""
    return lambda: torch.randn(*shape, dtype=torch.float64)


def tokens() -> Tensor:
    """Numbers of tokens, two of them the same."""
    return torch.tensor([[1, 5, 0], [6, 5, 2]])


@dataclass(frozen=True, slots=True)
class Case:
    """A module, an input for it, the kinds that its weights are of, and how its fused weight is split."""

    build: Callable[[], nn.Module]
    make_input: Callable[[], Tensor]
    kinds: frozenset[str]
    split: Any = None

    @property
    def splits(self) -> dict[str, Any]:
        """The setting that splits the module's weight."""
        return {} if self.split is None else {"0": self.split}

    def module(self) -> nn.Module:
        """The module in float64, the same every time."""
        torch.manual_seed(0)
        return nn.Sequential(self.build()).double()

    def input(self) -> Tensor:
        """The input, the same every time."""
        torch.manual_seed(1)
        x = self.make_input()
        return x.requires_grad_(x.is_floating_point())


CASES = {
    "linear": Case(lambda: nn.Linear(4, 6), numbers(2, 3, 4), frozenset({"linear"})),
    "linear with a forward of its own": Case(lambda: OwnForward(4, 6), numbers(3, 4), frozenset({"linear"})),
    "conv1d-linear": Case(conv1d_linear, numbers(2, 3, 4), frozenset({"conv1d-linear"})),
    "conv1d": Case(lambda: nn.Conv1d(2, 5, 3, padding=1), numbers(2, 2, 7), frozenset({"convolution"})),
    "conv2d": Case(
        lambda: nn.Conv2d(3, 4, (2, 3), stride=(2, 1), padding=(1, 0), dilation=(1, 2), bias=False),
        numbers(2, 3, 5, 7),
        frozenset({"convolution"}),
    ),
    "conv2d without a batch": Case(lambda: nn.Conv2d(2, 3, 2), numbers(2, 4, 5), frozenset({"convolution"})),
    "conv3d": Case(lambda: nn.Conv3d(2, 4, 2), numbers(1, 2, 3, 3, 3), frozenset({"convolution"})),
    "conv2d padded with reflections": Case(
        lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), numbers(2, 2, 4, 4), frozenset({"convolution"})
    ),
    "conv1d padded to the same": Case(
        lambda: nn.Conv1d(2, 3, 3, padding="same"), numbers(2, 2, 6), frozenset({"convolution"})
    ),
    "conv1d in groups": Case(lambda: nn.Conv1d(4, 6, 2, groups=2), numbers(2, 4, 5), frozenset({"convolution"})),
    "embedding": Case(lambda: nn.Embedding(7, 4), tokens, frozenset({"embedding"})),
    "embedding of bounded norm": Case(lambda: nn.Embedding(7, 4, max_norm=0.5), tokens, frozenset({"embedding"})),
    "attention": Case(
        lambda: SelfAttention(4, 2, batch_first=True), numbers(2, 3, 4), frozenset({"attention-projection", "linear"})
    ),
    "experts": Case(Experts, numbers(6, 4), frozenset({"experts"})),
    "transposed experts": Case(lambda: Experts(is_transposed=True), numbers(6, 4), frozenset({"experts"})),
    "parameters": Case(Projection, numbers(5, 4), frozenset({"parameter"})),
    "split linear": Case(lambda: nn.Linear(4, 9), numbers(2, 3, 4), frozenset({"linear"}), 3),
    "split linear of unequal parts": Case(lambda: nn.Linear(4, 10), numbers(2, 4), frozenset({"linear"}), [3, 1, 1]),
    "split linear of heads": Case(
        lambda: nn.Linear(5, 12), numbers(2, 5), frozenset({"linear"}), {"parts": 3, "repeat": 2}
    ),
    "split conv1d-linear": Case(conv1d_linear, numbers(2, 3, 4), frozenset({"conv1d-linear"}), 3),
    "shared": Case(Shared, tokens, frozenset({"embedding", "linear"})),
}


def adapted(case: Case, spec: AdapterSpec, strategy: Strategy | None, seed: int | None = 3) -> nn.Module:
    """The module with an adapter on everything it holds, in float64."""
    chosen = replace(spec, target_modules=".*", strategy=strategy, split=case.splits)
    exact: dict[str, Tensor] = {}
    model = attach(case.module(), chosen, on_layer=lambda name, _, factors, core: exact.update({name: factors.S}))
    for index, (name, layer) in enumerate(spectral_layers(model.double()).items()):
        layer.core.get_buffer("S").copy_(exact[name])  # attach rounds it to float32
        if seed is not None:
            train_a_little(layer.core, seed + index)
        if layer.core.branches:
            with torch.no_grad():
                layer.core.get_parameter("skew").mul_(0.2)  # a series that converges
    return model


def reference(case: Case, model: nn.Module, x: Tensor) -> Tensor:
    """What the plain module gives with W' in place of every W."""
    targets = attachment(model).targets.layers
    plain = case.module()
    weights: dict[str, Tensor] = {}
    for name, layer in spectral_layers(model).items():
        first = targets[name].tensors[0]
        base = weights.get(first, plain.get_parameter(first).detach())  # parts of one weight add up
        changed = base + targets[name].layout.tensor(dense_change(layer))
        weights |= dict.fromkeys(targets[name].tensors, changed)
    output: Tensor = torch.func.functional_call(plain, weights, (x,), tie_weights=False)
    return output


def slopes(output: Tensor, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients of a fixed random functional of ``output`` for x and every number of every core."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    wanted = dict(adapter_parameters(model))
    if x.is_floating_point():
        wanted["x"] = x
    found = torch.autograd.grad((output * weights).sum(), list(wanted.values()))
    return dict(zip(wanted, found, strict=True))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", CASES)
def test_it_computes_and_differentiates_what_the_plain_module_does_with_the_new_weight(
    name: str, strategy: Strategy | None
) -> None:
    case = CASES[name]
    for method, spec in METHODS.items():
        model, x = adapted(case, spec, strategy), case.input()
        found, expected = model(x), reference(case, model, x)
        assert {t.kind.name for t in attachment(model).targets.layers.values()} == case.kinds
        assert relative(found, expected) < 1e-12, method
        ours, theirs = slopes(found, model, x), slopes(expected, model, x)
        size = 1 + max(float(g.norm()) for g in theirs.values())
        for key, slope in ours.items():
            assert float((slope - theirs[key]).norm()) < 1e-11 * size, (method, key)


@pytest.mark.parametrize("name", CASES)
def test_an_untrained_adapter_changes_nothing(name: str) -> None:
    case = CASES[name]
    for strategy in ("branch", "dense"):
        for method, spec in METHODS.items():
            model, x = adapted(case, spec, strategy, seed=None), case.input()
            assert torch.equal(model(x), case.module()(x)), method
    model, x = adapted(case, METHODS["mirror"], None, seed=None), case.input()
    assert relative(model(x), case.module()(x)) < 1e-13


@pytest.mark.parametrize("name", CASES)
def test_merged_weights_are_the_module(name: str) -> None:
    case = CASES[name]
    for method, spec in METHODS.items():
        model, x, plain = adapted(case, spec, None), case.input(), case.module()
        state = dict(plain.state_dict())
        for layer_name, layer in spectral_layers(model).items():  # parts of one weight add up
            tensors = attachment(model).targets.layers[layer_name].tensors
            state |= dict.fromkeys(tensors, layer.merged({"weight": state[tensors[0]]})["weight"])
        plain.load_state_dict(state)
        assert relative(plain(x), model(x)) < 1e-12, method


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_is_saved_and_loaded_with_another_drivers_signs(name: str, tmp_path: Path) -> None:
    case, x = CASES[name], CASES[name].input()
    for method, spec in METHODS.items():
        folder, book = tmp_path / method, FingerprintBook()
        folder.mkdir()
        chosen = replace(spec, target_modules=".*", split=case.splits)
        model = attach(case.module().float(), chosen, on_layer=book)
        for index, layer in enumerate(spectral_layers(model).values()):
            train_a_little(layer.core, index)
            if layer.core.branches:
                with torch.no_grad():
                    layer.core.get_parameter("skew").mul_(0.2)
        write_adapter(folder, model, book.entries, base={"name": name}, task=None, extra={})
        loaded = case.module().float()
        load_into(loaded, read_adapter(folder), flipped)
        given = x.float() if x.is_floating_point() else x
        assert torch.equal(loaded(given), model(given)), method


def flipped(name: str, weight: Tensor, rank: int) -> Factors:
    """Factors whose signs are not ours."""
    factors = factorize(weight, rank)
    signs = torch.where(
        torch.rand(factors.S.shape, generator=torch.Generator().manual_seed(9)) < 0.5, -1.0, 1.0
    ).double()
    return Factors(U=factors.U * signs[..., None, :], S=factors.S, Vh=factors.Vh * signs[..., :, None])


@pytest.mark.parametrize("sizes", [3, [4, 1, 1], {"parts": [2, 1, 1], "repeat": 2}], ids=str)
def test_parts_of_a_fused_weight_have_the_bases_of_their_rows(sizes: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 24))
    weight = model[0].weight.detach().clone()
    rows = {
        "3": [range(8), range(8, 16), range(16, 24)],
        "[4, 1, 1]": [range(16), range(16, 20), range(20, 24)],
    }.get(str(sizes), [[*range(6), *range(12, 18)], [*range(6, 9), *range(18, 21)], [*range(9, 12), *range(21, 24)]])
    attach(model, AdapterSpec(split={"0": sizes}, rank=2))
    for index, chosen in enumerate(rows):
        layer = spectral_layers(model)[f"0.{index}"]
        expected = factorize(weight[list(chosen)], 2)
        torch.testing.assert_close(layer.U, expected.U.float())
        torch.testing.assert_close(layer.Vh, expected.Vh.float())
        with torch.no_grad():
            layer.core.get_parameter("theta").fill_(0.5)
        moved = layer.layout.tensor(layer.delta_weight()).abs().sum(dim=1) > 0
        assert moved.nonzero().flatten().tolist() == sorted(chosen)


def test_a_split_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^adapter\.split\.0: 0: 6 outputs do not divide into 1 x \[1, 1, 1, 1\]"):
        attach(nn.Sequential(nn.Linear(4, 6)), AdapterSpec(split={"0": 4}))
    with pytest.raises(ConfigError, match=r"^adapter\.split: 'qkv' matches none"):
        attach(nn.Sequential(nn.Linear(4, 6)), AdapterSpec(split={"qkv": 3}))


@pytest.mark.parametrize("name", CASES)
def test_no_number_of_a_core_is_out_of_use(name: str) -> None:
    """What a forward pass reads around the adapter would leave its core without a gradient, in silence."""
    model, x = adapted(CASES[name], METHODS["mirror"], None), CASES[name].input()
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter_parameters(model).values())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_works_in_other_precisions(name: str, dtype: torch.dtype) -> None:
    """Casting the adapted model, and autocast around a float32 one, stay near the float64 formula."""
    case = CASES[name]
    for strategy in STRATEGIES:
        model, x = adapted(case, METHODS["random input"], strategy), case.input()
        expected = reference(case, model, x)
        given = x.to(torch.float32) if x.is_floating_point() else x
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            found = model.float()(given)
        # bfloat16 rounds at 2^-8 and the modules here chain a few products; float32 at 2^-24.
        assert relative(found, expected) < (0.1 if dtype == torch.bfloat16 else 1e-5), strategy


@pytest.mark.parametrize("name", CASES)
def test_a_copy_is_independent(name: str) -> None:
    model, x = adapted(CASES[name], METHODS["mirror"], "dense"), CASES[name].input()
    twin = copy.deepcopy(model)
    before = model(x)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        for parameter in adapter_parameters(twin).values():
            parameter.add_(0.5)
    assert not torch.equal(twin(x), before)
    assert torch.equal(model(x), before)


def test_every_kind_is_here() -> None:
    # Packed weights have laws of their own: tests/unit/models/test_quantized.py.
    assert {kind.name for kind in KINDS if not kind.is_quantised} == set().union(
        *(case.kinds for case in CASES.values())
    )


def test_only_default_kinds_are_taken_unasked() -> None:
    for name, case in CASES.items():
        model = case.module()
        if not any(kind.is_default for kind in KINDS if kind.name in case.kinds) and name != "conv1d":
            continue
        taken = {t.kind.name for t in attachment(attach(model, AdapterSpec())).targets.layers.values()}
        assert "embedding" not in taken
        assert "parameter" not in taken
    # A network of convolutions alone has nothing else to take.
    assert set(
        spectral_layers(attach(nn.Sequential(nn.Conv2d(2, 3, 2), nn.Conv2d(3, 3, 3, groups=3)), AdapterSpec()))
    ) == {"0"}


def test_experts_are_read_once_a_pass() -> None:
    """The loop over experts asks for the stack once for each; W' is made once, and anew in the next pass."""
    model = adapted(CASES["experts"], METHODS["mirror"], None)
    made = []
    for layer in spectral_layers(model).values():
        plain = layer.adapt
        layer.adapt = lambda *args, plain=plain: made.append(1) or plain(*args)
    x = CASES["experts"].input()
    model(x).sum().backward()
    assert len(made) == 2
    model(x).sum().backward()
    assert len(made) == 4
    assert model[0].gate_up_proj is not model[0].gate_up_proj  # outside a pass nothing is held
