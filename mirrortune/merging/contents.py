# SPDX-License-Identifier: Apache-2.0
"""What a merged folder must hold besides the right weights: what is tied stays tied; labels, tokenizer or processor,
chat template and generation settings are there and are the model's own. Everything is read back by transformers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mirrortune.errors import VerificationError
from mirrortune.models.tensors import aliases

_FIX = "The merged folder was not written; please report this with the model's name"


def check_ties(reopened: nn.Module, model: nn.Module) -> None:
    """Refuse a reopened model in which other names stand for one tensor than in ``model``."""
    found, expected = aliases(reopened), aliases(model)
    for name, own in expected.items():
        if sorted(found.get(name, ())) != sorted(own):
            raise VerificationError(
                name, f"it is tied to {found.get(name, ())} as reopened", allowed=str(own), fix=_FIX
            )


def tensor_entry(written: Tensor, reference: Tensor, stored: Callable[[], Tensor]) -> dict[str, float]:
    """What the report says of an adapted tensor.

    Args:
        written: as it was read back.
        reference: its value in float64.
        stored: reads the base's; asked for 16-bit tensors, whose rounding may lose a part of the change.
    """
    error = float((written.double() - reference).norm())
    entry = {"rel_weight_error": error / (float(reference.norm()) or 1.0)}
    entry["weight_tolerance"] = torch.finfo(written.dtype).eps
    if written.dtype in (torch.bfloat16, torch.float16):
        change = float((reference - stored()).norm())
        entry["rounding_loss"] = error / change if change else 0.0  # of the change: what 16 bits could not hold
    return entry


def check_contents(
    folder: Path, model: nn.Module, processors: Sequence[Any], *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Compare what lies beside the weights in ``folder`` with what belongs there.

    Args:
        folder: the merged checkpoint.
        model: the merged model, or one of its configuration.
        processors: tokenizer, image processor or feature extractor, or readers of ours that hold one; those that the
            base has.
        trust_remote_code: run code that the configuration names, as the user allowed for the base.

    Returns:
        What was found, for the report.

    Raises:
        VerificationError: something is missing or another one.
    """
    from transformers import AutoConfig, GenerationConfig  # noqa: PLC0415

    wanted: Any = model.config
    report: dict[str, Any] = {}
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    _require(_named(config), _named(wanted), "id2label in config.json")
    _require(
        getattr(config, "problem_type", None), getattr(wanted, "problem_type", None), "problem_type in config.json"
    )
    report["labels"] = len(getattr(config, "id2label", None) or ())
    can_generate: Any = getattr(model, "can_generate", lambda: False)
    if can_generate():
        _require((folder / "generation_config.json").is_file(), True, "generation_config.json")  # noqa: FBT003
        report["generation_config"] = GenerationConfig.from_pretrained(folder).to_diff_dict()
    report |= {"processor": None, "chat_template": False}
    for processor in processors:
        inner = next((getattr(processor, key) for key in _HELD if hasattr(processor, key)), processor)
        again, name = type(inner).from_pretrained(folder), type(inner).__name__
        for key, own in _described(inner).items():
            _require(_described(again)[key], own, f"the {name}'s {key}")
        report["processor"] = f"{report['processor']}, {name}" if report["processor"] else name
        report["chat_template"] |= bool(getattr(again, "chat_template", None))
    return report


def _named(config: Any) -> dict[int, str] | None:
    """The labels of a configuration; None for those that it has numbered itself, of which some classes make another
    count than their configuration.
    """
    labels = getattr(config, "id2label", None) or {}
    is_numbered = all(name == f"LABEL_{index}" for index, name in labels.items())
    return None if is_numbered else labels


_HELD = ("tokenizer", "processor", "extractor")  # in our readers


def _described(processor: Any) -> dict[str, Any]:
    if hasattr(processor, "get_vocab"):
        text = "It was a GREAT film,  wasn't it? 2.5/5"
        return {
            "vocabulary": processor.get_vocab(),
            "chat template": getattr(processor, "chat_template", None),
            "special tokens": dict(processor.special_tokens_map),
            "tokens": processor(text)["input_ids"],
        }
    return dict(processor.to_dict())


def _require(found: object, expected: object, what: str) -> None:
    if found != expected:
        raise VerificationError(what, f"got {str(found)[:200]} as reopened", allowed=str(expected)[:200], fix=_FIX)
