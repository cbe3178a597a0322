# SPDX-License-Identifier: Apache-2.0
"""The outputs by which two models are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mirrortune.data.examples import Batch
from mirrortune.system.devices import autocast

# Names are those of transformers' output classes: a field, or the last word of one (``start_logits``).
_ANSWERS = (
    "logits", "log_probs", "score", "scores", "boxes", "masks", "keypoints", "depth", "normals", "points", "alphas",
    "field_of_view", "heatmaps", "embeds", "embeddings", "waveform", "spectrogram", "audio_values", "reconstruction",
    "reconstructed_pixel_values", "prediction_output", "prediction_outputs", "forecasts", "predictions",
)  # fmt: skip
_FEATURES = ("last_hidden_state", "pooler_output", "embed", "feature_maps", "features", "quantized_representation")
# Not compared: losses, caches, and internals of the model.
_INTERNAL = (
    "loss", "dict", "past_key_values", "cache_params", "hidden_states", "attentions", "mask", "mems", "states", "cache",
    "router_logits",
)  # fmt: skip


def meaningful_outputs(outputs: Any) -> dict[str, Tensor]:
    """Return the output tensors by which two models are compared, by name.

    These are the outputs of the head (logits, boxes, masks, depth, waveforms, ...). A model without a head has features
    (last hidden state, pooled output, embeddings, feature maps). If there are neither, all floating-point outputs are
    returned except losses, caches, attentions and hidden states.

    Args:
        outputs: result of ``forward``: a ``ModelOutput`` of transformers, a mapping, a tuple or a tensor.
    """
    tensors = {n: t for n, t in _flatten("", outputs) if t.is_floating_point() and t.numel()}
    found = {name: tensor for name, tensor in tensors.items() if not _ends_in(name, _INTERNAL)}
    for words in (_ANSWERS, _FEATURES):
        if chosen := {name: t for name, t in found.items() if _ends_in(name, words) or name.startswith("logits_")}:
            return chosen
    return found


def _flatten(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of nested outputs with names such as ``vision_model_output.last_hidden_state``."""
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
    """Return whether the field (last part of a dotted name that is no number) is or ends in one of ``words``."""
    field = next((part for part in reversed(name.split(".")) if not part.isdigit()), name)
    return any(field == word or field.endswith(f"_{word}") for word in words)


@torch.no_grad()
def compared_outputs(
    model: nn.Module, probe: Batch, *, dtype: torch.dtype | None = None,
    compared: Callable[[Batch, Any], Any] | None = None,
) -> Tensor:  # fmt: skip
    """Return the meaningful outputs of a model, concatenated; shape (N,), float32, on the CPU.

    Args:
        model: model in evaluation mode.
        probe: inputs of its forward pass.
        dtype: weight dtype of a model that loads its weights when it is called, on the CPU; None for other models.
        compared: (inputs, outputs) -> outputs to compare; see :meth:`mirrortune.tasks.base.Task.compared`.
    """
    device = next(iter(model.parameters())).device if dtype is None else torch.device("cpu")
    call: Any = model.forward
    arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in probe.items()}
    devices = [device] if device.type == "cuda" else []
    with autocast(model, dtype), torch.random.fork_rng(devices):
        torch.manual_seed(0)  # some models draw random numbers in their forward even in evaluation mode
        outputs = call(**arguments)
        found = meaningful_outputs(compared(arguments, outputs) if compared else outputs)
    if not found:
        raise NothingToCompareError(f"the outputs of {type(model).__name__} hold no floating-point tensor")
    return torch.cat([_without_padding(n, v, probe).float().cpu().flatten() for n, v in found.items()])


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference between two results of :func:`compared_outputs`.

    The result is infinity if the sizes differ, and not finite if one of the values is not. The exception is minus
    infinity in both at the same place: a masked value, which counts as equal unless all values are masked.
    """
    if found.shape != expected.shape:  # a detector may find more in one than in the other
        return float("inf")
    is_masked = (found == -torch.inf) & (expected == -torch.inf)
    if bool(is_masked.any()) and not bool(is_masked.all()):
        found, expected = found[~is_masked], expected[~is_masked]
    return float((expected - found).abs().max())


class NothingToCompareError(ValueError):
    """A forward pass returned no output that can be compared."""


def _without_padding(name: str, value: Tensor, probe: Batch) -> Tensor:
    """Drop the padded positions of ``value``, which have no meaning and are the most sensitive to rounding."""
    mask = probe.get("attention_mask")
    is_of_tokens = value.ndim == 3 or name.endswith("_logits")
    if mask is not None and is_of_tokens and value.shape[:2] == mask.shape:
        return value[mask.bool().to(value.device)]
    return value
