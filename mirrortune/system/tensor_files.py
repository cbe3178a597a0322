# SPDX-License-Identifier: Apache-2.0
"""Read and write checkpoints in safetensors files one tensor at a time.

The safetensors library needs all tensors of a file in memory to write it, and reads through memory maps, whose pages
count as used memory while they are open. Here tensors are read by offset and unchanged tensors are copied as bytes, so
that a checkpoint of any size needs only as much memory as its largest changed tensor.

The format (https://github.com/huggingface/safetensors): 8 bytes with the length of the header; the header, JSON with
dtype, shape and offsets of every tensor; the bytes of the tensors without gaps.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from mirrortune.errors import ConfigError
from mirrortune.system.paths import read_json_object

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
DTYPE_CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the format
_CHUNK = 1 << 24  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor in a safetensors file.

    Attributes:
        code: the format's name of its dtype, such as ``BF16``.
        shape: shape of the tensor.
        path: path of the file.
        start: offset of its first byte in the file.
        nbytes: size in bytes.
    """

    code: str
    shape: tuple[int, ...]
    path: Path
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTensor:
    """A tensor to be written: copied from ``source`` byte by byte, or computed when it is written.

    Attributes:
        name: name in the output.
        code: the format's name of its dtype.
        shape: shape of the tensor.
        source: tensor whose bytes are copied; None for a tensor that is computed.
        place: input file that the tensor comes from; None for a new tensor.
        stands_for: names of the model's tensors that are combined in this one, if files and model differ.
    """

    name: str
    code: str
    shape: tuple[int, ...]
    source: StoredTensor | None = None
    place: Path | None = None
    stands_for: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * _DTYPES[self.code].itemsize if self.source is None else self.source.nbytes


def read_headers(paths: Iterable[Path]) -> dict[str, StoredTensor]:
    """Read the headers of safetensors files and return their tensors by name, in the order of the files.

    Raises:
        ConfigError: a file is missing, damaged or may not be read, or two files hold a tensor of the same name.
    """
    found: dict[str, StoredTensor] = {}
    for path in paths:
        try:
            own = _read_header(path)
        except PermissionError as error:
            fix = f"Permit it: chmod u+r {shlex.quote(str(path))}"
            raise ConfigError(str(path), "it may not be read (permission denied)", fix=fix) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            problem = f"missing or damaged ({type(error).__name__}: {error})"
            raise ConfigError(str(path), problem, fix="Download or copy the checkpoint again") from error
        if twice := own.keys() & found.keys():
            raise ConfigError(str(path), f"tensor '{min(twice)}' is in another file as well")
        found |= own
    return found


def _read_header(path: Path) -> dict[str, StoredTensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        shape = tuple(entry["shape"])
        dtype = _DTYPES.get(entry["dtype"])
        is_inside = 0 <= start <= stop <= size - 8 - length
        if not is_inside or (dtype is not None and math.prod(shape) * dtype.itemsize != stop - start):
            raise ValueError(f"tensor '{name}' is not where the header says")
        found[name] = StoredTensor(
            code=entry["dtype"], shape=shape, path=path, start=8 + length + start, nbytes=stop - start
        )
    return found


def read_tensor(stored: StoredTensor) -> Tensor:
    """Read a tensor into new memory, in its stored dtype."""
    dtype = _DTYPES.get(stored.code)
    if dtype is None:
        raise ConfigError(str(stored.path), f"dtype {stored.code}", allowed=", ".join(_DTYPES))
    data = bytearray(stored.nbytes)
    with stored.path.open("rb") as file:
        file.seek(stored.start)
        if file.readinto(data) != stored.nbytes:
            raise ConfigError(str(stored.path), "it ends in the middle of a tensor", fix="Download or copy it again")
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.reshape(stored.shape)


def give_back_memory() -> None:
    """Return freed memory to the operating system.

    The C library keeps freed memory as long as a later block of its heap is in use. While a checkpoint is converted
    tensor by tensor, the kept memory would grow to the size of the checkpoint.
    """
    if sys.platform.startswith("linux"):
        with contextlib.suppress(AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)


def same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Return whether two stored tensors have the same dtype, shape and bytes."""
    if (one.code, one.shape, one.nbytes) != (other.code, other.shape, other.nbytes):
        return False
    with one.path.open("rb") as left, other.path.open("rb") as right:
        left.seek(one.start)
        right.seek(other.start)
        done = 0
        while done < one.nbytes:
            count = min(_CHUNK, one.nbytes - done)
            if left.read(count) != right.read(count):
                return False
            done += count
    return True


def shard_like(
    planned: Sequence[PlannedTensor], input_files: Sequence[Path], max_bytes: int | None
) -> list[list[PlannedTensor]]:
    """Distribute tensors over files.

    Args:
        planned: tensors in order.
        input_files: files of the input checkpoint. Without ``max_bytes``, each tensor goes to the file of its ``place``
            and new tensors to the last file.
        max_bytes: maximum size of a file; a tensor that is larger gets a file to itself.

    Returns:
        The tensors of each file.
    """
    if max_bytes is None:
        places = {path: index for index, path in enumerate(input_files)}
        shards: list[list[PlannedTensor]] = [[] for _ in input_files] or [[]]
        for tensor in planned:
            shards[-1 if tensor.place is None else places[tensor.place]].append(tensor)
        return [shard for shard in shards if shard]
    shards, used = [[]], 0
    for tensor in planned:
        if shards[-1] and used + tensor.nbytes > max_bytes:
            shards, used = [*shards, []], 0
        shards[-1].append(tensor)
        used += tensor.nbytes
    return shards


def write_shards(
    folder: Path, shards: Sequence[Sequence[PlannedTensor]], make: Callable[[PlannedTensor], Tensor]
) -> None:
    """Write a checkpoint as one file, or as several files with an index.

    Args:
        folder: existing folder.
        shards: tensors of each file.
        make: computes a tensor without a source, in the planned dtype and shape.
    """
    count = len(shards)
    names = [WHOLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for name, shard in zip(names, shards, strict=True):
        write_file(folder / name, shard, make)
    if count > 1:
        total = sum(tensor.nbytes for shard in shards for tensor in shard)
        weight_map = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(path: Path, tensors: Sequence[PlannedTensor], make: Callable[[PlannedTensor], Tensor]) -> None:
    """Write one file; ``make`` computes the tensors without a source."""
    # Wide dtypes first, as in the safetensors library: every tensor then starts at a multiple of its item size.
    ordered = sorted(tensors, key=lambda t: (-(_DTYPES[t.code].itemsize if t.code in _DTYPES else 1), t.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for tensor in ordered:
        offsets = [place, place + tensor.nbytes]
        header[tensor.name] = {"dtype": tensor.code, "shape": list(tensor.shape), "data_offsets": offsets}
        place += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            if tensor.source is None:
                file.write(_bytes_of(make(tensor), tensor))
            else:
                _copy(tensor.source, file)


def _bytes_of(made: Tensor, planned: PlannedTensor) -> memoryview:
    host = made.detach().cpu().contiguous()
    assert DTYPE_CODES[host.dtype] == planned.code, planned.name
    assert tuple(host.shape) == planned.shape, planned.name
    if not host.numel():
        return memoryview(b"")
    data: Any = host.reshape(-1).view(torch.uint8).numpy()
    return memoryview(data)


def _copy(stored: StoredTensor, target: IO[bytes]) -> None:
    with stored.path.open("rb") as file:
        file.seek(stored.start)
        left = stored.nbytes
        while left:
            chunk = file.read(min(_CHUNK, left))
            if not chunk:
                raise ConfigError(str(stored.path), "it ends in the middle of a tensor", fix="Download it again")
            target.write(chunk)
            left -= len(chunk)


def index_of(path: Path, suffix: str = ".safetensors") -> list[str]:
    """Return the sorted file names of a checkpoint's index.

    Raises:
        ConfigError: the index is damaged, or a file name contains a folder.
    """
    try:
        names = sorted({*read_json_object(path)["weight_map"].values()})
        is_plain = all(isinstance(n, str) and Path(n).name == n and n.endswith(suffix) for n in names)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(str(path), f"damaged ({type(error).__name__})", fix="Download or copy it again") from error
    if not names or not is_plain:
        raise ConfigError(str(path), "it names files that are none of a checkpoint", fix="Download or copy it again")
    return names
