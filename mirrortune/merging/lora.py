# SPDX-License-Identifier: Apache-2.0
"""Export an adapter as a LoRA adapter: in PEFT's format here, in llama.cpp's in ``gguf.py``.

A core K in the basis of R singular directions equals a LoRA of rank at most R in closed form: with the singular value
decomposition K - diag(S) = P T Q' (R x R), B = U P T and A = Q' Vh. Since U and Vh are orthonormal, truncating this
decomposition gives the best LoRA of a smaller rank (Eckart and Young, 1936). Sums are computed in float64 and rounded
once.

Shapes: O out_features, I in_features, r rank of the LoRA.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict, TypeVar, Unpack

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mirrortune import __version__
from mirrortune.adapters.factor_cache import FactorCache
from mirrortune.adapters.files.adapter_file import AdapterFile, read_adapter
from mirrortune.adapters.files.find import require_adapter
from mirrortune.adapters.inject import attachment
from mirrortune.adapters.layers import SpectralLinear
from mirrortune.adapters.peft_bridge.files import common_fields, rows_key, saved_whole, token_indices
from mirrortune.adapters.plain import RowRange
from mirrortune.adapters.targets import kind_of
from mirrortune.errors import ConfigError, not_as_meant
from mirrortune.merging.bases import OpenedAdapter, open_adapter
from mirrortune.merging.verify import OutputError, compare_outputs
from mirrortune.models.load import load_tokenizer
from mirrortune.system.devices import rounding_unit
from mirrortune.system.outputs import LORA, adapter_inputs, model_inputs, output_folder
from mirrortune.tasks.model_outputs import compared_outputs

SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""LoRA ranks that vLLM supports; all layers have the same rank."""

_NEGLIGIBLE = 1e-9  # relative to the largest singular value of a change; smaller ones are rounding errors
_ROUNDING = 1e-6  # allowed relative error of a layer's change in addition to the truncation error
_PREFIX = "base_model.model."


class ExportOptions(TypedDict, total=False):
    """Options of :func:`export`, which describes them."""

    rank: int | None
    base: str | None
    overwrite: bool
    trust_remote_code: bool
    remarks: list[str] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraExport:
    """The result of exporting and verifying a LoRA adapter in PEFT's format.

    Attributes:
        rank: rank of the stored matrices of every layer.
        kept_rank: directions of each layer's change that the matrices hold; they are padded with zeros up to ``rank``.
        needed_rank: smallest rank that represents every layer's change exactly.
        max_rel_delta_error: largest ||B A - delta|| / ||delta|| over the layers, computed from the reopened files;
            consists of the truncation error, if ``kept_rank`` is less than ``needed_rank``, and rounding.
        max_rel_weight_error: the same error relative to the norm of the merged weight.
        max_abs_logit_error: largest absolute difference of an output on the probes between base + LoRA and base +
            adapter, both in the dtype of training; None if no inputs are known that the model accepts.
        tolerance: allowed ``max_abs_logit_error`` if nothing is truncated.
        has_head: a task head is included, which PEFT loads but LoRA servers do not.
        passed: the LoRA is exact within rounding or, if truncated, the best approximation of its rank.
        not_compared: reason why no outputs were compared; empty if they were.
    """

    rank: int
    kept_rank: int
    needed_rank: int
    max_rel_delta_error: float
    max_rel_weight_error: float
    max_abs_logit_error: float | None
    tolerance: float
    has_head: bool
    passed: bool
    not_compared: str = ""

    def describe(self) -> str:
        """Return the result as one line."""
        outputs = f"outputs were not compared ({self.not_compared})"
        if self.max_abs_logit_error is not None:
            outputs = f"outputs by at most {self.max_abs_logit_error:.1e}"
        text = f"{_describe_ranks(self)}, changes differ by {self.max_rel_delta_error:.1e}, {outputs}"
        return text + (f" (allowed {self.tolerance:.1e})" if self.kept_rank >= self.needed_rank else " (truncated)")


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufExport:
    """The result of exporting and verifying a LoRA adapter in llama.cpp's format.

    Attributes:
        architecture: llama.cpp's name of the model's architecture.
        rank, kept_rank, needed_rank: see :class:`LoraExport`.
        max_rel_delta_error: largest ||B A - delta|| / ||delta|| over the layers, computed from the reopened file with
            rows in transformers' order.
        tolerance: allowed error in addition to the truncation error.
        passed: the error is within the tolerance.
    """

    architecture: str
    rank: int
    kept_rank: int
    needed_rank: int
    max_rel_delta_error: float
    tolerance: float
    passed: bool

    def describe(self) -> str:
        """Return the result as one line."""
        return (
            f"llama.cpp's architecture '{self.architecture}', {_describe_ranks(self)}, "
            f"changes differ by {self.max_rel_delta_error:.1e}"
            + (" (truncated)" if self.kept_rank < self.needed_rank else "")
        )


def _describe_ranks(found: LoraExport | GgufExport) -> str:
    is_padded = found.kept_rank < min(found.rank, found.needed_rank)
    stored = f"rank {found.kept_rank}, padded to {found.rank}" if is_padded else f"rank {found.rank}"
    return f"{stored} (the change has rank {found.needed_rank})"


@dataclass(frozen=True, slots=True)
class LowRankChange:
    """The change of a layer's weight as an SVD: left (O, k) @ diag(values) @ right (k, I), in float64."""

    left: Tensor
    values: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        """Number of singular values above the rounding error."""
        return int((self.values > _NEGLIGIBLE * self.values.max()).sum()) if self.values.max() > 0 else 0

    def left_out(self, rank: int) -> float:
        """Return the relative Frobenius-norm error of truncating the change to its leading ``rank`` directions."""
        return float(self.values[rank:].norm() / (self.values.norm() or 1.0))

    def factors(self, rank: int, stored: int) -> tuple[Tensor, Tensor]:
        """Return A (stored, I) and B (O, stored) in float32: the leading ``rank`` directions, padded with zeros."""
        kept = min(rank, len(self.values))
        scale = self.values[:kept].sqrt()  # split evenly, so that 16-bit servers round A and B alike
        A, B = scale[:, None] * self.right[:kept], self.left[:, :kept] * scale
        pad = stored - kept
        return nn.functional.pad(A, (0, 0, 0, pad)).float(), nn.functional.pad(B, (0, pad)).float()


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankAdapter:
    """An adapter in LoRA form, before it is written.

    Attributes:
        opened: adapter attached to its base.
        layers: adapted layers by name.
        changes: change of each layer's weight.
        needed_rank, kept_rank, rank: see :class:`LoraExport`.
    """

    opened: OpenedAdapter
    layers: dict[str, SpectralLinear]
    changes: dict[str, LowRankChange]
    needed_rank: int
    kept_rank: int
    rank: int

    @classmethod
    def of(cls, opened: OpenedAdapter, rank: int | None) -> LowRankAdapter:
        """Decompose the change of every layer and choose the rank to store."""
        layers = spectral_only(opened.adapted)
        changes = {name: change_of(layer) for name, layer in layers.items()}
        needed = max(change.rank for change in changes.values())
        kept, stored = choose_ranks(rank, needed, changes)
        return cls(opened=opened, layers=layers, changes=changes, needed_rank=needed, kept_rank=kept, rank=stored)

    def factors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield the name, A and B of every layer."""
        for name, change in self.changes.items():
            yield name, *change.factors(self.kept_rank, self.rank)

    def compare(self, product: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
        """Compare the written B A of every layer with its change; yield name, change, B A and the relative error."""
        for name, layer in self.layers.items():
            exact, written = layer.delta_weight(), product(name)
            yield name, exact, written, float((written - exact).norm()) / (float(exact.norm()) or 1.0)

    def is_best(self, name: str, error: float) -> bool:
        """Return whether a layer's error is, within rounding, the smallest possible for the rank."""
        return error <= self.changes[name].left_out(self.kept_rank) + _ROUNDING


Result = TypeVar("Result", bound=LoraExport | GgufExport)
WriteLora = Callable[[Path, LowRankAdapter], Result]
"""Function that writes a LoRA adapter into an existing folder, reads it back, and compares."""


def export_lora(target: str, output_dir: Path, **options: Unpack[ExportOptions]) -> LoraExport:
    """Export an adapter as a LoRA adapter in PEFT's format, reopen it, and compare.

    For the arguments and errors, see :func:`export`.
    """
    return export(target, output_dir, lambda _: _write_peft, "the LoRA differs from base + adapter", **options)


def export(
    target: str,
    output_dir: Path,
    prepare: Callable[[OpenedAdapter], WriteLora[Result]],
    failure: str,
    *,
    rank: int | None = None,
    base: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    remarks: list[str] | None = None,
) -> Result:
    """Export an adapter as a LoRA adapter in some format, and verify it.

    Args:
        target: run directory or adapter folder.
        output_dir: new or empty folder; with ``overwrite`` also an earlier export.
        prepare: checks that the format can represent the adapter, and returns the function that writes it.
        failure: error message for a result that does not pass.
        rank: number of directions to keep of each layer's change; None for all of them.
        base: another location of the same base model.
        overwrite: replace ``output_dir``.
        trust_remote_code: run code from the base's repository.
        remarks: list to which mismatches between adapter and base are appended; None to raise for them.

    Raises:
        ConfigError: the adapter is not a low-rank change of linear layers, or needs a rank that no server supports.
        VerificationError: the files do not reproduce the adapter; they are removed.
    """
    adapter = read_adapter(require_adapter(target))
    _check_exportable(adapter)
    inputs = [*adapter_inputs([adapter.folder]), *model_inputs(base or adapter.base.get("name"))]
    with output_folder(output_dir, inputs, LORA, overwrite=overwrite) as put, torch.no_grad():
        opened = open_adapter(adapter, FactorCache(), base=base, trust_remote_code=trust_remote_code, remarks=remarks)
        write_files = prepare(opened)
        low_rank = LowRankAdapter.of(opened, rank)
        found: list[Result] = []

        def write(folder: Path) -> None:
            found.append(write_files(folder, low_rank))
            report = {"mirrortune_version": __version__, "base": opened.adapter.base}
            report["verification"] = asdict(found[0])
            text = json.dumps({**report, "remarks": remarks or []}, indent=2)
            (folder / "lora.json").write_text(f"{text}\n", encoding="utf-8")
            if not found[0].passed:
                raise not_as_meant(output_dir, f"{failure}: {found[0].describe()}")

        put(write)
    return found[0]


def _check_exportable(adapter: AdapterFile) -> None:
    """Raise ConfigError for an adapter that is not a low-rank change of weights."""
    if adapter.peft_config is not None:
        tuner = adapter.spec.preset.peft
        converter = ", which llama.cpp's convert_lora_to_gguf.py reads too" if tuner and tuner.kind == "LORA" else ""
        fix = f"Use {adapter.folder}{converter}; or mirrortune merge for plain weights"
        raise ConfigError("--format", f"'{adapter.spec.method}' is saved in PEFT's own format already", fix=fix)
    if not adapter.layouts:
        problem = f"method '{adapter.spec.method}' changes no layer by a low-rank matrix"
        raise ConfigError("--format", problem, allowed="hf")
    if inside := [name for name in adapter.plain if name.rpartition(".")[0] in adapter.layouts]:
        problem = f"a LoRA has no place for {inside[0]}, which was trained inside an adapted layer"
        raise ConfigError("--format", problem, allowed="hf")


def spectral_only(adapted: nn.Module) -> dict[str, SpectralLinear]:
    """Return the adapted linear layers by name.

    Raises:
        ConfigError: an adapted layer is not linear.
    """
    found = {}
    for name, layer in attachment(adapted).layers.items():
        if not isinstance(layer, SpectralLinear) or layer.kind.name not in ("linear", "conv1d-linear"):
            raise ConfigError(name, "LoRA's format holds linear layers only", allowed="--format hf")
        found[name] = layer
    return found


@torch.no_grad()
def change_of(layer: SpectralLinear) -> LowRankChange:
    """Compute the SVD of the change that a layer's adapter makes to its weight."""
    if layer.core.beside_weight() is not None:  # partly outside the singular basis, so decompose the dense change
        return LowRankChange(*torch.linalg.svd(layer.delta_weight(), full_matrices=False))
    P, values, Q = torch.linalg.svd(layer.core.delta_matrix())
    return LowRankChange(layer.U.cpu().double() @ P, values, Q @ layer.Vh.cpu().double())


def choose_ranks(asked: int | None, needed: int, changes: dict[str, LowRankChange]) -> tuple[int, int]:
    """Choose how many directions to keep of each layer, and the rank at which to store them.

    Raises:
        ConfigError: no supported rank is large enough, or ``asked`` is out of range.
    """
    largest = SERVED_RANKS[-1]
    if asked is None and needed > largest:
        error = max(change.left_out(largest) for change in changes.values())
        raise ConfigError(
            "--format",
            f"the change has rank {needed}, LoRA servers take at most {largest}",
            fix=f"--rank {largest} keeps the leading directions (relative error {error:.1e}); or merge plain weights",
        )
    if asked is not None and not 1 <= asked <= largest:
        raise ConfigError("--rank", f"got {asked}", allowed=f"1 to {largest}")
    kept = needed if asked is None else min(asked, needed)
    wanted = kept if asked is None else asked
    return kept, next(r for r in SERVED_RANKS if r >= wanted)


def _write_peft(folder: Path, low_rank: LowRankAdapter) -> LoraExport:
    adapted = low_rank.opened.adapted
    tensors: dict[str, Tensor] = {}
    for name, A, B in low_rank.factors():
        tensors[f"{_PREFIX}{name}.lora_A.weight"], tensors[f"{_PREFIX}{name}.lora_B.weight"] = A, B
    tensors |= {
        key: (held.float() if held.is_floating_point() else held).detach().cpu().clone()
        for key, held in saved_whole(adapted).items()
    }
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        **common_fields(adapted, low_rank.opened.adapter.base),
        "r": low_rank.rank,
        "lora_alpha": low_rank.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(layer.layout.is_transposed for layer in low_rank.layers.values()),
        "target_modules": _target_modules(adapted, list(low_rank.layers)),
    }
    if indices := token_indices(attachment(adapted).targets.plain):
        config["trainable_token_indices"] = indices
    if low_rank.opened.source.new_tokens:
        load_tokenizer(low_rank.opened.source).save_pretrained(folder)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return _verify_peft(load_file(folder / "adapter_model.safetensors"), low_rank)


def _target_modules(adapted: nn.Module, names: list[str]) -> list[str]:
    """Return the last parts of the layer names, as servers expect, or full names if other linear layers share them."""
    endings = {name.rpartition(".")[2] for name in names}
    linear = ("linear", "conv1d-linear")
    others = {n for n, m in adapted.named_modules() if n not in names and kind_of(m)[0].name in linear}
    # An adapted layer holds the frozen one as `base_layer`.
    taken = {n for n in others if n.rpartition(".")[2] in endings and n.removesuffix(".base_layer") not in names}
    return sorted(endings) if not taken else names


def _verify_peft(written: dict[str, Tensor], low_rank: LowRankAdapter) -> LoraExport:
    def product(name: str) -> Tensor:
        A, B = (written[f"{_PREFIX}{name}.lora_{letter}.weight"].double() for letter in "AB")
        return B @ A

    # Both models compute in the dtype of training, independent of the dtype in which the base is stored.
    adapted, plain = low_rank.opened.adapted, low_rank.opened.load_plain(as_trained=True)
    state = dict(plain.state_dict())
    delta_error = weight_error = 0.0
    is_best = True
    for name, exact, change, error in low_rank.compare(product):
        is_best &= low_rank.is_best(name, error)
        layout, weight = low_rank.layers[name].layout, state[f"{name}.weight"]
        before = layout.matrix(weight).double()
        relative = float((change - exact).norm()) / float((before + exact).norm())
        delta_error, weight_error = max(delta_error, error), max(weight_error, relative)
        state[f"{name}.weight"] = layout.tensor(before + change).to(weight.dtype)
    for key in saved_whole(adapted):
        if (name := key.removeprefix(_PREFIX)) in state:
            state[name] = written[key].to(state[name].dtype)
    for where in filter(None, map(RowRange.parse, attachment(adapted).targets.plain)):
        before = state[where.weight]
        value = where.put(written[rows_key(str(where))], before)
        state |= {name: value for name, tensor in state.items() if tensor.data_ptr() == before.data_ptr()}
    plain.load_state_dict(state)
    outputs = _compare_outputs(plain, low_rank.opened)
    is_exact = low_rank.kept_rank >= low_rank.needed_rank
    return LoraExport(
        rank=low_rank.rank,
        kept_rank=low_rank.kept_rank,
        needed_rank=low_rank.needed_rank,
        max_rel_delta_error=delta_error,
        max_rel_weight_error=weight_error,
        max_abs_logit_error=outputs.error,
        tolerance=outputs.tolerance,
        has_head=bool(attachment(adapted).targets.head),
        passed=is_best and _is_within(outputs, is_exact=is_exact),
        not_compared=outputs.reason,
    )


def _compare_outputs(merged: nn.Module, opened: OpenedAdapter) -> OutputError:
    merged.float()  # rounding of 16-bit arithmetic is not an error of the weights
    return compare_outputs(
        lambda probe: compared_outputs(merged, probe, compared=opened.compared),
        lambda probe: compared_outputs(opened.adapted, probe, compared=opened.compared), opened.probes,
        tolerance=max(1e-5, 8 * rounding_unit(opened.adapted)),
    )  # fmt: skip


def _is_within(outputs: OutputError, *, is_exact: bool) -> bool:
    if outputs.error is None:
        return True
    return math.isfinite(outputs.error) and (not is_exact or outputs.error <= outputs.tolerance)
