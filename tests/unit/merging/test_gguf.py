# SPDX-License-Identifier: Apache-2.0
"""export_gguf: a LoRA under llama.cpp's names, its rows in llama.cpp's order."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import mirrortune
from mirrortune.adapters.inject import spectral_layers
from mirrortune.errors import ConfigError, VerificationError
from mirrortune.merging.gguf import export_gguf
from tests.spectral import relative, train_a_little
from tests.tiny_models import tiny_causal, tiny_chat_tokenizer
from tests.unit.merging.test_in_memory import write_trained

gguf = pytest.importorskip("gguf")
NAMES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
         "up_proj": "ffn_up", "down_proj": "ffn_down"}  # fmt: skip


def trained(folder: Path, family: str = "Llama", **options: Any) -> nn.Module:
    """A trained adapter of a tiny language model in ``folder/base``, saved in ``folder/adapter``."""
    tiny_causal(family).save_pretrained(folder / "base")  # type: ignore[operator]
    tiny_chat_tokenizer().save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    mirrortune.attach(model, **options)
    for index, layer in enumerate(spectral_layers(model).values()):
        train_a_little(layer.core, index)
    mirrortune.save_adapter(model, folder / "adapter")
    assert isinstance(model, nn.Module)
    return model


def read(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a GGUF file by name."""
    return {t.name: torch.from_numpy(np.array(t.data, np.float64)) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_the_file_is_the_adapter(tmp_path: Path, family: str) -> None:
    model = trained(tmp_path, family, rank=8)
    verdict = export_gguf(str(tmp_path / "adapter"), tmp_path / "gguf")
    assert verdict.passed
    assert (verdict.rank, verdict.needed_rank, verdict.architecture) == (8, 8, family.lower())
    written = read(tmp_path / "gguf" / "adapter.gguf")
    layers = spectral_layers(model)
    assert len(written) == 2 * len(layers)
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    # transformers' own reader of GGUF checkpoints says where the rows of a Llama's query and key lie.
    processor = LlamaTensorProcessor({"num_attention_heads": 4, "num_key_value_heads": 2})
    for name, layer in layers.items():
        block, kind = name.split(".")[2], name.rpartition(".")[2]
        own = f"blk.{block}.{NAMES[kind]}.weight"
        product = (written[f"{own}.lora_b"] @ written[f"{own}.lora_a"]).numpy()
        turned = processor.process(product, own).weights if family == "Llama" else product
        assert relative(torch.from_numpy(turned.copy()), layer.delta_weight()) <= 1e-6
    fields = gguf.GGUFReader(tmp_path / "gguf" / "adapter.gguf").fields
    assert fields["general.type"].contents() == "adapter"
    assert fields["adapter.type"].contents() == "lora"
    assert fields["adapter.lora.alpha"].contents() == 8.0
    assert fields["general.architecture"].contents() == family.lower()
    report = json.loads((tmp_path / "gguf" / "lora.json").read_text())
    assert report["verification"]["passed"] is True


def test_a_smaller_rank_says_what_it_leaves_out(tmp_path: Path) -> None:
    trained(tmp_path)
    verdict = export_gguf(str(tmp_path / "adapter"), tmp_path / "gguf", rank=4)
    assert verdict.passed
    assert verdict.max_rel_delta_error > 1e-2
    assert "truncated" in verdict.describe()


@pytest.mark.parametrize(
    ("format", "method"), [("hf", "mirror"), ("lora", "mirror"), ("gguf", "mirror"), ("hf", "lora")]
)
def test_other_weights_are_taken_only_by_force(tmp_path: Path, format: str, method: str) -> None:
    trained(tmp_path, method=method, rank=4, target_modules="q_proj")
    tiny_causal(seed=1).save_pretrained(tmp_path / "other")  # type: ignore[operator]
    tiny_chat_tokenizer().save_pretrained(tmp_path / "other")
    where = str(tmp_path / "other"), tmp_path / "adapter", tmp_path / "out", format
    with pytest.raises(VerificationError, match="the base weight is not the one") as caught:
        mirrortune.merge_adapter(*where)
    assert (caught.value.exit_code, (tmp_path / "out").exists()) == (5, False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        verdict = mirrortune.merge_adapter(*where, force_base=True)
    assert verdict["passed"]
    assert any("merged by force: model.layers.0.self_attn.q_proj: the base weight" in str(w.message) for w in said)
    report = json.loads((tmp_path / "out" / ("merge.json" if format == "hf" else "lora.json")).read_text())
    assert sum("the base weight is not the one" in remark for remark in report["remarks"]) >= 2


def test_what_llama_cpp_has_otherwise_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    from mirrortune.adapters.spec import AdapterSpec

    write_trained(tiny_model_dir, tmp_path / "bert", AdapterSpec(rank=4))
    with pytest.raises(ConfigError, match="models of type 'bert' are not known"):
        export_gguf(str(tmp_path / "bert"), tmp_path / "gguf")
    trained(tmp_path, "Mixtral", rank=4, target_modules="q_proj")
    with pytest.raises(ConfigError, match="models of type 'mixtral'"):
        export_gguf(str(tmp_path / "adapter"), tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()
