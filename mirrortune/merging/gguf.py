# SPDX-License-Identifier: Apache-2.0
"""Export an adapter of a language model as a LoRA in GGUF, the format of llama.cpp, with the ``gguf`` library (extra
``[gguf]``).

The factors are those of ``lora.py``. Tensor names follow the map of names that the library publishes for each
architecture. For some architectures llama.cpp stores the two dimensions of a rotary pair next to each other, which
permutes the rows of query and key weights; the rows of B must be permuted alike, while A is unchanged. See
:data:`ARCHITECTURES`.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mirrortune.adapters.inject import attachment
from mirrortune.errors import ConfigError
from mirrortune.merging.bases import OpenedAdapter
from mirrortune.merging.lora import ExportOptions, GgufExport, LowRankAdapter, WriteLora, export

FILE = "adapter.gguf"
# transformers' model_type -> (llama.cpp's architecture, whether it permutes query and key rows). Models that are not
# listed may need more than other names, such as fused weights; a file with wrongly ordered rows would load silently.
ARCHITECTURES = {
    "llama": ("llama", True), "mistral": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False),
    "gemma": ("gemma", False), "gemma2": ("gemma2", False), "gemma3_text": ("gemma3", False),
    "starcoder2": ("starcoder2", False),
}  # fmt: skip


def export_gguf(target: str, output_dir: Path, **options: Unpack[ExportOptions]) -> GgufExport:
    """Export an adapter as ``adapter.gguf``, read the file back, and compare.

    For the arguments, see :func:`mirrortune.merging.lora.export`.

    Raises:
        ConfigError: the model is not a language model, or llama.cpp stores its weights in a form that is not supported;
            see also :func:`mirrortune.merging.lora.export`.
        VerificationError: the file does not reproduce the adapter; it is removed.
    """
    gguf = _library()

    def prepare(opened: OpenedAdapter) -> WriteLora[GgufExport]:
        _check_model(opened)
        return lambda folder, low_rank: _write(gguf, folder / FILE, low_rank)

    return export(target, output_dir, prepare, "the GGUF file differs from the adapter", **options)


def _library() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        problem = "the package gguf is not installed"
        raise ConfigError("--format", problem, fix="pip install 'mirrortune[gguf]'") from error


def _check_model(opened: OpenedAdapter) -> None:
    if (kind := opened.source.config.model_type) not in ARCHITECTURES:
        problem = f"models of type '{kind}' are not known to agree with llama.cpp's but for names"
        raise ConfigError(
            "--format", problem, allowed=", ".join(ARCHITECTURES), fix="Merge plain weights, convert those"
        )
    targets = attachment(opened.adapted).targets
    if targets.head or targets.plain:
        what = "a task head" if targets.head else f"parameters trained whole, such as {targets.plain[0]}"
        raise ConfigError("--format", f"a GGUF LoRA cannot hold {what}", fix="Merge plain weights")


def _write(gguf: Any, path: Path, low_rank: LowRankAdapter) -> GgufExport:
    config = low_rank.opened.source.config
    architecture, _ = ARCHITECTURES[config.model_type]
    names = _gguf_names(gguf, architecture, config.num_hidden_layers, list(low_rank.layers))
    orders = {name: _row_order(config, name, layer.out_features) for name, layer in low_rank.layers.items()}
    tensors: dict[str, Tensor] = {}
    for name, A, B in low_rank.factors():
        tensors |= {f"{names[name]}.lora_a": A, f"{names[name]}.lora_b": B[orders[name]]}
    _write_tensors(gguf, path, architecture, low_rank.rank, tensors)
    written = _read_tensors(gguf, path)

    def product(name: str) -> Tensor:
        return (written[f"{names[name]}.lora_b"] @ written[f"{names[name]}.lora_a"])[orders[name].argsort()]

    errors = {name: error for name, _, _, error in low_rank.compare(product)}
    return GgufExport(
        architecture=architecture,
        rank=low_rank.rank,
        kept_rank=low_rank.kept_rank,
        needed_rank=low_rank.needed_rank,
        max_rel_delta_error=max(errors.values()),
        tolerance=1e-6,
        passed=all(low_rank.is_best(name, error) for name, error in errors.items()),
    )


def _gguf_names(gguf: Any, architecture: str, num_layers: int, layers: list[str]) -> dict[str, str]:
    """Map the name of every layer to llama.cpp's name of its weight."""
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = gguf.get_tensor_name_map(kind, num_layers)
    found = {name: known.get_name(f"{name}.weight", try_suffixes=(".weight",)) for name in layers}
    if missing := [name for name, other in found.items() if other is None]:
        raise ConfigError(
            missing[0], f"llama.cpp's architecture '{architecture}' has no such weight", fix="Merge plain weights"
        )
    return {name: str(other) for name, other in found.items()}


def _row_order(config: Any, name: str, rows: int) -> Tensor:
    """Return the index of the transformers row for each row of llama.cpp's weight, shape (rows,).

    Where rotary pairs are stored next to each other, the order (head, half, pair) becomes (head, pair, half).
    """
    order = torch.arange(rows)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(name.rpartition(".")[2])
    if count is None or not ARCHITECTURES[config.model_type][1]:
        return order
    return order.reshape(count, 2, rows // count // 2).transpose(1, 2).reshape(rows)


def _write_tensors(gguf: Any, path: Path, architecture: str, rank: int, tensors: dict[str, Tensor]) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))  # scale = alpha / rank = 1
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read_tensors(gguf: Any, path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file in float64."""
    found: dict[str, npt.NDArray[Any]] = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    return {name: torch.from_numpy(np.array(data, dtype=np.float64)) for name, data in found.items()}
