# SPDX-License-Identifier: Apache-2.0
"""Access to the machine and the Hub: atomic files, disk space, devices, processes, the console."""

__all__ = [
    "atomic",
    "claims",
    "compiler",
    "console",
    "devices",
    "disk",
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
