# SPDX-License-Identifier: Apache-2.0
"""Define the methods by the names that ``--method`` takes.

A method is a core with its rank and pairing, a PEFT tuner, or a set of existing parameters to train. The name of a core
is also the name of a method, with the defaults of its class. Imports no torch, so that ``--help`` stays fast.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mirrortune.errors import PREFERENCES, no_preferences, unknown_name
from mirrortune.registry import Registry

if TYPE_CHECKING:
    from mirrortune.adapters.core import Core

CORES: Registry[type[Core]] = Registry("core", package="mirrortune.adapters.cores")


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftTuner:
    """A tuner of the ``peft`` package, in PEFT's terms.

    Attributes:
        kind: PEFT's ``PeftType``, such as ``LORA``, which also determines the configuration class.
        rank: field of the configuration that ``rank`` sets; None for a tuner without a rank.
        alpha: field of alpha in the scale alpha / rank, or None; set to the rank (scale 1) unless given as an option.
        fixed: fields that define the method and cannot be set as options.
        defaults: fields whose default differs from PEFT's.
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
        core: name in ``CORES``, or None for a method without a core.
        peft: PEFT tuner used instead of a core, or None.
        pairing: name in ``PAIRINGS``, or None if the core takes no pairs.
        rank: default number of leading singular directions, or ``"full"`` for min(out, in); for a PEFT tuner, its
            default rank.
        options: options of the core whose defaults differ from those of its class.
        rank_option: option of the core that the user's rank sets, instead of the number of directions.
        lr: default learning rate of the adapter or, without an adapter, of the trained base parameters.
        image_lr: the same for image classification; None if it is ``lr``.
        plain: parameters of the base model that are trained directly, in addition to the task head.
        summary: description of one line for help texts.
    """

    core: str | None = None
    peft: PeftTuner | None = None
    pairing: str | None = None
    rank: int | Literal["full"] = "full"
    options: Mapping[str, Any] = field(default_factory=dict)
    rank_option: str | None = None
    lr: float
    image_lr: float | None = None
    plain: Literal["none", "bias", "all"] = "none"
    summary: str

    def default_lr(self, kind: str | None) -> float:
        """Return the default learning rate for a kind of task, such as ``image-classification``."""
        return self.lr if self.image_lr is None or kind != "image-classification" else self.image_lr

    @property
    def is_head_only(self) -> bool:
        """Whether only the task head is trained."""
        return not self.is_adapter and self.plain == "none"

    @property
    def is_adapter(self) -> bool:
        """Whether the method adds parameters to layers, instead of only training existing ones."""
        return self.core is not None or self.peft is not None


def _peft(
    kind: str, summary: str, *, lr: float, image_lr: float | None = None, rank: int | None = None,
    alpha: str | None = None, fixed: Mapping[str, Any] | None = None, defaults: Mapping[str, Any] | None = None,
) -> Preset:  # fmt: skip
    """Build an entry for a PEFT tuner; ``rank`` is its default rank, or None for a tuner without a rank."""
    field_name = None if rank is None else "r"
    tuner = PeftTuner(kind=kind, rank=field_name, alpha=alpha, fixed=fixed or {}, defaults=defaults or {})
    return Preset(peft=tuner, rank="full" if rank is None else rank, lr=lr, image_lr=image_lr, summary=summary)


_ALPHA = "lora_alpha"
# Defaults are PEFT's, except for the rank, an alpha equal to it (a scale of 1; of sqrt(r) for rslora), and fields with
# a comment. The learning rates of lora and road were the best of three in a prototype, that of lora on images the
# better of two on three sets (docs/results.md, "Rates on images"); the others follow the most similar tuner.
# fmt: off
_PEFT: dict[str, Preset] = {
    "lora": _peft("LORA", "B A beside each weight", lr=3e-3, image_lr=1e-3, rank=8, alpha=_ALPHA),
    "rslora": _peft("LORA", "LoRA scaled by alpha / sqrt(r): by sqrt(r), as alpha is r by default", lr=3e-3,
                    image_lr=1e-3, rank=8, alpha=_ALPHA, fixed={"use_rslora": True}),
    "dora": _peft("LORA", "LoRA for the direction, a vector for the lengths", lr=3e-3, image_lr=1e-3, rank=8,
                  alpha=_ALPHA, fixed={"use_dora": True}),
    "pissa": _peft("LORA", "LoRA that starts from the leading singular directions", lr=1e-3, rank=8, alpha=_ALPHA,
                   fixed={"init_lora_weights": "pissa"}),
    "gralora": _peft("GRALORA", "LoRA in blocks", lr=3e-3, rank=32, alpha="alpha"),
    "hira": _peft("HIRA", "the weight times a low-rank matrix, entry by entry", lr=4.5e-3, rank=32),
    "delora": _peft("DELORA", "LoRA with bounded strength", lr=3e-3, rank=8),
    "glora": _peft("GLORA", "low-rank scale and shift of weight and bias", lr=3e-3, rank=8),
    "miss": _peft("MISS", "one small matrix, shared by groups of inputs", lr=1e-3, rank=64),
    "peanut": _peft("PEANUT", "a small network that reads the weight", lr=3e-3, rank=32),
    "deft": _peft("DEFT", "a low-rank projection out of the weight, and another into it", lr=3e-3, rank=8),
    "lily": _peft("LILY", "low-rank experts shared between layers; cannot be merged", lr=3e-3, rank=32),
    "loha": _peft("LOHA", "entrywise product of two low-rank matrices", lr=3e-3, rank=8, alpha="alpha"),
    "lokr": _peft("LOKR", "Kronecker product of two matrices", lr=3e-3, rank=8, alpha="alpha"),
    "oft": _peft("OFT", "block-diagonal rotation of the inputs", lr=3e-3),
    "boft": _peft("BOFT", "butterfly rotation of the inputs", lr=3e-3),
    "hra": _peft("HRA", "a chain of r Householder reflections of the inputs", lr=3e-3, rank=8),
    "road": _peft("ROAD", "scaled plane rotations of the outputs", lr=1e-2),
    "psoft-peft": _peft("PSOFT", "rotation of the leading singular subspace", lr=1e-3, rank=46, alpha="psoft_alpha"),
    "vera": _peft("VERA", "two vectors around random matrices", lr=1e-2, rank=256),
    # The random matrices follow from a seed; PEFT would save a copy of several megabytes for every layer.
    "randlora": _peft("RANDLORA", "vectors around random matrices of full rank", lr=1e-3, rank=32,
                      defaults={"save_projection": False}),
    "tinylora": _peft("TINYLORA", "a few numbers through the leading singular directions", lr=1e-2, rank=2),
    "unilora": _peft("UNILORA", "LoRA read from one short shared vector", lr=1e-2, rank=4),
    # PEFT's 256 does not divide the 384 of a small encoder, and neither does c3a's.
    "vblora": _peft("VBLORA", "LoRA put together from a shared bank of vectors", lr=1e-2, rank=4,
                    defaults={"vector_length": 128}),
    "c3a": _peft("C3A", "circular convolutions", lr=3e-2, defaults={"block_size": 128}),
    "fourierft": _peft("FOURIERFT", "a few Fourier coefficients of the change", lr=3e-2),
    "waveft": _peft("WAVEFT", "a few wavelet coefficients of the change", lr=3e-2),
    "shira": _peft("SHIRA", "a few entries of the weight, drawn by the seed", lr=3e-3, rank=32),
    "supertuning": _peft("SUPERTUNING", "the hundredth of the entries that is largest", lr=3e-3),
    # Feed-forward layers cannot be recognised by shape, so all outputs are scaled unless an option names such layers.
    "ia3": _peft("IA3", "a scale for each output", lr=5e-3, defaults={"feedforward_modules": []}),
}
# fmt: on

PRESETS: dict[str, Preset] = {
    "mirror": Preset(
        core="givens",
        pairing="mirror",
        lr=2e-2,
        summary="plane rotations of the output-side singular vectors, strongest paired with weakest",
    ),
    "mirror-scale": Preset(
        core="givens",
        pairing="mirror",
        options={"scale_top_k": "all", "unit": "weight"},
        lr=2e-2,
        image_lr=1e-2,
        summary="the rotations of mirror, and a scale for every singular value",
    ),
    "neighbor": Preset(
        core="givens",
        pairing="neighbor",
        lr=2e-2,
        summary="the rotations of mirror, each direction paired with the next one",
    ),
    "random": Preset(
        core="givens",
        pairing="random",
        lr=2e-2,
        summary="the rotations of mirror, pairs drawn by the seed",
    ),
    "adaptive": Preset(
        core="givens",
        pairing="adaptive",
        lr=2e-2,
        summary="the rotations of mirror, pairs matched to the task's own gradients",
    ),
    "none": Preset(lr=1e-3, summary="only the task head; the base model is frozen"),
    "bitfit": Preset(lr=1e-3, plain="bias", summary="every bias of the base model, and the head"),
    "full": Preset(lr=5e-5, plain="all", summary="every parameter: ordinary fine-tuning"),
    **_PEFT,
}


def method_names(*, with_peft: bool = True) -> list[str]:
    """Return the sorted names that ``--method`` takes, optionally without PEFT's tuners."""
    return sorted({*CORES.names(), *(name for name, found in PRESETS.items() if with_peft or found.peft is None)})


def preset(method: str, where: str = "adapter.method") -> Preset:
    """Return the preset called ``method``, or that of the core of this name.

    Raises:
        ConfigError: the name is unknown; the error names ``where`` and suggests the nearest name.
    """
    if method in PRESETS:
        return PRESETS[method]
    if method in PREFERENCES:
        raise no_preferences(where, method, allowed="a way to adapt the model, such as mirror, lora or full")
    if method not in CORES.names():
        raise unknown_name(where, "method", method, method_names())
    core = CORES.get(method, where)
    summary = (inspect.getdoc(core) or method).splitlines()[0]
    return Preset(
        core=method, pairing=core.default_pairing, rank=core.default_rank, rank_option=core.rank_option,
        lr=core.default_lr, image_lr=core.image_lr, summary=summary,
    )  # fmt: skip
