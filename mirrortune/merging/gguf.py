# SPDX-License-Identifier: Apache-2.0
"""Writes an adapter of a language model as a LoRA in GGUF, the format of llama.cpp, by the ``gguf`` library (extra
``[gguf]``).

The factors are those of ``export.py``. Names are llama.cpp's for each architecture, by the map that the library
publishes. Where llama.cpp turns rotary pairs that lie side by side, its checkpoints have the rows of the query and key
weights in that order, and so must B have (A is as it was): see :data:`ARCHITECTURES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mirrortune.adapters.factor_cache import FactorCache
from mirrortune.adapters.files.adapter_file import AdapterFile, read_adapter
from mirrortune.adapters.files.find import require_adapter
from mirrortune.adapters.inject import attachment
from mirrortune.adapters.layers import SpectralLinear
from mirrortune.errors import ConfigError, not_as_meant
from mirrortune.merging.in_memory import open_adapter
from mirrortune.merging.lora import change_of, check_exportable, choose_ranks, spectral_only, write_report
from mirrortune.system.outputs import LORA, Write, adapter_inputs, model_inputs, output_folder

FILE = "adapter.gguf"
# transformers' model_type -> (llama.cpp's architecture, whether query and key rows lie in another order there). What is
# not listed may need more than names (fused weights, other orders), and a wrong order would load and be wrong.
ARCHITECTURES = {
    "llama": ("llama", True), "mistral": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False),
    "gemma": ("gemma", False), "gemma2": ("gemma2", False), "gemma3_text": ("gemma3", False),
    "starcoder2": ("starcoder2", False),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufExport:
    """The verdict on an exported adapter.

    Attributes:
        architecture: llama.cpp's name of the model's.
        rank, kept_rank, needed_rank: see :class:`mirrortune.merging.lora.LoraExport`.
        max_rel_delta_error: largest ||B A - delta|| / ||delta|| over the layers, of the file as read back, rows in
            transformers' order.
        tolerance: allowed: 1e-6 beyond what the rank leaves out.
        passed: within tolerance.
    """

    architecture: str
    rank: int
    kept_rank: int
    needed_rank: int
    max_rel_delta_error: float
    tolerance: float
    passed: bool


def export_gguf(
    target: str,
    output_dir: Path,
    *,
    rank: int | None = None,
    base: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    remarks: list[str] | None = None,
) -> GgufExport:
    """Write a run's (or an adapter folder's) adapter as ``adapter.gguf``, read it back and compare.

    Args: see :func:`mirrortune.merging.lora.export_lora`.

    Raises:
        ConfigError: no language model, one that llama.cpp has otherwise, or see
            :func:`mirrortune.merging.lora.export_lora`.
        VerificationError: what was written is not what was meant (it is removed).
    """
    gguf = _library()
    adapter = read_adapter(require_adapter(target))
    check_exportable(adapter)
    inputs = [*adapter_inputs([adapter.folder]), *model_inputs(base or adapter.base.get("name"))]
    with output_folder(output_dir, inputs, LORA, overwrite=overwrite) as put:
        return _export(gguf, adapter, output_dir, put, rank=rank, base=base, trust_remote_code=trust_remote_code,
                       remarks=remarks)  # fmt: skip


@torch.no_grad()
def _export(
    gguf: Any,
    adapter: AdapterFile,
    output_dir: Path,
    put: Callable[[Write], None],
    *,
    rank: int | None,
    base: str | None,
    trust_remote_code: bool,
    remarks: list[str] | None,
) -> GgufExport:
    opened = open_adapter(adapter, FactorCache(), base=base, trust_remote_code=trust_remote_code, remarks=remarks)
    config = opened.source.config
    if config.model_type not in ARCHITECTURES:
        problem = f"models of type '{config.model_type}' are not known to agree with llama.cpp's but for names"
        raise ConfigError(
            "--format", problem, allowed=", ".join(ARCHITECTURES), fix="Merge plain weights, convert those"
        )
    if attachment(opened.adapted).targets.head:
        raise ConfigError("--format", "a task head cannot travel in a GGUF LoRA", fix="Merge plain weights")
    layers = spectral_only(opened.adapted)
    changes = {name: change_of(layer) for name, layer in layers.items()}
    needed = max(change.rank for change in changes.values())
    kept, stored = choose_ranks(rank, needed, changes)
    architecture, _ = ARCHITECTURES[config.model_type]
    names = _gguf_names(gguf, architecture, config.num_hidden_layers, list(layers))
    orders = {name: _row_order(config, name, layer.out_features) for name, layer in layers.items()}
    verdict: list[GgufExport] = []

    def write(folder: Path) -> None:
        tensors: dict[str, Tensor] = {}
        for name, change in changes.items():
            A, B = change.factors(kept, stored)
            tensors |= {f"{names[name]}.lora_a": A, f"{names[name]}.lora_b": B[orders[name]]}
        _write(gguf, folder / FILE, architecture, stored, tensors)
        written = _read(gguf, folder / FILE)
        errors = {name: _error(layer, written, names[name], orders[name]) for name, layer in layers.items()}
        error, excess = max(errors.values()), max(e - changes[name].left_out(kept) for name, e in errors.items())
        verdict.append(
            GgufExport(architecture=architecture, rank=stored, kept_rank=kept, needed_rank=needed,
                       max_rel_delta_error=error, tolerance=1e-6, passed=excess <= 1e-6)
        )  # fmt: skip
        write_report(folder, adapter, asdict(verdict[0]), remarks)
        if not verdict[0].passed:
            raise not_as_meant(output_dir, f"the GGUF file differs from the adapter: {describe(verdict[0])}")

    put(write)
    return verdict[0]


def describe(verdict: GgufExport) -> str:
    """The verdict in one line."""
    return (
        f"llama.cpp's architecture '{verdict.architecture}', rank {verdict.rank} (the change has rank "
        f"{verdict.needed_rank}), changes differ by {verdict.max_rel_delta_error:.1e}"
        + (" (truncated)" if verdict.kept_rank < verdict.needed_rank else "")
    )


def _library() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ConfigError("--format", "gguf needs a package", fix="pip install 'mirrortune[gguf]'") from error


def _gguf_names(gguf: Any, architecture: str, num_layers: int, layers: list[str]) -> dict[str, str]:
    """llama.cpp's name of every layer's weight."""
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = gguf.get_tensor_name_map(kind, num_layers)
    found = {name: known.get_name(f"{name}.weight", try_suffixes=(".weight",)) for name in layers}
    if missing := [name for name, other in found.items() if other is None]:
        raise ConfigError(
            missing[0], f"llama.cpp's architecture '{architecture}' has no such weight", fix="Merge plain weights"
        )
    return {name: str(other) for name, other in found.items()}


def _row_order(config: Any, name: str, rows: int) -> Tensor:
    """Which of transformers' rows of a weight is each of llama.cpp's, shape (rows,).

    Where both halves of a head's rotary pairs lie side by side there: (head, half, pair) -> (head, pair, half).
    """
    order = torch.arange(rows)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(name.rpartition(".")[2])
    if count is None or not ARCHITECTURES[config.model_type][1]:
        return order
    return order.reshape(count, 2, rows // count // 2).transpose(1, 2).reshape(rows)


def _error(layer: SpectralLinear, written: dict[str, Tensor], name: str, order: Tensor) -> float:
    """||B A - delta|| / ||delta|| of what was written for a layer under llama.cpp's ``name``, its rows in ``order``."""
    delta = layer.delta_weight()
    product = written[f"{name}.lora_b"] @ written[f"{name}.lora_a"]
    return float((product[order.argsort()] - delta).norm()) / (float(delta.norm()) or 1.0)


def _write(gguf: Any, path: Path, architecture: str, rank: int, tensors: dict[str, Tensor]) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))  # over the rank: a scale of 1
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read(gguf: Any, path: Path) -> dict[str, Tensor]:
    """Every tensor of a file, float64."""
    found: dict[str, npt.NDArray[Any]] = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    return {name: torch.from_numpy(np.array(data, dtype=np.float64)) for name, data in found.items()}
