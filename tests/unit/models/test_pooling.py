# SPDX-License-Identifier: Apache-2.0
"""pooling: embeddings against a loop over texts, and what is read from a sentence-transformers folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mirrortune.errors import ConfigError
from mirrortune.models.load import ModelSource, find_model
from mirrortune.models.pooling import MODES, pool, read_modules, without_pooler
from tests.tiny_models import write_tiny_causal, write_tiny_model, write_tiny_seq2seq

TRANSFORMER = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
NORMALIZE = {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}


def one_text(vectors: Tensor, mode: str) -> Tensor:
    """The embedding of the token vectors (L, H) of one text, as sentence-transformers describes it."""
    count = len(vectors)
    if mode == "cls":
        return vectors[0]
    if mode == "lasttoken":
        return vectors[-1]
    if mode == "max":
        return torch.stack([max(column) for column in vectors.T])
    if mode == "weightedmean":
        return sum((i + 1) * vectors[i] for i in range(count)) / sum(range(1, count + 1))  # type: ignore[return-value]
    return sum(vectors) / (count if mode == "mean" else count**0.5)  # type: ignore[return-value]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("mode", MODES)
def test_padding_takes_no_part(mode: str, side: str) -> None:
    lengths, vectors = (1, 3, 5), torch.randn(3, 5, 4)
    places = torch.arange(5).expand(3, 5)
    ends = torch.tensor(lengths)[:, None]
    mask = (places < ends if side == "right" else places >= 5 - ends).long()
    expected = torch.stack([one_text(v[m.bool()], mode) for v, m in zip(vectors, mask, strict=True)])
    found = pool(vectors, mask, [mode], is_normalised=False)
    torch.testing.assert_close(found, expected)
    both = pool(vectors.bfloat16(), mask, [mode, "cls"], is_normalised=True)
    assert (both.shape, both.dtype) == ((3, 8), torch.float32)
    torch.testing.assert_close(both.norm(dim=-1), torch.ones(3))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny BERT."""
    return write_tiny_model(tmp_path / "model")


def source(folder: Path, **files: Any) -> ModelSource:
    """The model with JSON files in its folder; ``__`` is a slash and ``_json`` the ending."""
    for name, value in files.items():
        path = folder / (name.replace("__", "/").removesuffix("_json") + ".json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return find_model(str(folder))


def test_a_folder_says_how_texts_are_embedded(folder: Path, tmp_path: Path) -> None:
    pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}
    own = {"max_seq_length": 24, "do_lower_case": True}
    prompts = {"prompts": {"query": "query: ", "all": "text: "}, "default_prompt_name": "all"}
    found = read_modules(source(
        folder, modules_json=[TRANSFORMER, POOLING, NORMALIZE], **{"1_Pooling__config_json": pooling},
        sentence_bert_config_json=own, config_sentence_transformers_json=prompts | {"similarity_fn_name": "dot"},
    ))  # fmt: skip
    assert (found.modes, found.is_normalised, found.max_length) == (("cls", "mean"), True, 24)
    assert (found.lowercase, found.prompt) == (True, "text: ")
    assert found.notes == (
        "prompts of the model that are not applied: query; write them into the texts",
        "the model's own similarity is dot; it is trained and scored by the cosine here",
    )
    found.write(tmp_path)
    assert json.loads((tmp_path / "1_Pooling" / "config.json").read_text()) == pooling
    assert {path.name for path in tmp_path.glob("*.json")} == {
        "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
    }  # fmt: skip


def test_newer_folders_name_their_pooling(folder: Path) -> None:
    found = read_modules(source(
        folder, modules_json=[TRANSFORMER | {"type": "sentence_transformers.base.modules.transformer.Transformer"},
                              POOLING], **{"1_Pooling__config_json": {"pooling_mode": ["lasttoken", "max"]}},
        sentence_bert_config_json={"transformer_task": "feature-extraction",
                                   "modality_config": {"text": {"method_output_name": "last_hidden_state"}}},
    ))  # fmt: skip
    assert (found.modes, found.is_normalised, found.max_length) == (("lasttoken", "max"), False, None)


def test_without_a_folder_pooling_is_that_of_sentence_transformers(folder: Path, tmp_path: Path) -> None:
    found = read_modules(source(folder))
    assert found.modes == ("mean",)
    assert "mean of the token vectors" in found.notes[0]
    assert found.files["1_Pooling/config.json"]["word_embedding_dimension"] == 32
    found.write(folder)
    again = read_modules(source(folder))
    assert (again.modes, again.is_normalised, again.notes) == (("mean",), False, ())
    assert read_modules(find_model(str(write_tiny_causal(tmp_path / "causal")))).modes == ("lasttoken",)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"modules_json": "{"}, r"modules\.json: damaged"),
        ({"modules_json": {}}, r"modules\.json: damaged \(it holds a dict\)"),
        ({"modules_json": [{}]}, "a module without a type"),
        ({"modules_json": [TRANSFORMER]}, "it has no Pooling"),
        ({"modules_json": [TRANSFORMER | {"path": "0_BERT"}]}, "module 0 is Transformer in '0_BERT'"),
        ({"modules_json": [TRANSFORMER, POOLING | {"path": "../1"}]}, r"got the path '\.\./1'"),
        ({"modules_json": [TRANSFORMER, POOLING, NORMALIZE | {"type": "sentence_transformers.models.Dense"}]},
         "module 2 is Dense in '2_Normalize', which is not applied here"),
        ({"modules_json": [TRANSFORMER, POOLING], "1_Pooling__config_json": {"pooling_mode": "attention"}},
         "pooling_mode is 'attention'. Allowed: cls, max"),
        ({"modules_json": [TRANSFORMER, POOLING], "sentence_bert_config_json": {"max_seq_length": "long"}},
         "max_seq_length: got 'long'"),
        ({"modules_json": [TRANSFORMER, POOLING], "sentence_bert_config_json": {"transformer_task": "fill-mask"}},
         "transformer_task is 'fill-mask', which is not applied here"),
        *(({"modules_json": [TRANSFORMER, POOLING], "1_Pooling__config_json": {},
            "sentence_bert_config_json": {"modality_config": damaged}},
           r"sentence_bert_config\.json: damaged \(its modality_config is not an object\)")
          for damaged in ("text", {"text": "x"})),
        ({"modules_json": [TRANSFORMER, POOLING], "1_Pooling__config_json": {},
          "config_sentence_transformers_json": {"prompts": {"q": "a"}, "default_prompt_name": ["q"]}},
         r"config_sentence_transformers\.json: damaged \(default_prompt_name is \['q'\]\)"),
    ],
)  # fmt: skip
def test_what_is_not_applied_is_refused(folder: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_modules(source(folder, **files))


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it is an encoder-decoder"):
        read_modules(find_model(str(write_tiny_seq2seq(tmp_path / "t5"))))


def test_a_pooler_is_replaced() -> None:
    model = nn.Module()
    model.pooler = nn.Linear(2, 2)
    assert list(without_pooler(model).parameters()) == []
    assert without_pooler(nn.Linear(2, 2)).weight.shape == (2, 2)
