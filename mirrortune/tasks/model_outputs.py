# SPDX-License-Identifier: Apache-2.0
"""Which of a model's outputs mean something: the one place that says what two models are compared by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mirrortune.data.examples import Batch
from mirrortune.system.devices import autocast

# The names are those of transformers' output classes: a field, or the last word of one (``start_logits``).
_ANSWERS = (
    "logits", "log_probs", "score", "scores", "boxes", "masks", "keypoints", "depth", "normals", "points", "alphas",
    "field_of_view", "heatmaps", "embeds", "embeddings", "waveform", "spectrogram", "audio_values", "reconstruction",
    "reconstructed_pixel_values", "prediction_output", "prediction_outputs", "forecasts", "predictions",
)  # fmt: skip
_FEATURES = ("last_hidden_state", "pooler_output", "embed", "feature_maps", "features", "quantized_representation")
# No answer: what a loss needs, what the next step reuses, and what is inside the model.
_INTERNAL = (
    "loss", "dict", "past_key_values", "cache_params", "hidden_states", "attentions", "mask", "mems", "states", "cache",
    "router_logits",
)  # fmt: skip


def meaningful_outputs(outputs: Any) -> dict[str, Tensor]:
    """The tensors by which a model's result is judged, by name.

    Every output that a head answers with (logits, boxes, masks, depth, waveforms, ...); for a model without such a head
    its features (last hidden state, pooled output, embeddings, feature maps); for a model of neither kind all
    floating-point outputs but losses, caches, attentions and inner hidden states.

    Args:
        outputs: what a model's forward returned: transformers' ``ModelOutput``, or a mapping, tuple or tensor.
    """
    tensors = {n: t for n, t in _flatten("", outputs) if t.is_floating_point() and t.numel()}
    found = {name: tensor for name, tensor in tensors.items() if not _ends_in(name, _INTERNAL)}
    for words in (_ANSWERS, _FEATURES):
        if chosen := {name: t for name, t in found.items() if _ends_in(name, words) or name.startswith("logits_")}:
            return chosen
    return found


def _flatten(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors of nested outputs, by names such as ``vision_model_output.last_hidden_state`` and ``feature_maps.0``."""
    if isinstance(value, Tensor):
        yield name, value
        return
    parts: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(value, Mapping):
        parts = iter(value.items())
    elif isinstance(value, (list, tuple)):
        parts = iter(enumerate(value))
    for key, part in parts:
        yield from _flatten(f"{name}.{key}" if name else str(key), part)


def _ends_in(name: str, words: tuple[str, ...]) -> bool:
    """Whether the field (the last part of a dotted name that is no number) is one of ``words`` or ends in ``_word``."""
    field = next((part for part in reversed(name.split(".")) if not part.isdigit()), name)
    return any(field == word or field.endswith(f"_{word}") for word in words)


@torch.no_grad()
def compared_outputs(model: nn.Module, probe: Batch, *, dtype: torch.dtype | None = None) -> Tensor:
    """Everything that a model's result is judged by, end to end; shape (N,), float32, on the CPU.

    Args:
        model: in evaluation mode.
        probe: inputs of its forward.
        dtype: of the weights of a model that reads them when it runs, on the CPU.
    """
    device = next(iter(model.parameters())).device if dtype is None else torch.device("cpu")
    call: Any = model.forward
    arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in probe.items()}
    context = autocast(model) if dtype is None else autocast(nn.Linear(1, 1, dtype=dtype))
    devices = [device] if device.type == "cuda" else []
    with context, torch.random.fork_rng(devices):
        torch.manual_seed(0)  # some models draw numbers in their forward, in evaluation mode too
        found = meaningful_outputs(call(**arguments))
    if not found:
        raise NothingToCompareError(f"the outputs of {type(model).__name__} hold no floating-point tensor")
    return torch.cat([_without_padding(n, v, probe).float().cpu().flatten() for n, v in found.items()])


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two results of :func:`compared_outputs`; NaN where either is not finite, infinite where
    they are not of one size.

    Values of minus infinity on both sides are what a model masks out and count as equal, unless nothing else is left.
    """
    if found.shape != expected.shape:  # a detector may find more in one than in the other
        return float("inf")
    is_masked = (found == -torch.inf) & (expected == -torch.inf)
    if bool(is_masked.any()) and not bool(is_masked.all()):
        found, expected = found[~is_masked], expected[~is_masked]
    return float((expected - found).abs().max())


class NothingToCompareError(ValueError):
    """A forward pass that returned nothing by which a model can be judged."""


def _without_padding(name: str, value: Tensor, probe: Batch) -> Tensor:
    """``value`` without positions of padding, which mean nothing and which rounding moves more than anything else."""
    mask = probe.get("attention_mask")
    is_of_tokens = value.ndim == 3 or name.endswith("_logits")
    if mask is not None and is_of_tokens and value.shape[:2] == mask.shape:
        return value[mask.bool().to(value.device)]
    return value
