# SPDX-License-Identifier: Apache-2.0
"""Code and files that the files of a model request, and that transformers would run or read without asking."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from mirrortune.errors import ConfigError
from mirrortune.models.remote_code import refuse_foreign_files, refuse_kernels


@pytest.mark.parametrize("asked", ["evil/kernel", {"": "evil/kernel"}, {"text_config": "evil/kernel"}])
@pytest.mark.parametrize("key", ["attn_implementation", "experts_implementation"])
def test_kernels_of_a_part_of_the_model_are_refused(key: str, asked: Any) -> None:
    config = LlavaConfig(text_config=LlamaConfig(), vision_config=CLIPVisionConfig(), **{key: asked})

    with pytest.raises(ConfigError, match="asks for code from 'evil/kernel'"):
        refuse_kernels("x", config)


def test_known_implementations_are_taken() -> None:
    refuse_kernels("x", LlavaConfig(attn_implementation={"": "eager", "text_config": "sdpa"}))


@pytest.mark.parametrize("is_relative", [False, True])
@pytest.mark.parametrize("key", ["vocab", "merges", "vocab_file", "init_inputs"])
def test_a_vocabulary_from_elsewhere_is_refused(
    key: str, is_relative: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    secret, settings = tmp_path / "id_rsa", tmp_path / "model" / "tokenizer_config.json"
    secret.write_text("PRIVATE KEY")
    settings.parent.mkdir()
    for place in (secret, settings.parent / "link"):
        if place != secret:
            place.symlink_to(secret)
        named = str(place.relative_to(tmp_path) if is_relative else place)
        settings.write_text(json.dumps({key: [named] if key == "init_inputs" else named}))
        with pytest.raises(ConfigError, match=f"tokenizer_config.json: {key} is a file outside of the model's folder"):
            refuse_foreign_files("x", [None, settings])


def test_usual_settings_of_tokenizers_are_taken(tmp_path: Path) -> None:
    settings, own = tmp_path / "tokenizer_config.json", tmp_path / "vocab.txt"
    own.write_text("a")
    usual = {"vocab_file": "/home/author/vocab.txt", "tokenizer_file": str(own), "vocab": {"a": 0}, "merges": [["a"]]}
    elsewhere = tmp_path.parent / f"{tmp_path.name}.json"  # of a model that was loaded from a folder and saved again
    elsewhere.write_text("{}")
    recorded = ("special_tokens_map_file", "added_tokens_file", "tokenizer_file")
    usual |= dict.fromkeys(recorded, str(elsewhere))
    for text in (json.dumps({**usual, "name_or_path": str(tmp_path), "unk_token": "a"}), "[" * 100_000, '""'):
        settings.write_text(text)
        refuse_foreign_files("x", [settings])
