# SPDX-License-Identifier: Apache-2.0
"""shards: files that the format's own library reads, and nothing damaged is ever read."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from mirrortune.errors import ConfigError
from mirrortune.system import tensor_files
from mirrortune.system.tensor_files import (
    DTYPE_CODES,
    INDEX,
    PlannedTensor,
    index_of,
    read_headers,
    read_tensor,
    same_bytes,
    shard_like,
    write_shards,
)

TENSORS = {
    "b": torch.randn(3, 4),
    "a.half": torch.randn(5).bfloat16(),
    "flags": torch.tensor([True, False, True]),
    "nothing": torch.zeros(0, 4),
    "number": torch.tensor(3.5, dtype=torch.float64),
    "whole": torch.arange(7, dtype=torch.int64),
}


def planned(tensors: dict[str, Tensor]) -> list[PlannedTensor]:
    """Tensors that are made when their turn comes."""
    return [PlannedTensor(name=n, code=DTYPE_CODES[t.dtype], shape=tuple(t.shape)) for n, t in tensors.items()]


def test_what_is_written_the_library_reads(tmp_path: Path) -> None:
    write_shards(tmp_path, [planned(TENSORS)], lambda t: TENSORS[t.name])
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in TENSORS.items()}


def test_what_the_library_writes_is_read_and_copied(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "in.safetensors")
    headers = read_headers([tmp_path / "in.safetensors"])
    for name, tensor in TENSORS.items():
        assert torch.equal(read_tensor(headers[name]), tensor)
    copies = [PlannedTensor(name=f"new.{n}", code=h.code, shape=h.shape, source=h) for n, h in headers.items()]
    write_shards(tmp_path, [copies[:2], copies[2:]], lambda t: pytest.fail("nothing is to be made"))
    index = json.loads((tmp_path / INDEX).read_text())
    again = read_headers([tmp_path / name for name in index_of(tmp_path / INDEX)])
    assert sorted(index["weight_map"]) == sorted(again) == sorted(f"new.{name}" for name in TENSORS)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    assert all(same_bytes(again[f"new.{name}"], headers[name]) for name in TENSORS)
    assert not same_bytes(headers["b"], headers["whole"])


def test_shards_are_those_of_the_input_or_of_a_size(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(10)}, tmp_path / "1.safetensors")
    save_file({"b": torch.zeros(10), "c": torch.zeros(3)}, tmp_path / "2.safetensors")
    files = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    plan = [
        PlannedTensor(name=n, code=h.code, shape=h.shape, source=h, place=h.path)
        for n, h in read_headers(files).items()
    ]
    plan.append(PlannedTensor(name="head", code="F32", shape=(5,)))
    assert [[t.name for t in shard] for shard in shard_like(plan, files, None)] == [["a"], ["b", "c", "head"]]
    assert [[t.name for t in shard] for shard in shard_like(plan, files, 52)] == [["a"], ["b", "c"], ["head"]]
    assert [[t.name for t in shard] for shard in shard_like(plan, files, 1)] == [["a"], ["b"], ["c"], ["head"]]


@given(place=st.integers(0, 300), share=st.floats(0, 1))
def test_a_damaged_header_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, place: int, share: float
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "x.safetensors"
    save_file({"a": torch.ones(4), "b": torch.ones(2, 2)}, path)
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 0x55
    path.write_bytes(bytes(data[: max(9, int(len(data) * (1 - share / 2)))]))
    try:
        for stored in read_headers([path]).values():
            read_tensor(stored)
    except ConfigError as error:
        assert str(path) in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    "data",
    [b"", b"\x00" * 8, b"\xff" * 64, (2**62).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]",
     (60000).to_bytes(8, "little") + b"[" * 60000, (4).to_bytes(8, "little") + b"null"],
)  # fmt: skip
def test_hostile_headers_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(ConfigError, match="missing or damaged"):
        read_headers([tmp_path / "x.safetensors"])


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")  # root may read every file

    monkeypatch.setattr(tensor_files, "_read_header", refuse)
    with pytest.raises(ConfigError, match=r"it may not be read \(permission denied\)\. Permit it: chmod u\+r"):
        read_headers([tmp_path / "x.safetensors"])


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.bin", 3])
def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path, name: object) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ConfigError, match=r"none of a checkpoint|damaged"):
        index_of(tmp_path / INDEX)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("1", "2"):
        save_file({"a": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ConfigError, match="in another file as well"):
        read_headers([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])
