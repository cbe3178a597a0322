# SPDX-License-Identifier: Apache-2.0
"""new_tokens: what the tokenizer takes, the rows that a model gets, and the gradients of new rows alone."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mirrortune
from mirrortune.adapters.inject import AdapterSpec, attach, plain_parameters
from mirrortune.adapters.plain import RowRange, embedding_tables
from mirrortune.errors import ConfigError, VerificationError
from mirrortune.models.load import find_model, load_model, load_tokenizer
from mirrortune.models.new_tokens import add_tokens, known_tokens, make_room, token_rows
from tests.bank_cases import save_trained
from tests.tiny_models import tiny_bert, tiny_causal, tiny_tokenizer, write_tiny_seq2seq

FAMILIES = {"Llama": {}, "GPT2": {}, "Gemma2": {"head_dim": 8}}  # GPT2 and Gemma2 tie, Gemma2 scales its embeddings


def test_tokens_are_found_exactly_as_they_are_written() -> None:
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    assert known_tokens(tokenizer, ["film", "<user>"]) == ["film"]
    add_tokens(tokenizer, ["<user>", "Zweig"])
    assert token_rows(tokenizer, ["Zweig", "<user>"]) == (size, size + 2)
    # In the middle of a word too, and not in lower case, though the tokenizer has no upper case.
    assert tokenizer.tokenize("the<user>film Zweig zweig") == [
        "the", "<user>", "film", "Zweig", "z", "##w", "##e", "##i", "##g"
    ]  # fmt: skip
    assert "<user>" in tokenizer.decode(tokenizer("<user>").input_ids, skip_special_tokens=True)


@pytest.mark.parametrize("first", [100, 128, 130])
def test_new_rows_are_the_mean_of_all_before_them_and_old_ones_are_untouched(first: int) -> None:
    base = tiny_bert()
    state = torch.get_rng_state()
    model = make_room(copy.deepcopy(base), first, first + 3)
    assert torch.equal(torch.get_rng_state(), state)
    before, after = (m.get_parameter("bert.embeddings.word_embeddings.weight") for m in (base, model))
    known = min(first, 128)
    assert after.shape[0] == max(128, first + 3)
    assert torch.equal(after[:known], before[:known])
    mean = before[:known].double().mean(dim=0).float()
    assert all(torch.equal(row, mean) for row in after[known : first + 3])
    assert torch.equal(after[first + 3 :], before[first + 3 :])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_whole_matrix_in_its_new_rows(family: str) -> None:
    """In float64, tied and untied, with and without a scale in the forward of the embeddings."""
    base = make_room(tiny_causal(family, **FAMILIES[family]).double(), 270, 275)
    for parameter in base.parameters():
        parameter.requires_grad_(requires_grad=True)
    adapted = attach(copy.deepcopy(base), AdapterSpec(method="none", new_rows=(270, 275)))
    ids = torch.tensor([[5, 271, 9, 270], [272, 272, 8, 274]])
    outputs = [model(input_ids=ids).logits for model in (base, adapted)]
    assert torch.equal(*outputs)
    for logits in outputs:
        logits.square().sum().backward()
    held = plain_parameters(adapted)
    assert len(held) == (2 if family == "Llama" else 1)
    for name, rows in held.items():
        where = RowRange.parse(name)
        assert where is not None
        expected = base.get_parameter(where.weight).grad
        assert expected is not None
        assert rows.grad is not None
        assert torch.allclose(rows.grad, expected[where.first : where.stop], rtol=1e-12, atol=1e-14)
    assert [name for name, p in adapted.named_parameters() if p.requires_grad] == [
        name for name, p in adapted.named_parameters() if name.endswith(".rows")
    ]


@pytest.mark.parametrize("method", ["mirror", "lora", "bitfit"])
@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_new_rows_are_saved_and_loaded_alone(tmp_path: Path, family: str, method: str) -> None:
    if method == "lora":
        pytest.importorskip("peft")
        if family == "GPT2":
            family = "Mistral"
    base = tiny_causal(family)
    room = make_room(copy.deepcopy(base), 272, 276)
    spec = AdapterSpec(method=method, new_rows=(272, 276))
    from mirrortune.adapters.factor_cache import FactorCache
    from mirrortune.adapters.files.adapter_file import read_adapter, write_adapter
    from mirrortune.adapters.files.load import adapt

    book = adapt(room, spec, factor_source=FactorCache())
    with torch.no_grad():
        for parameter in plain_parameters(room).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    (tmp_path / "adapter").mkdir()
    names = {"name": "tiny", "dtype": "float32", "new_tokens": ["a", "b", "c", "d"]}
    write_adapter(tmp_path / "adapter", room, book.entries, base=names, task=None, extra={})
    stored = read_adapter(tmp_path / "adapter").plain_tensors()
    assert {tuple(tensor.shape) for name, tensor in stored.items() if "[" in name} == {(4, 32)}

    loaded = mirrortune.load_adapter(copy.deepcopy(base), tmp_path / "adapter")
    ids = torch.tensor([[5, 273, 9, 272]])
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=ids).logits, room.eval()(input_ids=ids).logits)
    # Saved again, it is the same adapter.
    mirrortune.save_adapter(loaded, tmp_path / "again")
    again = read_adapter(tmp_path / "again")
    assert again.base["new_tokens"] == names["new_tokens"]
    assert all(torch.equal(tensor, stored[name]) for name, tensor in again.plain_tensors().items())
    with pytest.raises(ConfigError, match=r"a vocabulary of its own|which a bank does not mix"):
        mirrortune.AdapterBank(base).add("a", tmp_path / "adapter")


def test_rows_are_made_once_while_nothing_changes() -> None:
    model = make_room(tiny_causal("GPT2"), 272, 274)
    attach(model, AdapterSpec(method="none", new_rows=(272, 274)))
    table: Any = model.get_submodule("transformer.wte")
    (rows,) = plain_parameters(model).values()
    with torch.no_grad():
        first = table.weight
        assert table.weight is first
        rows.add_(1.0)
        assert torch.equal(table.weight[272:274], rows)
        assert torch.equal(table.weight[:272], first[:272])
    assert table.weight.requires_grad
    assert model.to(torch.bfloat16).get_parameter("transformer.wte.parametrizations.weight.0.rows").dtype


def test_a_sequence_to_sequence_model_shares_its_new_rows(tmp_path: Path) -> None:
    folder = write_tiny_seq2seq(tmp_path / "base")
    source = find_model(str(folder), new_tokens=["<user>", "Zweig"])
    model = load_model(source, "AutoModelForSeq2SeqLM", {}, torch.float32, 256).model
    start, stop = token_rows(load_tokenizer(source), source.new_tokens)
    attach(model, AdapterSpec(method="none", new_rows=(start, stop)))
    with torch.no_grad():
        for rows in plain_parameters(model).values():
            rows.copy_(torch.randn_like(rows))
    tables: list[Any] = [model.get_submodule(name) for name in ("shared", "encoder.embed_tokens")]
    assert torch.equal(tables[0].weight[start:stop], tables[1].weight[start:stop])
    assert not torch.equal(tables[0].weight[start], tables[0].weight[start + 1])


def test_what_has_no_embeddings_is_refused() -> None:
    with pytest.raises(ConfigError, match=re.escape("data.add_tokens: Linear has no embeddings of tokens")):
        embedding_tables(nn.Linear(2, 2))


def test_a_tokenizer_that_does_not_take_them_is_refused() -> None:
    class Bytes:
        """Takes none."""

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

        def add_tokens(self, tokens: list[Any]) -> None:
            """Ignore them."""

    with pytest.raises(ConfigError, match="Bytes does not take them as new tokens"):
        add_tokens(Bytes(), ["<user>"])


def test_a_file_that_asks_for_more_tokens_than_it_has_rows_is_refused(tmp_path: Path) -> None:
    from mirrortune.adapters.files.description import edited_text

    save_trained(tiny_bert(), tmp_path / "adapter", 0, rank=2)
    path = tmp_path / "adapter" / "adapter.json"
    tokens = [f"t{number}" for number in range(100_000)]
    path.write_text(edited_text(path.read_text(), lambda found: found["base"].update(new_tokens=tokens)))
    with pytest.raises(VerificationError, match=r"base.new_tokens is invalid"):
        mirrortune.load_adapter(tiny_bert(), tmp_path / "adapter")
