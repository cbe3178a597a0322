# SPDX-License-Identifier: Apache-2.0
"""Fine-tune any transformers model by rotating and rescaling the singular directions of its pretrained weights.

Importing this package does not import torch; the names below are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "AdapterBank",
    "__version__",
    "adapter_trainer",
    "attach",
    "load_adapter",
    "merge_adapter",
    "save_adapter",
    "trainable_parameters",
]

if TYPE_CHECKING:
    from mirrortune.api import (
        attach,
        load_adapter,
        merge_adapter,
        save_adapter,
        trainable_parameters,
    )
    from mirrortune.inference.bank import AdapterBank
    from mirrortune.trainers import adapter_trainer

_ELSEWHERE = {"AdapterBank": "inference.bank", "adapter_trainer": "trainers"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        module = _ELSEWHERE.get(name, "api")
        return getattr(importlib.import_module(f"mirrortune.{module}"), name)
    raise AttributeError(f"module 'mirrortune' has no attribute '{name}'")
