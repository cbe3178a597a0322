# SPDX-License-Identifier: Apache-2.0
"""Cores against sources that are not ours: the papers' counts and dense formulas, and PEFT's PSOFT."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaForSequenceClassification

from mirrortune.adapters.cores.lora_sb import LoraSb
from mirrortune.adapters.cores.lora_xs import LoraXs
from mirrortune.adapters.cores.psoft import Psoft
from mirrortune.adapters.cores.scale import Scale
from mirrortune.adapters.cores.svft import Svft
from mirrortune.adapters.layers import SpectralLinear, delta_weight
from mirrortune.adapters.spec import AdapterSpec
from mirrortune.adapters.svd import Factors, Rank, factorize
from mirrortune.errors import ConfigError
from mirrortune.runs.size import make_plan
from tests.spectral import Problem, relative, train_a_little

QV = r"q_proj|v_proj"
ENCODER_QV = r"attention\.self\.(query|value)"


def encoder() -> nn.Module:
    """RoBERTa-base's shape on the meta device: 72 linear layers in the base model, no pooler."""
    with torch.device("meta"):
        return RobertaForSequenceClassification(RobertaConfig())


def llama() -> nn.Module:
    """Llama-3.2-3B's shape on the meta device."""
    config = LlamaConfig(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        vocab_size=128,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


# (model, method, rank, options, targets, published or derived count)
COUNTS = [
    (encoder, "mirror", None, {}, "all-linear", 27_648),
    (encoder, "mirror", None, {}, ENCODER_QV, 9_216),
    (encoder, "mirror", "out", {}, "all-linear", 41_472),
    (encoder, "mirror", "out", {}, ENCODER_QV, 9_216),
    (encoder, "mirror", None, {"rounds": 3}, "all-linear", 3 * 27_648),
    (encoder, "random", "out", {"rounds": 2}, "all-linear", 2 * 41_472),
    (encoder, "adaptive", None, {"rounds": 2}, "all-linear", 2 * 27_648),
    (encoder, "neighbor", None, {"rounds": 2}, "all-linear", 72 * (384 + 383)),
    (encoder, "givens", None, {"scale_top_k": 8}, "all-linear", 27_648 + 72 * 8),
    (encoder, "svft", None, {}, "all-linear", 55_296),
    (encoder, "svft", None, {}, ENCODER_QV, 18_432),
    (encoder, "psoft", 46, {}, "all-linear", 81_144),
    (encoder, "psoft", 32, {}, "all-linear", 40_320),
    (encoder, "lora-xs", 16, {}, "all-linear", 18_432),
    (encoder, "lora-sb", None, {}, "all-linear", 72 * 20**2),
    (encoder, "lora-sb", 24, {}, "all-linear", 41_472),
    (llama, "mirror", None, {}, QV, 57_344),
    (llama, "mirror", None, {}, "all-linear", 243_712),
    (llama, "mirror", "out", {}, QV, 57_344),
    (llama, "mirror", "out", {}, "all-linear", 387_072),
    (llama, "svft", None, {}, QV, 114_688),
    (llama, "svft", None, {}, "all-linear", 487_424),
    (llama, "psoft", 32, {}, QV, 31_360),
    (llama, "psoft", 46, {}, "all-linear", 220_892),
    (llama, "lora-xs", 16, {}, "all-linear", 50_176),
]


@pytest.mark.parametrize(("build", "method", "rank", "options", "targets", "expected"), COUNTS)
def test_trained_numbers_are_the_papers(
    build: Any, method: str, rank: Rank | None, options: dict[str, Any], targets: str, expected: int
) -> None:
    spec = AdapterSpec(method=method, rank=rank, options=options, target_modules=targets)
    plan = make_plan(build(), spec)
    assert plan.trainable_parameters == expected


@pytest.mark.parametrize("bands", [1, 2, 4])
def test_banded_svft_has_the_papers_count(bands: int) -> None:
    rank = 20
    S = torch.linspace(2, 1, rank)
    expected = rank * (2 * bands + 1) - bands * (bands + 1)
    for pattern in ("banded", "random"):
        assert Svft(S, pattern=pattern, bands=bands).values.numel() == expected


def test_lora_sb_starts_with_the_best_approximation_of_adams_first_step() -> None:
    gradient = torch.randn(9, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = 1e-3 * -gradient.sign()
    factors = factorize(-gradient.sign(), 3)
    core = LoraSb(factors.S, first_step=1e-3)
    for name, value in core.start().items():
        core.get_parameter(name).data.copy_(value)
    change = delta_weight(factors, core)
    U, S, Vh = torch.linalg.svd(step)
    torch.testing.assert_close(change, U[:, :3] * S[:3] @ Vh[:3], rtol=0, atol=1e-14)
    assert float((step - change).norm()) == pytest.approx(float(S[3:].norm()))  # Eckart-Young: none of rank 3 is closer


def test_lora_sb_is_trained_by_the_projected_gradient_without_a_scale() -> None:
    generator = torch.Generator().manual_seed(1)
    factors = factorize(torch.randn(9, 7, generator=generator, dtype=torch.float64), 3)
    x, y, W = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((5, 7), (5, 9), (9, 7)))
    linear = nn.Linear(7, 9, bias=False, dtype=torch.float64)
    linear.weight.data.copy_(W)
    core = train_a_little(LoraSb(factors.S), seed=2)
    layer = SpectralLinear(linear, factors, core, "branch")
    dense = (W + factors.U @ core.get_parameter("matrix").detach() @ factors.Vh).requires_grad_()
    torch.testing.assert_close(layer(x), x @ dense.T)
    ((layer(x) - y) ** 2).sum().backward()
    ((x @ dense.T - y) ** 2).sum().backward()
    torch.testing.assert_close(core.get_parameter("matrix").grad, factors.U.T @ dense.grad @ factors.Vh.T)


def paper_cayley(core: Psoft) -> Tensor:
    """R = (I - Q)(I + Q)^-1, by an explicit inverse."""
    rank = core.S.shape[0]
    Q = torch.zeros(rank, rank, dtype=torch.float64)
    Q[core.upper, core.lower] = core.skew.detach().double()
    Q = Q - Q.T
    eye = torch.eye(rank, dtype=torch.float64)
    return (eye - Q) @ torch.linalg.inv(eye + Q)


def test_psoft_is_the_papers_formula() -> None:
    # The paper: h = (A' diag(alpha) R diag(beta) B' + W_res)^T x with W_pre = W^T = U S V^T, A' = U_r, B' = S_r V_r^T.
    problem = Problem(9, 7, 5, seed=1)
    weight = problem.weight()
    factors = factorize(weight, problem.rank)
    core = train_a_little(Psoft(factors.S), seed=2)
    assert isinstance(core, Psoft)
    A, B = (
        factors.Vh.T,
        torch.diag(factors.S) @ factors.U.T,
    )  # (in, r) and (r, out): the paper's weight is ours transposed
    alpha, beta = (torch.diag(v.detach().double()) for v in (core.alpha, core.beta))
    adapted = A @ alpha @ paper_cayley(core) @ beta @ B + (weight.T - A @ B)
    layer = linear_with(weight)
    ours = weight + SpectralLinear(layer, factors, core, "branch").delta_weight()
    assert relative(ours.T, adapted) < 1e-12


def test_neumann_series_approaches_the_exact_inverse_and_refuses_to_diverge() -> None:
    S = torch.linspace(3, 1, 6, dtype=torch.float64)
    exact = Psoft(S)
    with torch.no_grad():
        exact.skew.copy_(0.05 * torch.randn(15, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    errors = []
    for terms in (1, 3, 5, 9):
        series = Psoft(S, neumann_terms=terms)
        series.load_state_dict(exact.state_dict())
        errors.append(relative(series.delta_matrix(), exact.delta_matrix()))
    assert errors == sorted(errors, reverse=True)
    # A series cut after degree n is off by about ||Q||^(n + 1), here below 0.2^10.
    assert errors[-1] < 0.2**10 * 10
    with torch.no_grad():
        series.skew.copy_(torch.ones(15, dtype=torch.float64))
    with pytest.raises(ConfigError, match="diverges"):
        series.coefficients(delta=True)


def test_diagonal_and_free_cores_are_their_papers_formulas() -> None:
    problem = Problem(8, 6, 6, seed=3)
    weight = problem.weight()
    factors = factorize(weight)
    U, S, Vh = factors.U, factors.S, factors.Vh

    def adapted(core: Any) -> Tensor:
        return (
            weight + SpectralLinear(linear_with(weight), factors, train_a_little(core, seed=4), "branch").delta_weight()
        )

    scale = Scale(S, top_k=3)
    factor = torch.ones(6, dtype=torch.float64)
    changed = adapted(scale)
    factor[:3] += scale.scale.detach()
    assert relative(changed, U @ torch.diag(S * factor) @ Vh) < 1e-12
    svft = Svft(S, pattern="banded", bands=1)
    changed = adapted(svft)
    M = torch.zeros(6, 6, dtype=torch.float64)
    positions = [(i, j) for i in range(6) for j in range(6) if abs(i - j) <= 1]
    for value, (i, j) in zip(svft.values.tolist(), positions, strict=True):
        M[i, j] = value
    assert relative(changed, U @ (torch.diag(S) + M) @ Vh) < 1e-12
    free = LoraXs(S)
    changed = adapted(free)
    eye = torch.eye(6, dtype=torch.float64)
    assert relative(changed, U @ torch.diag(S) @ (eye + free.matrix.detach()) @ Vh) < 1e-12


def test_psoft_equals_pefts_with_the_same_basis_and_numbers() -> None:
    # PEFT writes R = (I + Q)(I - Q)^-1, the paper's with Q negated: the transpose, which is what K needs.
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install -e '.[peft]'")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 16))
    plain = copy.deepcopy(base[0])
    config = peft.PsoftConfig(r=6, psoft_alpha=6, target_modules=["0"], psoft_svd="full", use_cayley_neumann=False)
    theirs = peft.get_peft_model(base, config)
    tuned = theirs.base_model.model[0]
    numbers = tuned.psoft_R["default"]
    with torch.no_grad():
        for parameter in numbers.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    A, B = tuned._psoft_A_cache["default"], tuned._psoft_B_cache["default"]  # Vh_r and U_r diag(S_r)
    S = torch.linalg.svdvals(plain.weight.detach())[:6]
    core = Psoft(S)
    with torch.no_grad():
        core.skew.copy_(numbers.weight)
        core.alpha.copy_(numbers.vector_a)
        core.beta.copy_(numbers.vector_b)
    ours = SpectralLinear(plain, Factors(U=B / S, S=S, Vh=A), core, "branch")
    x = torch.randn(5, 24)
    changed = theirs(x)
    assert relative(changed, plain(x)) > 0.01  # the comparison is of something
    torch.testing.assert_close(ours(x), changed, rtol=1e-5, atol=1e-5)


def linear_with(weight: Tensor) -> nn.Linear:
    """A float64 linear layer with this weight and no bias."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def test_random_svft_positions_belong_to_the_seed() -> None:
    S = torch.linspace(2, 1, 12)
    first, again, other = (Svft(S, pattern="random", pattern_seed=s) for s in (1, 1, 2))
    assert torch.equal(first.rows, again.rows)
    assert torch.equal(first.columns, again.columns)
    assert not np.array_equal(first.columns.numpy(), other.columns.numpy())
