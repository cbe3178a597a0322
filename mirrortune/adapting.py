# SPDX-License-Identifier: Apache-2.0
"""Puts an adapter into a base model, fresh or from its file, ours or PEFT's: the one place that knows which is which.

What is loaded must belong to the base: every adapted weight has the recorded hash, and every basis aligns with its
sketch. What does not is refused with the layer's name.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from mirrortune import peft_tuners
from mirrortune.adapter_file import AdapterFile, restore_trained
from mirrortune.adapters.basis import Fingerprint, align, fingerprint, weight_digest
from mirrortune.adapters.cores import Core
from mirrortune.adapters.factorize import Factors
from mirrortune.adapters.inject import FactorSource, attach
from mirrortune.adapters.spec import AdapterSpec
from mirrortune.adapters.targets import find_targets
from mirrortune.errors import VerificationError


class FingerprintBook:
    """Fingerprints of a model's layers, made once (the base does not change while training) and used at every save."""

    def __init__(self) -> None:
        self.entries: dict[str, Fingerprint] = {}

    def __call__(self, name: str, weight: Tensor, factors: Factors, core: Core) -> None:
        """Note one layer; the hook for :func:`mirrortune.adapters.inject.attach`."""
        self.entries[name] = fingerprint(weight, factors, core.side)

    def note_weight(self, name: str, weight: Tensor) -> None:
        """Note one layer whose adapter has no basis."""
        self.entries[name] = Fingerprint.of_weight(weight_digest(weight))


def adapt(
    model: nn.Module,
    spec: AdapterSpec,
    *,
    factor_source: FactorSource,
    new_parameters: Iterable[str] = (),
    pairs: dict[str, Tensor] | None = None,
) -> FingerprintBook:
    """Attach a fresh adapter by ``spec``, ours or PEFT's; see :func:`mirrortune.adapters.inject.attach`."""
    book = FingerprintBook()
    if spec.preset.peft is not None:
        peft_tuners.count_trained(model, spec, new_parameters)  # what PEFT refuses, it refuses on a copy
        peft_tuners.attach_tuner(model, spec, new_parameters=new_parameters, on_layer=book.note_weight)
    else:
        attach(model, spec, new_parameters=new_parameters, factor_source=factor_source, pairs=pairs, on_layer=book)
    return book


def load_into(model: nn.Module, adapter: AdapterFile, source: FactorSource) -> FingerprintBook:
    """Attach ``adapter`` to its base ``model`` (in place) and give it its trained numbers.

    Args:
        model: the base, in the dtype that the adapter was trained on.
        adapter: from :func:`read_adapter`.
        source: computes or remembers factors.

    Returns:
        The fingerprints, for saving again.

    Raises:
        VerificationError: another base, a basis that cannot be aligned, or tensors that do not fit; with the layer's
            name.
    """
    _check_layers(model, adapter)

    def checked(name: str, weight: Tensor) -> Fingerprint:
        stored = adapter.fingerprints[name]
        if weight_digest(weight) != stored.weight_sha256:
            raise VerificationError(
                name,
                "the base weight is not the one that the adapter was trained on",
                allowed="{name} at commit {commit}, in {dtype}".format_map({"commit": "unknown", **adapter.base}),
                fix="Load that base; an adapter of another base turns the wrong directions",
            )
        return stored

    book = FingerprintBook()
    if adapter.peft_config is None:
        attach(
            model,
            adapter.spec,
            new_parameters=adapter.head,
            factor_source=lambda name, weight, rank: align(source(name, weight, rank), checked(name, weight), name),
            pairs=stored_pairs(adapter),
            on_layer=book,
            names=adapter.layouts,
        )
    else:
        peft_tuners.attach_tuner(
            model, adapter.spec, new_parameters=adapter.head, config=adapter.peft_config, names=adapter.layouts,
            on_layer=lambda name, weight: book.entries.update({name: checked(name, weight)}),
        )  # fmt: skip
    restore_trained(model, adapter)
    return book


def _check_layers(model: nn.Module, adapter: AdapterFile) -> None:
    """Refuse a base that lacks one of the adapter's layers, or has it in another shape."""
    found = find_targets(model, adapter.spec, adapter.head, adapter.layouts).layers
    for name, layout in adapter.layouts.items():
        own = found[name].layout if name in found else None
        if own != layout:
            raise VerificationError(
                name,
                f"the adapter was made for a weight of shape {layout.shape}, the base has "
                + (f"one of shape {own.shape}, read in another way" if own else "no such layer"),
                fix="Use its own base model",
            )


def stored_pairs(adapter: AdapterFile) -> dict[str, Tensor]:
    """The pairs (T, 2) that the file holds, by layer."""
    return {n.removeprefix("pairs."): t.long() for n, t in adapter.tensors.items() if n.startswith("pairs.")}
