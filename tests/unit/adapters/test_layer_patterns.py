# SPDX-License-Identifier: Apache-2.0
"""layer_patterns: patterns that would take years, and blocks of a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import mirrortune
from mirrortune.adapters.files.adapter_file import read_adapter, write_adapter
from mirrortune.adapters.files.load import adapt, load_into
from mirrortune.adapters.inject import attachment, spectral_layers
from mirrortune.adapters.layer_patterns import fits, in_blocks, matches
from mirrortune.adapters.peft_bridge.options import spelt_out
from mirrortune.adapters.spec import AdapterSpec, check_spec
from mirrortune.adapters.svd import Factors, factorize
from mirrortune.errors import ConfigError
from tests import tiny_runs
from tests.spectral import train_a_little
from tests.tiny_models import tiny_bert, tiny_causal

NAME = "bert.encoder.layer.0.attention.self.query.weight"
ENDLESS = "".join(f"(?P<g{i}>.*)" for i in range(8)) + "".join(f"(?P=g{i})" for i in range(7)) + "[0-9]"
NESTED = "(([a-z.]+)+)+X"  # re takes years for it, regex none


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less to wait for; the pattern takes years in any case."""
    monkeypatch.setattr("mirrortune.adapters.layer_patterns._SECONDS", 0.05)


@pytest.mark.parametrize("where", ["adapter.target_modules", "adapter.split"])
def test_a_pattern_without_end_is_refused(where: str) -> None:
    with pytest.raises(ConfigError, match=f"{where}: .* takes over 0.05 s on '{NAME}'"):
        matches(NAME, ENDLESS, where)


@pytest.mark.parametrize("described", [{"rank_pattern": {ENDLESS: 4}}, {"feedforward_modules": ENDLESS}])
def test_so_is_one_in_the_options_of_a_tuner(described: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="takes over"):
        spelt_out(described, [NAME])


def test_other_patterns_match_as_before() -> None:
    assert matches(NAME, "value|query.weight", "x")
    assert matches(NAME, r"layer\.\d+\..*", "x")
    assert fits(r"(.*\.)?(query\.weight)", NAME, "x")
    assert not matches(NAME, "query", "x")
    assert not matches(NAME, NESTED, "x")
    with pytest.raises(ConfigError, match="not a regular expression"):
        matches(NAME, "(", "x")


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ((0,), {"enc.layer.0.q", "dec.layer.0.q"}),
        (("last 1",), {"enc.layer.2.q", "dec.layer.1.q"}),
        ((0, "last 1"), {"enc.layer.0.q", "enc.layer.2.q", "dec.layer.0.q", "dec.layer.1.q"}),
        ((2,), {"enc.layer.2.q"}),
        (("last 3",), {f"{part}.layer.{i}.q" for part, count in (("enc", 3), ("dec", 2)) for i in range(count)}),
    ],
)
def test_layers_are_chosen_by_their_blocks(wanted: tuple[int | str, ...], expected: set[str]) -> None:
    blocks = {"enc.layer": 3, "dec.layer": 2, "enc.layer.0.experts": 9}
    names = [f"enc.layer.{i}.q" for i in range(3)] + [f"dec.layer.{i}.q" for i in range(2)] + ["pooler.dense"]
    assert in_blocks(names, blocks, wanted) == expected


@pytest.mark.parametrize("wanted", [3, "last 4"])
def test_a_block_that_no_list_has_is_refused(wanted: int | str) -> None:
    with pytest.raises(ConfigError, match=r"got .*the model has 3 blocks. Allowed: 0 to 2, or up to last 3"):
        in_blocks(["a.layer.0.q"], {"a.layer": 3}, (wanted,))


def test_an_adapter_of_some_blocks_is_saved_by_their_names(tmp_path: Path) -> None:
    adapted = tiny_runs.adapt(AdapterSpec(layers=("last 1",)))
    names = list(adapted.book.entries)
    assert names
    assert all(name.startswith("bert.encoder.layer.1.") for name in names)
    read = read_adapter(adapted.save(tmp_path / "a"))
    assert "layers" not in json.loads((tmp_path / "a/adapter.json").read_text())["adapter"]
    model = tiny_bert()
    load_into(model, read, lambda name, matrix, rank: factorize(matrix, rank, name=name))
    assert torch.equal(tiny_runs.logits(model), adapted.logits())


def test_blocks_are_refused_where_nothing_is_adapted() -> None:
    with pytest.raises(ConfigError, match="method 'full' has no layers"):
        check_spec(AdapterSpec(method="full", layers=(0,)))


def test_a_tuner_of_peft_takes_the_same_blocks() -> None:
    pytest.importorskip("peft")
    model = mirrortune.attach(tiny_bert(), method="lora")
    adapted = adapt(tiny_bert(), AdapterSpec(method="lora", layers=("last 1",)), factor_source=none_needed)
    everywhere = attachment(model).layers
    here = [name for name in everywhere if name.startswith("bert.encoder.layer.1.")]
    assert list(adapted.entries) == here
    assert len(here) == 6 < len(everywhere)


def none_needed(name: str, matrix: torch.Tensor, rank: int) -> Factors:
    raise AssertionError(name)


def test_blocks_are_chosen_of_split_layers_too(tmp_path: Path) -> None:
    spec = AdapterSpec(layers=(1,), split={"c_attn": 3}, target_modules="c_attn|c_proj")
    model = tiny_causal("GPT2")
    book = adapt(model, spec, factor_source=lambda name, matrix, rank: factorize(matrix, rank, name=name))
    block = "transformer.h.1"
    parts = [f"{block}.attn.c_attn.{part}" for part in range(3)]
    assert list(book.entries) == [*parts, f"{block}.attn.c_proj", f"{block}.mlp.c_proj"]
    for index, layer in enumerate(spectral_layers(model).values()):
        train_a_little(layer.core, index)
    write_adapter(tmp_path, model, book.entries, base={"dtype": "float32"}, task=None, extra={})
    loaded = mirrortune.load_adapter(tiny_causal("GPT2"), tmp_path)
    assert torch.equal(tiny_runs.logits(loaded), tiny_runs.logits(model))
