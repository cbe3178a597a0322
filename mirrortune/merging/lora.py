# SPDX-License-Identifier: Apache-2.0
"""Writes an adapter as a LoRA adapter in PEFT's format, for whatever loads only those: PEFT itself, vLLM.

A core in the basis of R singular directions is a LoRA of rank at most R in closed form: with K - diag(S) = P T Q' (its
singular value decomposition, R x R), B = U P T and A = Q' Vh. Its leading part is the best LoRA of a smaller rank
(Eckart and Young), since U and Vh are orthonormal. All sums are made in float64 and rounded once.

Shapes: O out_features, I in_features, r rank of the LoRA.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mirrortune import __version__
from mirrortune.adapters.factor_cache import FactorCache
from mirrortune.adapters.files.adapter_file import AdapterFile, read_adapter
from mirrortune.adapters.files.find import require_adapter
from mirrortune.adapters.inject import attachment, plain_parameters
from mirrortune.adapters.layers import SpectralLinear
from mirrortune.adapters.peft_bridge.files import common_fields
from mirrortune.errors import ConfigError, not_as_meant
from mirrortune.merging.in_memory import BaseWithAdapter, OutputError, compare_outputs, open_adapter
from mirrortune.system.outputs import LORA, Write, adapter_inputs, model_inputs, output_folder
from mirrortune.tasks.model_outputs import compared_outputs

_NEGLIGIBLE = 1e-9  # of the largest singular value of a layer's change: below it a direction is rounding
_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraExport:
    """The verdict on an exported adapter.

    Attributes:
        rank: of every layer's matrices, as stored.
        kept_rank: directions of each layer's change that they hold; the rest is zeros.
        needed_rank: the smallest that holds every layer's change exactly.
        max_rel_delta_error: largest ||B A - delta|| / ||delta|| over the layers, of the files as reopened: what a
            smaller rank than needed leaves out, or rounding.
        max_rel_weight_error: the same relative to the layer's new weight.
        max_abs_logit_error: largest difference of an output on the probes between base + LoRA and base + adapter, both
            in the dtype that the adapter was trained in; None if no inputs are known that the model computes.
        tolerance: allowed error of an output where the rank suffices.
        has_head: a task head travels with it, which PEFT loads and LoRA servers do not.
        passed: exact where the rank suffices, and otherwise as close as that rank can be.
        not_compared: why no outputs could be compared; empty if they were.
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


@dataclass(frozen=True, slots=True)
class Change:
    """A layer's change of weight in singular form: left (O, k) @ diag(values) @ right (k, I), float64."""

    left: Tensor
    values: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        """How many directions it has, beyond rounding."""
        return int((self.values > _NEGLIGIBLE * self.values.max()).sum()) if self.values.max() > 0 else 0

    def left_out(self, rank: int) -> float:
        """The share of the change, by norm, beyond the leading ``rank`` directions."""
        return float(self.values[rank:].norm() / (self.values.norm() or 1.0))

    def factors(self, rank: int, stored: int) -> tuple[Tensor, Tensor]:
        """A (stored, I) and B (O, stored) in float32, of the leading ``rank`` directions, padded with zeros."""
        kept = min(rank, len(self.values))
        scale = self.values[:kept].sqrt()  # shared evenly, so that 16-bit servers round both alike
        A, B = scale[:, None] * self.right[:kept], self.left[:, :kept] * scale
        pad = stored - kept
        return nn.functional.pad(A, (0, 0, 0, pad)).float(), nn.functional.pad(B, (0, pad)).float()


def export_lora(
    target: str,
    output_dir: Path,
    *,
    rank: int | None = None,
    base: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    remarks: list[str] | None = None,
) -> LoraExport:
    """Write a run's (or an adapter folder's) adapter as a LoRA adapter to ``output_dir``, reopen it and compare.

    Args:
        target: run directory or adapter folder.
        output_dir: a new or empty folder, or an earlier export with ``overwrite``.
        rank: directions to keep of each layer's change; None for all of them.
        base: another place of the same base model.
        overwrite: replace ``output_dir``.
        trust_remote_code: run code from the base's repository.
        remarks: what does not fit the base is noted here; None to refuse it.

    Raises:
        ConfigError: an adapter that is no low-rank change of linear layers, or needs a rank that no server takes.
        VerificationError: what was written is not what was meant (it is removed).
    """
    adapter = read_adapter(require_adapter(target))
    check_exportable(adapter)
    inputs = [*adapter_inputs([adapter.folder]), *model_inputs(base or adapter.base.get("name"))]
    with output_folder(output_dir, inputs, LORA, overwrite=overwrite) as put:
        return _export(adapter, output_dir, put, rank=rank, base=base, trust_remote_code=trust_remote_code,
                       remarks=remarks)  # fmt: skip


def _export(
    adapter: AdapterFile,
    output_dir: Path,
    put: Callable[[Write], None],
    *,
    rank: int | None,
    base: str | None,
    trust_remote_code: bool,
    remarks: list[str] | None,
) -> LoraExport:
    # What the adapter was trained on is what the LoRA is compared on, whatever dtype the base is stored in.
    opened = open_adapter(
        adapter, FactorCache(), base=base, trust_remote_code=trust_remote_code, remarks=remarks, is_as_trained=True
    )
    changes = {name: change_of(layer) for name, layer in spectral_only(opened.adapted).items()}
    needed = max(change.rank for change in changes.values())
    kept, stored = choose_ranks(rank, needed, changes)
    verdict: list[LoraExport] = []

    def write(folder: Path) -> None:
        tensors: dict[str, Tensor] = {}
        for name, change in changes.items():
            A, B = change.factors(kept, stored)
            tensors[f"{_PREFIX}{name}.lora_A.weight"], tensors[f"{_PREFIX}{name}.lora_B.weight"] = A, B
        for name, parameter in plain_parameters(opened.adapted).items():
            tensors[_PREFIX + name] = parameter.detach().cpu().float()
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "adapter_model.safetensors")
        config = _config(adapter, opened.adapted, stored)
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        verdict.append(_verify(folder, opened, changes, kept=kept, stored=stored, needed=needed))
        write_report(folder, adapter, asdict(verdict[0]), remarks)
        if not verdict[0].passed:
            raise not_as_meant(output_dir, f"the LoRA differs from base + adapter: {describe(verdict[0])}")

    put(write)
    return verdict[0]


def write_report(folder: Path, adapter: AdapterFile, verification: dict[str, Any], remarks: list[str] | None) -> None:
    """``lora.json``: what was exported, how it was compared, and what did not fit a base that was forced."""
    report = {"mirrortune_version": __version__, "base": adapter.base, "verification": verification}
    text = json.dumps({**report, "remarks": remarks or []}, indent=2)
    (folder / "lora.json").write_text(f"{text}\n", encoding="utf-8")


def describe(verdict: LoraExport) -> str:
    """The verdict in one line."""
    outputs = f"outputs were not compared ({verdict.not_compared})"
    if verdict.max_abs_logit_error is not None:
        outputs = f"outputs by at most {verdict.max_abs_logit_error:.1e}"
    text = (
        f"rank {verdict.rank} (the change has rank {verdict.needed_rank}), "
        f"changes differ by {verdict.max_rel_delta_error:.1e}, {outputs}"
    )
    return text + (
        f" (allowed {verdict.tolerance:.1e})" if verdict.kept_rank >= verdict.needed_rank else " (truncated)"
    )


def check_exportable(adapter: AdapterFile) -> None:
    """ConfigError for an adapter that is no low-rank change of weights."""
    if adapter.peft_config is not None:
        fix = f"Use {adapter.folder}, or mirrortune merge for plain weights"
        raise ConfigError("--format", f"'{adapter.spec.method}' is saved in PEFT's own format already", fix=fix)
    if not adapter.layouts:
        problem = f"method '{adapter.spec.method}' changes no layer by a low-rank matrix"
        raise ConfigError("--format", problem, allowed="hf")


def spectral_only(adapted: nn.Module) -> dict[str, SpectralLinear]:
    """The adapted layers by name; ConfigError if one of them is nothing that LoRA's format holds."""
    found = {}
    for name, layer in attachment(adapted).layers.items():
        if not isinstance(layer, SpectralLinear) or layer.kind.name not in ("linear", "conv1d-linear"):
            raise ConfigError(name, "LoRA's format holds linear layers only", allowed="--format hf")
        found[name] = layer
    return found


@torch.no_grad()
def change_of(layer: SpectralLinear) -> Change:
    """What a layer's adapter adds to its weight, in singular form."""
    beside = layer.core.beside_weight()
    if beside is not None:  # not in the singular basis: the dense matrix says all
        return Change(*torch.linalg.svd(layer.delta_weight(), full_matrices=False))
    P, values, Q = torch.linalg.svd(layer.core.delta_matrix())
    return Change(layer.U.cpu().double() @ P, values, Q @ layer.Vh.cpu().double())


def choose_ranks(asked: int | None, needed: int, changes: dict[str, Change]) -> tuple[int, int]:
    """How many directions are kept of each layer, and the rank that they are stored in."""
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


def _config(adapter: AdapterFile, adapted: nn.Module, rank: int) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        **common_fields(adapted, adapter.base),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": _target_modules(adapted, list(attachment(adapted).layers)),
    }


def _target_modules(adapted: nn.Module, names: list[str]) -> list[str]:
    """The last parts of the names, as servers expect them, where they stand for these layers and no others."""
    endings = {name.rpartition(".")[2] for name in names}
    others = {n for n, m in adapted.named_modules() if isinstance(m, nn.Linear) and n not in names}
    # The frozen layer inside each of ours is called base_layer.
    taken = {n for n in others if n.rpartition(".")[2] in endings and n.removesuffix(".base_layer") not in names}
    return sorted(endings) if not taken else names


@torch.no_grad()
def _verify(
    folder: Path, opened: BaseWithAdapter, changes: dict[str, Change], *, kept: int, stored: int, needed: int
) -> LoraExport:
    written = load_file(folder / "adapter_model.safetensors")
    plain, adapted = opened.plain, opened.adapted
    state = dict(plain.state_dict())
    delta_error = weight_error = 0.0
    is_best = True
    for name, layer in spectral_only(adapted).items():
        A, B = (written[f"{_PREFIX}{name}.lora_{letter}.weight"].double() for letter in "AB")
        exact = layer.delta_weight()
        difference, size = float((B @ A - exact).norm()), float(exact.norm())
        error = difference / (size or 1.0)
        is_best &= error <= changes[name].left_out(kept) + 1e-6
        reference = state[f"{name}.weight"].double() + exact
        delta_error, weight_error = max(delta_error, error), max(weight_error, difference / float(reference.norm()))
        state[f"{name}.weight"] = (state[f"{name}.weight"].double() + B @ A).to(state[f"{name}.weight"].dtype)
    for name in plain_parameters(adapted):
        state[name] = written[_PREFIX + name].to(state[name].dtype)
    outputs = _compare_outputs(opened, state)
    is_exact = kept >= needed
    return LoraExport(
        rank=stored,
        kept_rank=kept,
        needed_rank=needed,
        max_rel_delta_error=delta_error,
        max_rel_weight_error=weight_error,
        max_abs_logit_error=outputs.error,
        tolerance=outputs.tolerance,
        has_head=bool(attachment(adapted).targets.head),
        passed=is_best and _is_fine(outputs, is_exact=is_exact),
        not_compared=outputs.reason,
    )


def _compare_outputs(opened: BaseWithAdapter, state: dict[str, Tensor]) -> OutputError:
    """Compare base + adapter with the plain base, into which the weights of ``state`` are put."""
    plain, adapted = opened.plain, opened.adapted
    coarsest = max(torch.finfo(p.dtype).eps for p in adapted.parameters())
    plain.load_state_dict(state)
    plain.float()  # 16-bit arithmetic is no error of the weights
    return compare_outputs(
        lambda probe: compared_outputs(plain, probe), lambda probe: compared_outputs(adapted, probe), opened.probes,
        tolerance=max(1e-5, 8 * coarsest),
    )  # fmt: skip


def _is_fine(outputs: OutputError, *, is_exact: bool) -> bool:
    if outputs.error is None:
        return True
    return math.isfinite(outputs.error) and (not is_exact or outputs.error <= outputs.tolerance)


SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks of a LoRA that vLLM takes; every layer is given the same one."""
