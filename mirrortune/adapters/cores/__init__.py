# SPDX-License-Identifier: Apache-2.0
"""The cores, one per file of the same name. Importing this package registers all of them."""

import importlib
import pkgutil

from mirrortune.adapters.core import CORES, Coefficients, Core

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["CORES", "Coefficients", "Core"]
