# SPDX-License-Identifier: Apache-2.0
"""Inputs for any model with one of our heads, from the names of what its forward takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

ROWS, LENGTH, CHOICES = 2, 16, 3


def inputs_for(model: nn.Module, head: str) -> Iterator[dict[str, Tensor]]:
    """Keyword arguments for ``model``, the likeliest first.

    Args:
        model: with a head of ours.
        head: name of the head, as in ``walk.HEADS``.
    """
    main = getattr(model, "main_input_name", "input_ids")
    wanted = _wanted(model)
    if head == "image-classification":
        main = "pixel_values" if "pixel_values" in wanted else main
    for sizes in _SIZES.get(main, ((LENGTH,),)):
        yield _extras(model, head, wanted) | {main: _main(model, main, sizes, head)}


def _wanted(model: nn.Module) -> list[str]:
    return list(inspect.signature(model.forward).parameters)


def _image_side(config: Any) -> int:
    side = getattr(getattr(config, "vision_config", config), "image_size", None) or 64
    return side[0] if isinstance(side, (list, tuple)) else int(side)


def _main(model: nn.Module, name: str, sizes: tuple[int, ...], head: str) -> Tensor:
    config: Any = model.config
    generator = torch.Generator().manual_seed(3)
    if name == "pixel_values":
        channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", 3)
        side = _image_side(config) if sizes == (0,) else sizes[0]
        return torch.randn(ROWS, channels if isinstance(channels, int) else 3, side, side, generator=generator)
    if name in ("input_values", "input_features"):
        mels = next((v for n in ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim")
                     if (v := getattr(config, n, None))), 80)  # fmt: skip
        shape = tuple(mels if s == -1 else getattr(config, "max_length", 64) if s == -2 else s for s in sizes)
        return torch.randn(ROWS, *shape, generator=generator)
    if name == "inputs":
        return _tokens(config, (ROWS, LENGTH), generator)
    shape = (ROWS, CHOICES, LENGTH) if head == "multiple-choice" else (ROWS, LENGTH)
    tokens = _tokens(config, shape, generator)
    if isinstance(between := getattr(config, "sep_token_id", None), int) and "global_attention_mask" in _wanted(model):
        tokens[..., [4, 9, LENGTH - 1]] = between  # what tells a question from its context
    if isinstance(end := getattr(config, "eos_token_id", None), int) and "decoder_input_ids" in _wanted(model):
        tokens[..., -1] = end  # where encoder-decoders with a classifier look
    return tokens


def _tokens(config: Any, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    text = getattr(config, "text_config", None) or config
    size = getattr(text, "vocab_size", None) or getattr(text, "src_vocab_size", None) or 100
    special = {
        v for c in (config, text) for n, v in vars(c).items() if n.endswith(("_id", "_index")) and isinstance(v, int)
    }
    allowed = torch.tensor([t for t in range(4, size) if t not in special])
    return allowed[torch.randint(0, len(allowed), shape, generator=generator)]


def _extras(model: nn.Module, head: str, wanted: list[str]) -> dict[str, Tensor]:
    config: Any = model.config
    lead = (ROWS, CHOICES) if head == "multiple-choice" else (ROWS,)
    found: dict[str, Tensor] = {}
    if "bbox" in wanted:
        found["bbox"] = torch.tensor([1, 2, 3, 4]).expand(*lead, LENGTH, 4).contiguous()
        if getattr(config, "dim_bbox", 4) == 8:
            found["bbox"] = torch.rand(*lead, LENGTH, 8, generator=torch.Generator().manual_seed(1))
    if "visual_feats" in wanted:
        found["visual_feats"] = torch.randn(ROWS, 5, config.visual_feat_dim, generator=torch.Generator().manual_seed(1))
        found["visual_pos"] = torch.rand(ROWS, 5, config.visual_pos_dim, generator=torch.Generator().manual_seed(2))
    if "image" in wanted:
        found["image"] = torch.randn(ROWS, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    is_text = getattr(model, "main_input_name", "input_ids") == "input_ids"
    if "decoder_input_ids" in wanted and (head == "seq2seq-lm" or not is_text):
        found["decoder_input_ids"] = _tokens(config, (ROWS, 7), torch.Generator().manual_seed(4))
    return found


# -1 stands for the mel bins, -2 for the configuration's own length; images: 0 for the configuration's own side.
_SIZES: dict[str, tuple[tuple[int, ...], ...]] = {
    "pixel_values": ((0,), (64,), (224,), (256,)),
    "input_values": ((4000,), (-2, -1), (16000,)),
    "input_features": ((-1, 3000), (64, -1), (-1, 64), (-2, -1)),
}
