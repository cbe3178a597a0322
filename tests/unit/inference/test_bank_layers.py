# SPDX-License-Identifier: Apache-2.0
"""bank_layers: which rows a layer is given, in whatever shape and dtype, and what it computes for them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mirrortune
from mirrortune.errors import ConfigError
from tests.bank_cases import Cases, logits_of, save_trained, token_ids
from tests.tiny_models import tiny_bert

NAMES = ["a", None, "b", "a"]
TWO: dict[str, dict[str, Any]] = {"a": {"method": "mirror"}, "b": {"method": "speclora", "rank": 2}}


class Flattening(nn.Module):
    """Layers that are given the batch in other shapes: (B, T, I), (B T, I), (B 2, T, I)."""

    def __init__(self) -> None:
        super().__init__()
        self.whole, self.flat, self.twice = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.flat(self.whole(x).flatten(0, 1)).reshape(len(x), -1, 5)
        twice: Tensor = self.twice(flat.repeat_interleave(2, dim=0))
        return twice.reshape(len(x), -1)


class TimeFirst(nn.Module):
    """A layer whose input has the batch in its second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.linear(x.transpose(0, 1)).transpose(0, 1)
        return found


def plain(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The output of a model of one input."""
    found: Tensor = model(batch["x"])
    return found


def inputs(*shape: int) -> dict[str, Tensor]:
    return {"x": torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))}


def seeded(build: type[nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def test_rows_are_found_in_every_shape(tmp_path: Path) -> None:
    cases = Cases.make(seeded(Flattening), tmp_path, inputs(3, 6), TWO, plain)
    cases.check(cases.bank(), NAMES, [0, 1, 2, 3])


def test_a_layer_without_rows_is_refused(tmp_path: Path) -> None:
    cases = Cases.make(seeded(TimeFirst), tmp_path, inputs(5, 6), TWO, plain)
    bank = cases.bank()
    with bank.rows(NAMES), pytest.raises(ConfigError, match=r"linear: the layer is given \(5, 4, 6\) numbers"):
        plain(bank.model, cases.batch)


def test_models_that_put_time_first_are_refused(tmp_path: Path) -> None:
    import transformers

    config = transformers.XLNetConfig(vocab_size=50, d_model=16, n_layer=1, n_head=2, d_inner=24)
    base = transformers.XLNetForSequenceClassification(config).eval()
    save_trained(base, tmp_path / "a", 0, method="mirror")
    with pytest.raises(ConfigError, match="its input does not begin with the rows of the batch"):
        mirrortune.AdapterBank(base).add("a", tmp_path / "a")


def test_choices_of_a_row_have_its_adapter(tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    base = transformers.BertForMultipleChoice(transformers.BertConfig(vocab_size=50, **sizes)).eval()
    batch = {"input_ids": token_ids(4 * 3, 5).reshape(4, 3, 5)}
    cases = Cases.make(base, tmp_path, batch, TWO, logits_of)
    cases.check(cases.bank(), NAMES, [0, 1, 2, 3])


def test_tables_of_tokens_and_positions(tmp_path: Path) -> None:
    own = {"a": {"method": "scale", "target_modules": "(word|position)_embeddings|query"}, "b": TWO["b"]}
    cases = Cases.make(tiny_bert(), tmp_path, {"input_ids": token_ids(4, 6)}, own, logits_of)
    cases.check(cases.bank(), NAMES, [0, 1, 2, 3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype: torch.dtype, tmp_path: Path) -> None:
    base = tiny_bert().to(dtype)
    save_trained(base, tmp_path / "a", 0, method="mirror")
    save_trained(base, tmp_path / "b", 1, method="svft", rank=4)
    bank = mirrortune.AdapterBank(copy.deepcopy(base))
    for name in ("a", "b"):
        bank.add(name, tmp_path / name)
    ids = token_ids(4, 7)
    with torch.no_grad(), bank.rows(NAMES):
        found = logits_of(bank.model, {"input_ids": ids})
    assert found.dtype == dtype
    for row, name in enumerate(NAMES):
        model = copy.deepcopy(base)
        if name is not None:
            mirrortune.load_adapter(model, tmp_path / name).eval()
        with torch.no_grad():
            expected = logits_of(model, {"input_ids": ids[row : row + 1]})[0]
        # Products of other shapes may round otherwise, once in each layer.
        error = float((found[row] - expected).abs().max()) / float(expected.abs().max())
        assert error <= 16 * torch.finfo(dtype).eps, f"{name}: {error}"


def test_autocast(tmp_path: Path) -> None:
    cases = Cases.make(tiny_bert(), tmp_path, {"input_ids": token_ids(4, 7)}, TWO, logits_of)
    bank = cases.bank()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), bank.rows(NAMES):
        found = logits_of(bank.model, cases.batch)
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(found[row].float(), cases.alone[name][row], rtol=5e-2, atol=5e-2)


def test_compute_with_gradients_and_in_inference_mode(tmp_path: Path) -> None:
    cases = Cases.make(tiny_bert(), tmp_path, {"input_ids": token_ids(4, 7)}, TWO, logits_of)
    bank = cases.bank()
    with torch.inference_mode():
        cases.check(bank, NAMES, [0, 1, 2, 3])
    with bank.rows(NAMES):
        found = logits_of(bank.model, cases.batch)
    torch.testing.assert_close(found[0], cases.alone["a"][0], rtol=1e-6, atol=1e-6)


def test_a_quantised_base(tmp_path: Path) -> None:
    class Packed(nn.Module):
        """Weights of 8 bits with a scale, which the layer alone knows how to apply."""

        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 8, 8
            generator = torch.Generator().manual_seed(0)
            packed = torch.randint(-127, 127, (8, 8), dtype=torch.int8, generator=generator)
            self.weight = nn.Parameter(packed, requires_grad=False)
            self.register_buffer("scale", torch.tensor(0.01))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)

    base = nn.Sequential(nn.Linear(6, 8), Packed(), nn.Linear(8, 3))
    cases = Cases.make(base, tmp_path, inputs(2, 6), TWO, plain)
    bank = cases.bank()
    cases.check(bank, NAMES, [0, 1, 2, 3])
    assert "1" in bank._seats


def test_modules_that_accelerate_has_hooked(tmp_path: Path) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    cases = Cases.make(seeded(Flattening), tmp_path, inputs(3, 6), TWO, plain)
    model = copy.deepcopy(cases.base)
    add_hook_to_module(model.get_submodule("whole"), AlignDevicesHook(execution_device="cpu"))
    bank = mirrortune.AdapterBank(model)
    for name in ("a", "b"):
        bank.add(name, cases.folder / name)
    cases.check(bank, NAMES, [0, 1, 2, 3])
    bank.close()
    assert torch.equal(plain(model, cases.batch), plain(cases.base, cases.batch))
