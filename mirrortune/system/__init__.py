# SPDX-License-Identifier: Apache-2.0
"""Access to the machine and the Hub: atomic files, caches, devices, processes, the console."""

__all__ = [
    "atomic",
    "cache",
    "claims",
    "compiler",
    "console",
    "devices",
    "distributed",
    "hub",
    "machine",
    "outputs",
    "paths",
    "run_directory",
    "run_status",
    "signals",
    "tensor_files",
]
