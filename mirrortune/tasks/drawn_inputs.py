# SPDX-License-Identifier: Apache-2.0
"""Random inputs for a model known only by its class and configuration: token ids, pixels, waveforms and spectrograms
of the sizes in the configuration.

A configuration does not determine all inputs of the forward pass, so several candidates are tried, the likeliest first;
:func:`first_that_runs` returns the first one that the model accepts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from mirrortune.data.examples import Batch
from mirrortune.errors import MirrortuneError, raised_here
from mirrortune.tasks.model_outputs import NothingToCompareError

_ROWS, _LENGTH, _DECODER_LENGTH, _CHOICES = 2, 16, 7, 3
_SIDES = (64, 224, 256)  # pixels, if the configuration has no image size or a wrong one
_SAMPLES = (4000, 16_000)  # of a recording
_UNNAMED_VOCABULARY = 32
T = TypeVar("T")
Draw = Callable[[Any, Any], list[Tensor]]
"""(model class, configuration) -> candidates for one argument of the forward pass, the likeliest first."""


def first_that_runs(candidates: Iterable[Batch], run: Callable[[Batch], T]) -> tuple[Batch, T] | str:
    """Return the first candidate that a model accepts and the result of ``run``, or why it refused the likeliest one.

    Args:
        candidates: inputs of the forward pass.
        run: runs the model. An exception from another library means that the model refuses the inputs; exceptions of
            this package are raised.
    """
    reason = ""
    for batch in candidates:
        try:
            return batch, run(batch)
        except MirrortuneError:
            raise
        except Exception as error:
            if raised_here(error) and not isinstance(error, NothingToCompareError):
                raise
            reason = reason or f"{type(error).__name__}: {(str(error).strip().splitlines() or ['-'])[0][:200]}"
    return reason or "no inputs are known for it"


def input_names(model_class: Any) -> set[str]:
    """Return the argument names of a class's ``forward``, with the main input if ``forward`` takes ``**kwargs``."""
    parameters = inspect.signature(model_class.forward).parameters.values()
    names = {p.name for p in parameters}
    takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters)
    return names | {getattr(model_class, "main_input_name", "input_ids")} if takes_any else names


def drawn_inputs(model_class: Any, config: Any) -> Iterator[Batch]:
    """Yield candidate inputs of a model's forward pass, drawn with fixed seeds and without padding.

    Args:
        model_class: model class of transformers, not an Auto class.
        config: configuration of the model.

    Yields:
        Arguments of ``forward``, with 2 rows in each tensor, or 1: the main input alone, then with further inputs.
    """
    signature, taken = inspect.signature(model_class.forward), input_names(model_class)
    main = getattr(model_class, "main_input_name", None)
    names = sorted((name for name in _DRAW if name in taken), key=lambda name: name != main)
    required = {
        n for n, p in signature.parameters.items() if p.default is p.empty and n not in ("self", "kwargs", "args")
    }
    sets = [names[:count] for count in range(1, len(names) + 1)] + [[name] for name in names[1:]]
    for chosen in sets:
        for batch in _variants(model_class, config, chosen):
            own = batch | _beside(batch, signature.parameters, config)
            for whole in _with_decoder(own, model_class, config):
                # A mask of patches is optional in some models and required in others.
                masked = _masked(whole, signature.parameters, config)
                yield from (one for one in (whole, masked) if one is not None and required <= one.keys())


def _variants(model_class: Any, config: Any, names: list[str]) -> Iterator[Batch]:
    """Yield the named inputs in all candidate shapes."""
    drawn = {name: found for name in names if (found := _DRAW[name](model_class, config))}
    for index in range(max(map(len, drawn.values()), default=0)):
        yield {name: found[min(index, len(found) - 1)] for name, found in drawn.items()}


def _with_decoder(batch: Batch, model_class: Any, config: Any) -> Iterator[Batch]:
    taken = inspect.signature(model_class.forward).parameters
    if "decoder_input_ids" not in taken:
        yield batch
        return
    size = _vocabulary(getattr(config, "decoder", None) or config)
    with_decoder = {**batch, "decoder_input_ids": _ids(config, size, (_ROWS, _DECODER_LENGTH), seed=4)}
    is_pair = bool(getattr(config, "is_encoder_decoder", False))
    yield from (with_decoder, batch) if is_pair else (batch, with_decoder)


def _beside(batch: Batch, taken: Mapping[str, Any], config: Any) -> Batch:
    """Return the inputs that go with ``batch``: attention mask, word boxes, object features, task tokens."""
    found: Batch = {}
    ids, pixels = batch.get("input_ids"), batch.get("pixel_values")
    if ids is not None and "attention_mask" in taken:
        found["attention_mask"] = torch.ones_like(ids)
    if ids is not None and "bbox" in taken:
        found["bbox"] = torch.tensor([1, 2, 3, 4]).expand(*ids.shape, 4).contiguous()
    if ids is not None and "visual_feats" in taken and "visual_feat_dim" in vars(config):
        found["visual_feats"] = _noise((_ROWS, 5, config.visual_feat_dim))
        found["visual_pos"] = _noise((_ROWS, 5, config.visual_pos_dim)).sigmoid()
    if pixels is not None and "task_inputs" in taken:
        found["task_inputs"] = _ids(config, _vocabulary(config), (_ROWS, _number(config, "task_seq_len") or 77), seed=6)
    return found


def _masked(batch: Batch, taken: Mapping[str, Any], config: Any) -> Batch | None:
    """Return ``batch`` with every second patch of its images masked, if the forward supports it."""
    pixels, patch = batch.get("pixel_values"), _pair(_setting(config, "patch_size"))
    if pixels is None or patch is None or "bool_masked_pos" not in taken:
        return None
    count = (pixels.shape[-2] // patch[0]) * (pixels.shape[-1] // patch[1])
    if pixels.ndim == 5:
        count *= max(1, pixels.shape[1] // (_number(config, "tubelet_size") or 1))
    return {**batch, "bool_masked_pos": torch.arange(count).remainder(2).bool().expand(_ROWS, count)}


def _draw_ids(model_class: Any, config: Any) -> list[Tensor]:
    """Draw token ids (2, L), or (2, choices, L) for multiple choice, with the end token that an encoder expects."""
    positions = _number(config, "max_position_embeddings") or _number(config, "n_positions") or 512
    length = min(_LENGTH, max(1, positions - 4))  # some models reserve their first positions for padding
    lead = (_ROWS, _CHOICES) if model_class.__name__.endswith("MultipleChoice") else (_ROWS,)
    ids = _ids(config, _vocabulary(config), (*lead, length), seed=3)
    end, between = _token(config, "eos_token_id"), _token(config, "sep_token_id")
    if between is not None and "global_attention_mask" in inspect.signature(model_class.forward).parameters:
        ids[..., [length // 4, length // 2, length - 1]] = between
    if end is not None and getattr(config, "is_encoder_decoder", False):
        ids[..., -1] = end
    # Without a padding token some classifiers accept a single row only.
    return [ids, ids[:1]]


def _draw_images(model_class: Any, config: Any) -> list[Tensor]:
    """Draw images (2, channels, height, width), or clips (2, frames, channels, height, width)."""
    channels = next((n for key in ("num_channels", "in_channels", "in_chans") if (n := _number(config, key))), 3)
    own = _pair(_setting(config, "image_size")) or _pair(_setting(config, "input_size"))
    sides = list(dict.fromkeys(([own] if own else []) + [(side, side) for side in _SIDES]))
    images = [(_ROWS, channels, *side) for side in sides]
    frames = _number(config, "num_frames") or _number(config, "frames_per_clip")
    clips = [(_ROWS, frames or 2, channels, *side) for side in sides]
    return [_noise(shape) for shape in ((*clips, *images) if frames else (*images, *clips))]


def _draw_waves(model_class: Any, config: Any) -> list[Tensor]:
    """Draw waveforms (2, samples), spectrograms (2, frames, mel bins), or waveforms (2, 1, samples)."""
    shapes: list[tuple[int, ...]] = [(_ROWS, count) for count in _SAMPLES]
    bins, frames = _number(config, "num_mel_bins"), _number(config, "max_length")
    if bins and frames:
        shapes.insert(0, (_ROWS, frames, bins))
    return [_noise(shape) for shape in (*shapes, *((_ROWS, 1, count) for count in _SAMPLES))]


def _draw_spectrograms(model_class: Any, config: Any) -> list[Tensor]:
    """Draw spectrograms (2, mel bins, frames), (2, frames, mel bins) or (2, 1, frames, mel bins)."""
    named = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "n_mels", "input_size")
    bins = next((n for key in named if (n := _number(config, key))), 80)
    positions = _number(config, "max_source_positions")
    frames = [2 * positions] if positions else []
    shapes: list[tuple[int, ...]] = [(_ROWS, bins, count) for count in (*frames, 3000)]
    shapes += [(_ROWS, 64, bins), (_ROWS, bins, 64), (_ROWS, 1, 1001, bins), (_ROWS, 1, 1001, 64)]
    return [_noise(shape) for shape in shapes]


def _draw_series(model_class: Any, config: Any) -> list[Tensor]:
    """Draw time series (2, steps, channels) or (2, steps)."""
    steps = _number(config, "context_length") or 32
    channels = _number(config, "num_input_channels") or _number(config, "input_size") or 1
    return [_noise((_ROWS, steps, channels)), _noise((_ROWS, steps))]


_DRAW: dict[str, Draw] = {
    "input_ids": _draw_ids, "inputs": _draw_ids, "pixel_values": _draw_images, "pixel_values_videos": _draw_images,
    "input_values": _draw_waves, "input_features": _draw_spectrograms, "past_values": _draw_series,
}  # fmt: skip


def _ids(config: Any, size: int, shape: tuple[int, ...], *, seed: int) -> Tensor:
    """Draw token ids below ``size``, without special tokens such as image placeholders."""
    special = {value for part in _parts(config) for name, value in vars(part).items() if name.endswith("_id")
               for value in (value if isinstance(value, list) else [value]) if isinstance(value, int)}  # fmt: skip
    allowed = torch.tensor([i for i in range(size) if i not in special] or list(range(size)))
    return allowed[torch.randint(0, len(allowed), shape, generator=torch.Generator().manual_seed(seed))]


def _noise(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def _vocabulary(config: Any) -> int:
    names = ("vocab_size", "src_vocab_size", "n_vocab")
    return next((n for name in names if (n := _number(config, name))), _UNNAMED_VOCABULARY)


def _token(config: Any, name: str) -> int | None:
    value = _setting(config, name)
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, int) and 0 <= value < _vocabulary(config) else None


def _number(config: Any, name: str) -> int | None:
    value = _setting(config, name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, Mapping):
        value = (value.get("height"), value.get("width"))
    sides = (value, value) if isinstance(value, int) else tuple(value)[-2:] if isinstance(value, (list, tuple)) else ()
    return sides if len(sides) == 2 and all(isinstance(side, int) for side in sides) else None


def _setting(config: Any, name: str) -> Any:
    """Return a setting of a configuration, or of the first of its sub-configurations that has it."""
    return next((value for part in _parts(config) if (value := getattr(part, name, None)) is not None), None)


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_dict"):
            yield from _parts(value)
