# SPDX-License-Identifier: Apache-2.0
"""What each ``--method`` name stands for: a core with its side, rank and pairing, a tuner of PEFT, or a set of plain
parameters to train.

Data only and free of torch, so that a wrong method name is reported before anything heavy is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mirrortune.errors import unknown_name


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftTuner:
    """A tuner of the ``peft`` package, by the names that PEFT has for it.

    Attributes:
        kind: its ``PeftType``, such as ``LORA``; names its configuration class too.
        rank: the field of its configuration that ``rank`` sets, or None where it has no rank.
        alpha: the field that scales it by alpha / rank; set to the rank (scale 1) unless given as an option.
        fixed: fields that make the method what it is, not to be set as options.
        defaults: fields whose default here is not PEFT's.
    """

    kind: str
    rank: str | None = "r"
    alpha: str | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """One method.

    Attributes:
        core: name in ``cores.CORES``, or None for a method that has no core.
        peft: the tuner of PEFT that is run instead of a core, or None.
        pairing: name in ``pairings.PAIRINGS``, or None where the core pairs nothing.
        rank: number of leading singular directions kept, or ``"full"`` for all min(out, in); the tuner's own rank for
            one of PEFT that has a rank.
        lr: default learning rate of the adapter's parameters (of the trained base parameters without an adapter).
        plain: which parameters of the base model are trained as they are, besides the task head.
        summary: one line for help texts.
    """

    core: str | None = None
    peft: PeftTuner | None = None
    pairing: str | None = None
    rank: int | Literal["full"] = "full"
    lr: float
    plain: Literal["none", "bias", "all"] = "none"
    summary: str

    @property
    def is_head_only(self) -> bool:
        """Whether nothing but the task head is trained."""
        return not self.is_adapter and self.plain == "none"

    @property
    def is_adapter(self) -> bool:
        """Whether the method puts something into linear layers, and does not only train what is there."""
        return self.core is not None or self.peft is not None


_LORA = PeftTuner(kind="LORA", alpha="lora_alpha")

PRESETS: dict[str, Preset] = {
    "mirror": Preset(
        core="givens",
        pairing="mirror",
        lr=3e-2,
        summary="plane rotations of the output-side singular vectors, strongest paired with weakest",
    ),
    "neighbor": Preset(
        core="givens",
        pairing="neighbor",
        lr=3e-2,
        summary="the same rotations, each direction paired with the next one",
    ),
    "random": Preset(
        core="givens",
        pairing="random",
        lr=3e-2,
        summary="the same rotations, pairs drawn by the seed",
    ),
    "adaptive": Preset(
        core="givens",
        pairing="adaptive",
        lr=3e-2,
        summary="the same rotations, pairs matched to the task's own gradients",
    ),
    "scale": Preset(
        core="scale", lr=3e-2, summary="every singular value times 1 + lambda (leading ones only with top_k)"
    ),
    "speclora": Preset(core="speclora", lr=3e-3, summary="the leading singular values rescaled, and a LoRA branch"),
    "psoft": Preset(
        core="psoft", rank=46, lr=3e-3, summary="orthogonal map of the leading input-side subspace, with two vectors"
    ),
    "svft": Preset(core="svft", lr=5e-2, summary="a sparse trained matrix between the singular vectors"),
    "lora-xs": Preset(core="lora-xs", rank=16, lr=3e-3, summary="a free matrix between the leading singular vectors"),
    "lora": Preset(peft=_LORA, rank=8, lr=3e-3, summary="PEFT's LoRA: a trained product of rank r beside each weight"),
    "road": Preset(
        peft=PeftTuner(kind="ROAD", rank=None),
        lr=3e-2,
        summary="PEFT's RoAd: scaled plane rotations of the outputs of each layer",
    ),
    "none": Preset(lr=1e-3, summary="the task head alone, the base model frozen"),
    "bitfit": Preset(lr=1e-3, plain="bias", summary="every bias of the base model, and the head"),
    "full": Preset(lr=5e-5, plain="all", summary="every parameter: ordinary fine-tuning"),
}


def preset(method: str, where: str = "adapter.method") -> Preset:
    """The preset called ``method``; ConfigError at ``where`` with the nearest name otherwise."""
    if method not in PRESETS:
        raise unknown_name(where, "method", method, PRESETS)
    return PRESETS[method]
