# SPDX-License-Identifier: Apache-2.0
"""model: what a checkpoint may be, and what is said of one that it may not be."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mirrortune.errors import ConfigError
from mirrortune.models import remote_code
from mirrortune.models.load import LoadedModel, ModelSource, find_model, load_model
from tests.tiny_models import write_tiny_model


@pytest.fixture
def pickled(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A model folder without its safetensors, and what they held."""
    folder = write_tiny_model(tmp_path / "base")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    return folder, state


def load(folder: Path) -> LoadedModel:
    """The folder's model, as a run loads it."""
    fields = {"num_labels": 2}
    return load_model(find_model(str(folder)), "AutoModelForSequenceClassification", fields, torch.float32, 0)


def test_a_pickle_of_tensors_alone_is_loaded(pickled: tuple[Path, dict[str, Tensor]]) -> None:
    folder, state = pickled
    torch.save(state, folder / "pytorch_model.bin")
    model = load(folder).model
    assert all(torch.equal(model.state_dict()[f"bert.{name}"], tensor) for name, tensor in state.items())


class Code:
    """Something that leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_that_would_run_code_is_refused(pickled: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, state = pickled
    torch.save({**state, "code": Code(tmp_path / "mark")}, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"a pickle that holds more than tensors.*safetensors.*--revision"):
        load(folder)
    assert not (tmp_path / "mark").exists()


def test_a_damaged_pickle_is_refused(pickled: tuple[Path, dict[str, Tensor]]) -> None:
    folder, _ = pickled
    (folder / "pytorch_model.bin").write_bytes(b"junk")
    with pytest.raises(ConfigError, match="a file is damaged"):
        load(folder)


def test_code_of_another_repository_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the commit that is announced; where several would have to be, the model is refused."""
    found = {"jane/code": ["model.Own"]}
    monkeypatch.setattr(remote_code, "_code_of", lambda name, location, commit: found)
    monkeypatch.setattr(remote_code, "resolve_commit", lambda *words: "abc")
    assert remote_code.announce_code("joe/model", "joe/model", "def") == "abc"
    source = ModelSource(
        name="m", location="m", revision=None, commit="def", trust_remote_code=True, code_revision="abc", config=None
    )
    assert source.arguments() == {"revision": "def", "trust_remote_code": True, "code_revision": "abc"}
    found[None] = ["own.Config"]  # type: ignore[index]
    assert remote_code.announce_code("./model", "./model", None) == "abc"
    with pytest.raises(ConfigError, match=r"several repositories, which cannot all be pinned: jane/code, joe/model"):
        remote_code.announce_code("joe/model", "joe/model", "def")


@pytest.mark.parametrize("name", ["../out.bin", "/etc/passwd", "shard.txt"])
def test_an_index_of_pickles_that_leads_elsewhere_is_refused(
    pickled: tuple[Path, dict[str, Tensor]], name: str
) -> None:
    folder, state = pickled
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(state, name)}))
    with pytest.raises(ConfigError, match="it names files that are none of a checkpoint"):
        find_model(str(folder))


@pytest.mark.parametrize("place", ["adapter.json", "adapter/adapter.json"])
def test_a_run_in_the_place_of_a_model_is_to_be_merged(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "a run"
    (folder / place).parent.mkdir(parents=True)
    (folder / place).write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"holds no config\.json.*merge it \(mirrortune merge '.*a run' -o merged\)"):
        find_model(str(folder))
