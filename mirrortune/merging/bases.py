# SPDX-License-Identifier: Apache-2.0
"""What an adapter of a quantised base is merged into: its dequantised weights, or the model in full precision."""

from __future__ import annotations

from typing import Any

from torch import nn

from mirrortune.adapters.files.adapter_file import AdapterFile
from mirrortune.models.load import ModelSource, find_model, load_model
from mirrortune.models.quantized import dequantise


def load_plain(source: ModelSource, *arguments: Any) -> nn.Module:
    """The model of :func:`mirrortune.models.load.load_model`, dequantised if it is quantised."""
    model = load_model(source, *arguments).model
    # What is dequantised while it is loaded has plain weights, and is still marked as quantised.
    return dequantise(model) if source.is_stored_packed else model


def trained_on(adapter: AdapterFile, source: ModelSource, base: str | None) -> ModelSource | None:
    """The quantised base of an adapter that is merged into full-precision weights elsewhere, or None.

    Args:
        adapter: what is merged.
        source: of ``base``, or of the adapter's own base.
        base: the place that the user names, if any.
    """
    if base is None or source.load_in is not None:
        return None if base is None else source
    recorded = adapter.base.get("name")
    if recorded in (None, base) or source.is_stored_packed or not adapter.base.get("quantised"):
        return None
    revision = adapter.base.get("commit") or adapter.base.get("revision")
    return find_model(str(recorded), revision=revision, trust_remote_code=source.trust_remote_code)


def in_words(adapter: AdapterFile, base: str | None) -> str:
    """What an adapter is merged into, and what becomes of a quantised base."""
    name = base or str(adapter.base.get("name"))
    if base is not None or not adapter.base.get("quantised") or name.endswith(".gguf"):
        return name
    return f"{name}, dequantised (--base merges into full-precision weights instead)"
