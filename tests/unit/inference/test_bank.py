# SPDX-License-Identifier: Apache-2.0
"""bank: adapters added, removed, served in one batch, and refused."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mirrortune
from mirrortune.adapters.files.adapter_file import read_adapter
from mirrortune.errors import ConfigError, VerificationError
from tests.bank_cases import Cases, logits_of, save_trained, token_ids, with_classes
from tests.tiny_models import tiny_bert, tiny_causal

MIRROR: dict[str, Any] = {"method": "mirror"}
THREE: dict[str, dict[str, Any]] = {"a": MIRROR, "b": {"method": "psoft", "rank": 4}, "c": MIRROR}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """Three adapters of a classifier, one with three classes."""
    settings = {**THREE, "three": {"base": with_classes(tiny_bert(), 3), "method": "mirror"}}
    return Cases.make(tiny_bert(), tmp_path_factory.mktemp("bert"), {"input_ids": token_ids(4, 9)}, settings, logits_of)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """Three adapters of a language model."""
    return Cases.make(tiny_causal(), tmp_path_factory.mktemp("llama"), {"input_ids": token_ids(3, 6)}, THREE, logits_of)


@torch.no_grad()
def alone(cases: Cases, name: str | None) -> nn.Module:
    """The base with one adapter, loaded."""
    model = copy.deepcopy(cases.base)
    return model if name is None else mirrortune.load_adapter(model, cases.folder / name).eval()


def test_adapters_are_added_found_and_removed(bert: Cases) -> None:
    bank = bert.bank(["a", "b"])
    assert (bank.names, len(bank), "a" in bank, "c" in bank) == (["a", "b"], 2, True, False)
    bank.add("c", read_adapter(bert.folder / "c"))
    bank.remove("a")
    assert bank.names == ["b", "c"]
    bert.check(bank, ["c", "b", None], [0, 1, 2])
    with pytest.raises(ConfigError, match=r"no adapter is called 'a'.*Allowed: b, c"), bank.rows(["a"]):
        pass
    with pytest.raises(ConfigError, match="no adapter is called 'a'"):
        bank.remove("a")


def test_a_name_is_taken_unless_it_is_replaced(bert: Cases) -> None:
    bank = bert.bank(["a", "b"])
    with pytest.raises(ConfigError, match="'a' is taken"):
        bank.add("a", bert.folder / "c")
    bank.add("a", bert.folder / "b", replace=True)
    with torch.no_grad(), bank.rows(["a"] * 4):
        found = logits_of(bank.model, bert.batch)
    torch.testing.assert_close(found, bert.alone["b"], rtol=1e-6, atol=1e-6)


def test_rows_with_other_numbers_of_classes(bert: Cases) -> None:
    bank = bert.bank()
    assert [bank.num_labels(name) for name in ("a", "three")] == [2, 3]
    with torch.no_grad(), bank.rows(["three", "a", None, "three"]):
        logits = logits_of(bank.model, bert.batch)
    assert logits.shape == (4, 3)
    assert torch.isneginf(logits).tolist() == [[False] * 3, [False, False, True], [False, False, True], [False] * 3]
    assert float(logits.softmax(dim=-1)[1, 2]) == 0, "a class that a row does not have is never likely"
    bert.check(bank, ["three", "a", None, "three"], [0, 1, 2, 3])


def test_coefficients_are_computed_in_float32_under_autocast(bert: Cases, tmp_path: Path) -> None:
    save_trained(tiny_bert(), tmp_path / "series", 1, method="psoft", rank=4, neumann_terms=5)
    found: list[Tensor] = []
    for context in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        bank = mirrortune.AdapterBank(tiny_bert())
        bank.add("series", tmp_path / "series")
        with torch.no_grad(), bank.rows(["series"] * 4), context:
            serving = bank._peek()
            assert serving is not None
            (group,) = serving.groups(next(iter(bank._seats.values())))
        found += group.parts[0].mixers[0]._coefficients[0]  # type: ignore[attr-defined]
    assert torch.equal(*found)


def test_an_adapter_without_a_head_has_no_classes(llama: Cases) -> None:
    assert llama.bank(["a"]).num_labels("a") is None


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("a", r"got 'a'\. Allowed: a list"),
        ([], r"got \[\]"),
        (["a", "zz"], "no adapter is called 'zz'"),
    ],
)
def test_rows_that_name_nothing_are_refused(bert: Cases, names: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said), bert.bank(["a"]).rows(names):
        pass


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_a_batch_with_another_number_of_rows_is_refused(bert: Cases, count: int) -> None:
    bank = bert.bank(["a"])
    with bank.rows(["a"] * count), pytest.raises(ConfigError, match=f"the batch has 4 rows, and {count} were named"):
        logits_of(bank.model, bert.batch)
    with torch.no_grad():
        assert torch.equal(logits_of(bank.model, bert.batch), logits_of(bert.base, bert.batch))


def test_what_is_not_adapted_by_the_bank_is_refused(bert: Cases, tmp_path: Path) -> None:
    bank = bert.bank(["a"])
    with pytest.raises(ConfigError, match="the model is in another bank"):
        mirrortune.AdapterBank(bank.model)
    with pytest.raises(ConfigError, match="has an adapter already"):
        mirrortune.AdapterBank(alone(bert, "a"))
    with pytest.raises(ConfigError, match="a model in a bank cannot be copied"):
        copy.deepcopy(bank.model)
    with pytest.raises(ConfigError, match="name: got ''"):
        bank.add("", bert.folder / "a")
    save_trained(bert.base, tmp_path / "full", 0, method="full")
    with pytest.raises(ConfigError, match="'full' trains every weight"):
        bank.add("full", tmp_path / "full")
    assert bank.names == ["a"]


def test_adapters_of_peft_are_refused_by_name(bert: Cases, tmp_path: Path) -> None:
    bank = bert.bank(["a"])
    save_trained(bert.base, tmp_path / "lora", 0, method="lora")
    with pytest.raises(ConfigError, match="'lora' is a method of PEFT, which a bank does not mix"):
        bank.add("lora", tmp_path / "lora")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds an adapter of PEFT"):
        bank.add("lora", tmp_path / "plain")


def test_adapters_of_another_base_are_refused(bert: Cases, llama: Cases, tmp_path: Path) -> None:
    bank = bert.bank(["a"])
    with pytest.raises(VerificationError, match="no such layer"):
        bank.add("llama", llama.folder / "a")
    save_trained(tiny_bert(seed=5), tmp_path / "other", 0, method="mirror")
    with pytest.raises(VerificationError, match="not the one that the adapter was trained on"):
        bank.add("other", tmp_path / "other")
    updated = copy.deepcopy(bert.base)
    updated.get_parameter("bert.encoder.layer.0.output.LayerNorm.weight").data += 1
    with pytest.warns(UserWarning, match="differs in 1 of the weights that the adapter leaves as they are"):
        mirrortune.AdapterBank(updated).add("a", bert.folder / "a")
    headless = mirrortune.AdapterBank(copy.deepcopy(bert.base).get_submodule("bert"))
    with pytest.raises(VerificationError):
        headless.add("a", bert.folder / "a")


def test_a_damaged_file_is_refused(bert: Cases, tmp_path: Path) -> None:
    save_trained(bert.base, tmp_path / "a", 0, method="mirror")
    file = tmp_path / "a" / "adapter.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(VerificationError, match="damaged"):
        bert.bank(["a"]).add("b", tmp_path / "a")


def test_weights_that_a_module_reads_are_refused(tmp_path: Path) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.linear(self.attention(x, x, x)[0])
            return out

    torch.manual_seed(0)
    model = Reader()
    save_trained(model, tmp_path / "all", 0, method="scale")
    save_trained(model, tmp_path / "out", 0, method="scale", target_modules="out_proj")
    bank = mirrortune.AdapterBank(model)
    with pytest.raises(ConfigError, match=r"attention\.in_proj_weight: it is a weight .* that a module reads"):
        bank.add("all", tmp_path / "all")
    with pytest.raises(ConfigError, match="MultiheadAttention reads its weight"):
        bank.add("out", tmp_path / "out")


def test_a_weight_that_the_model_reads_is_never_the_wrong_one(tmp_path: Path) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x.to(self.linear.weight.dtype), self.linear.weight)

    torch.manual_seed(0)
    model = Reader()
    save_trained(model, tmp_path / "a", 0, method="scale")
    bank = mirrortune.AdapterBank(model)
    bank.add("a", tmp_path / "a")
    x = torch.randn(2, 8)
    before = model(x)
    with bank.rows([None, None]):
        assert torch.equal(model(x), before)
    with bank.rows(["a", None]), pytest.raises(ConfigError, match=r"linear\.weight: the model reads it instead"):
        model(x)


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_has_the_adapter_of_each_row(llama: Cases, beams: int) -> None:
    bank, names = llama.bank(), ["b", None, "a"]
    options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    prompt = {**llama.batch, "attention_mask": torch.ones_like(llama.batch["input_ids"])}
    with bank.rows(names):
        found = bank.model.generate(**prompt, **options)  # type: ignore[operator]
    for row, name in enumerate(names):
        one = {key: t[row : row + 1] for key, t in prompt.items()}
        expected = alone(llama, name).generate(**one, **options)  # type: ignore[operator]
        assert found[row, : expected.shape[1]].tolist() == expected[0].tolist(), name
    with bank.rows(["a", "b"]), pytest.raises(ConfigError, match="the batch has 3 rows, and 2 were named"):
        bank.model.generate(**prompt, **options)  # type: ignore[operator]


def test_several_sequences_in_a_row_have_one_adapter(llama: Cases) -> None:
    bank = llama.bank()
    ids = llama.batch["input_ids"]
    packed = {"input_ids": torch.cat([ids[:2], ids[1:]], dim=1)}
    packed["position_ids"] = torch.arange(6).repeat(2, 2)
    packed["attention_mask"] = torch.ones(2, 12, dtype=torch.int64)
    with torch.no_grad(), bank.rows(["a", "b"]):
        found = logits_of(bank.model, packed)
    for row, name in enumerate(["a", "b"]):
        with torch.no_grad():
            expected = logits_of(alone(llama, name), {key: t[row : row + 1] for key, t in packed.items()})
        torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-6, atol=1e-6)


def test_memory_is_little_more_than_the_trained_numbers(bert: Cases, tmp_path: Path) -> None:
    bank = mirrortune.AdapterBank(copy.deepcopy(bert.base))
    shared = 0
    for index in range(4):
        model = save_trained(bert.base, tmp_path / str(index), index, method="random", seed=7, scale_top_k="all")
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        bank.add(str(index), tmp_path / str(index))
        assert bank.adapter_nbytes(str(index)) <= 2 * 4 * trained
        assert shared in (0, bank.shared_nbytes()), "factors are held once"
        shared = bank.shared_nbytes()
    assert len(bank._admission._structures) == 1
    bank.add("low", save_and_name(bert.base, tmp_path / "low", method="lora-xs", rank=3))
    assert bank.shared_nbytes() == shared, "fewer directions are the first of those that are held"


def save_and_name(base: nn.Module, folder: Path, **settings: Any) -> Path:
    """Save an adapter; returns its folder."""
    save_trained(base, folder, 0, **settings)
    return folder


def test_adding_and_removing_while_others_serve(bert: Cases) -> None:
    bank = bert.bank(["a", "b"])
    stop = threading.Event()

    def serve() -> int:
        count = 0
        while not stop.is_set() or not count:
            bert.check(bank, ["a", "b", None, "a"], [0, 1, 2, 3])
            count += 1
        return count

    def change() -> None:
        for _ in range(5):
            bank.add("three", bert.folder / "three")
            bank.add("c", bert.folder / "c")
            bank.remove("three")
            bank.remove("c")

    with ThreadPoolExecutor(3) as pool:
        served = [pool.submit(serve) for _ in range(2)]
        try:
            pool.submit(change).result()
        finally:
            stop.set()
        assert all(future.result() for future in served)
    assert bank.names == ["a", "b"]


def test_rows_keep_the_adapter_they_began_with(bert: Cases) -> None:
    bank = bert.bank(["a"])
    with torch.no_grad(), bank.rows(["a"] * 4):
        bank.remove("a")
        bank.add("a", bert.folder / "c")
        found = logits_of(bank.model, bert.batch)
    torch.testing.assert_close(found, bert.alone["a"], rtol=1e-6, atol=1e-6)
    with torch.no_grad(), bank.rows(["a"] * 4):
        found = logits_of(bank.model, bert.batch)
    torch.testing.assert_close(found, bert.alone["c"], rtol=1e-6, atol=1e-6)


def test_a_thread_outside_of_rows_is_told_so(bert: Cases) -> None:
    bank = bert.bank(["a"])
    with ThreadPoolExecutor(1) as pool, bank.rows(["a"] * 4):
        forgotten = pool.submit(logits_of, bank.model, bert.batch)
        with pytest.raises(ConfigError, match="outside rows"):
            forgotten.result()


def test_rows_may_lie_in_rows(bert: Cases) -> None:
    bank = bert.bank(["a", "b"])
    with bank.rows(["a"]):
        bert.check(bank, ["b", "a"], [0, 1])
        with torch.no_grad():
            found = logits_of(bank.model, {"input_ids": bert.batch["input_ids"][:1]})
    torch.testing.assert_close(found, bert.alone["a"][:1], rtol=1e-6, atol=1e-6)


def test_a_closed_bank_leaves_the_model_as_it_was(llama: Cases) -> None:
    model = copy.deepcopy(llama.base)
    classes = [type(module) for module in model.modules()]
    state = {key: t.clone() for key, t in model.state_dict().items()}
    bank = mirrortune.AdapterBank(model)
    bank.add("a", llama.folder / "a")
    with bank.rows(["a"]), pytest.raises(ConfigError, match="rows are being served"):
        bank.close()
    assert model.state_dict().keys() == state.keys(), "names of weights are the base's all the time"
    bank.close()
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())
    assert not {"generate", "_mirrortune_bank"} & vars(model).keys()
    assert mirrortune.load_adapter(model, llama.folder / "a") is model


def test_a_closed_bank_refuses_and_an_open_one_keeps_its_model(llama: Cases, tmp_path: Path) -> None:
    model = copy.deepcopy(llama.base)
    bank = mirrortune.AdapterBank(model)
    bank.add("a", llama.folder / "a")
    for adapt in (mirrortune.attach, lambda model: mirrortune.load_adapter(model, llama.folder / "a")):
        with pytest.raises(ConfigError, match=r"the model is in an AdapterBank.*close\(\)"):
            adapt(model)
    bank.close()
    bank.close()
    for use in (
        lambda: bank.add("a", llama.folder / "a"), lambda: bank.remove("a"), lambda: bank.num_labels("a"),
        lambda: bank.save(tmp_path / "bank.safetensors"), lambda: bank.rows(["a"]).__enter__(),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="the bank is closed"):
            use()


def test_a_head_of_another_width_has_no_loss(bert: Cases) -> None:
    bank = bert.bank(["a", "three"])
    inputs = {"input_ids": bert.batch["input_ids"][:2], "labels": torch.zeros(2, dtype=torch.long)}
    with bank.rows(name for name in ("a", "three")), pytest.raises(ConfigError, match="Call it without labels"):
        bank.model(**inputs)
    with bank.rows(["a", None]):
        assert bank.model(**inputs).loss.isfinite()


def test_a_base_that_is_cast_under_its_adapters_is_refused(bert: Cases) -> None:
    base = copy.deepcopy(bert.base)
    bank = mirrortune.AdapterBank(base)
    base.double()
    base.float()
    bank.add("a", bert.folder / "a")
    with torch.no_grad(), bank.rows(["a"] * 4):
        base.half()
        with pytest.raises(ConfigError, match=r"its model was cast from float32 to float16, and the adapters were not"):
            base(**bert.batch)
    with pytest.raises(ConfigError, match="Cast the model before the bank is created"):
        bank.add("b", bert.folder / "b")
    base.float()
    with torch.no_grad(), bank.rows(["a"] * 4):
        base(**bert.batch)
