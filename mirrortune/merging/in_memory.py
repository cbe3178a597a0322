# SPDX-License-Identifier: Apache-2.0
"""Merge an adapter into a model in memory, for files that do not store the model's tensors one by one."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mirrortune.adapters.inject import attachment, plain_parameters, trained_buffers
from mirrortune.adapters.plain import RowRange
from mirrortune.merging.verify import Compared, Probes, TensorLedger, Verification, check_ties, compare_models


@torch.no_grad()
def merged_state(plain: nn.Module, adapted: nn.Module, ledger: TensorLedger | None = None) -> dict[str, Tensor]:
    """Return the state dict of ``plain`` with the adapter's changes and the trained parameters of ``adapted``.

    Sums are computed in float64 and rounded once to the dtype of the tensor in ``plain``.

    Args:
        plain: base model.
        adapted: base model with an adapter.
        ledger: records the adapted tensors for :func:`verify`.
    """
    ledger = TensorLedger() if ledger is None else ledger
    before, state = plain.state_dict(), dict(plain.state_dict())
    state |= _trained_tensors(adapted, plain)
    for names, merged in adapted_tensors(adapted, before):
        own = before[names[0]]
        # The same tensor under all of its names, so that tied weights stay tied.
        state |= dict.fromkeys(names, ledger.round(names, merged, own.dtype, own.cpu))
    return state


def _trained_tensors(adapted: nn.Module, plain: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that were trained directly, as a whole or in some rows, and running statistics, in the dtypes
    of ``plain`` and under each of their names in it.
    """
    held = {
        **dict(plain.named_parameters(remove_duplicate=False)),
        **dict(plain.named_buffers(remove_duplicate=False)),
    }
    names: dict[int, list[str]] = {}
    for name, tensor in held.items():
        names.setdefault(id(tensor), []).append(name)
    found: dict[str, Tensor] = {}
    for name, tensor in {**plain_parameters(adapted), **trained_buffers(adapted)}.items():
        rows, trained = RowRange.parse(name), tensor.detach().cpu()
        before = held[name if rows is None else rows.weight]
        value = trained.to(before.dtype) if rows is None else rows.put(trained, before.detach())
        found |= dict.fromkeys(names[id(before)], value)
    return found


def adapted_tensors(adapted: nn.Module, before: Mapping[str, Tensor]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Yield each tensor of the base model that the adapter changes: its names and its merged value in float64.

    Args:
        adapted: base model with an adapter.
        before: tensors of the base model; read one layer at a time.
    """
    attached = attachment(adapted)
    targets = attached.targets.layers
    for weights, parts in itertools.groupby(attached.layers.items(), key=lambda item: targets[item[0]].tensors):
        biases = tuple(n.removesuffix("weight") + "bias" for n in weights if n.endswith("weight"))
        names = {"weight": weights, "bias": biases}
        own = {key: before[found[0]] for key, found in names.items() if found and found[0] in before}
        changed: dict[str, Tensor] = {}
        for _, layer in parts:  # several for a fused weight that is split
            changed |= layer.merged(own | changed)
        for key, merged in changed.items():
            yield names[key], merged


@torch.no_grad()
def verify(
    folder: Path,
    plain: nn.Module,
    adapted: nn.Module,
    auto_class: str,
    probes: Probes,
    ledger: TensorLedger,
    *,
    compared: Compared = None,
    trust_remote_code: bool = False,
) -> Verification:
    """Reopen a merged checkpoint with transformers alone and compare its tensors and outputs.

    Args:
        folder: folder of the checkpoint, which was written from :func:`merged_state`.
        plain: base model.
        adapted: base model with the adapter.
        auto_class: name of the transformers class that loads the checkpoint.
        probes: inputs of the forward pass, or candidates for them.
        ledger: ledger that :func:`merged_state` has filled.
        compared: selects which outputs are compared.
        trust_remote_code: run code that the configuration names.
    """
    import transformers  # noqa: PLC0415

    load: Any = getattr(transformers, auto_class).from_pretrained
    reopened = load(folder, dtype="auto", trust_remote_code=trust_remote_code).eval()
    check_ties(reopened, plain)
    written, before = dict(reopened.state_dict()), dict(plain.state_dict())
    trained = _trained_tensors(adapted, plain)

    def expected(name: str) -> Tensor:
        if name in ledger.errors:
            return next(merged for names, merged in adapted_tensors(adapted, before) if name in names)
        return trained[name] if name in trained else before[name]

    for name, tensor in before.items():
        if name not in written:
            ledger.changed += 1
        else:
            stored = tensor.cpu if name in ledger.errors else None
            ledger.check(name, written[name], functools.partial(expected, name), stored)
    dtype = next(iter(reopened.parameters())).dtype
    return ledger.verification(compare_models(reopened, adapted, probes, compared), dtype)
