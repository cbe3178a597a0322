# SPDX-License-Identifier: Apache-2.0
"""Define the command ``doctor``, which describes this machine in text that can be pasted into an issue."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mirrortune.cli.flags import Debug, Json, Quiet, Verbose
from mirrortune.errors import counted
from mirrortune.system.console import Reporter


def doctor(*, json: Json = False, quiet: Quiet = False, verbose: Verbose = False, debug: Debug = False) -> None:
    """Print versions, devices, caches and supported features, to paste into an issue; no user names or tokens.

    mirrortune doctor
    """
    reporter = Reporter(verbosity=-1 if quiet else int(verbose), as_json=json)
    from mirrortune.system.machine import describe_machine  # noqa: PLC0415

    found = describe_machine()
    reporter.result(found, list(_lines(found)))


def _lines(found: dict[str, Any]) -> Iterator[str]:
    yield f"mirrortune {found['mirrortune']}, Python {found['python']}, {found['platform']}"
    has = {name: version for name, version in found["packages"].items() if version is not None}
    yield f"packages: {', '.join(f'{name} {version}' for name, version in has.items())}"
    if lacking := [name for name in found["packages"] if name not in has]:
        yield f"not installed: {', '.join(lacking)}"
    for device in found["devices"]:
        yield f"device: {_device(device)}"
    yield f"precision: auto is {found['precision']}"
    for name, answer in found["abilities"].items():
        yield f"{name}: {answer}"
    for name, cache in found["caches"].items():
        state = ", cannot be written" if not cache["writable"] else "" if cache["exists"] else ", not made yet"
        free = "" if cache["free_bytes"] is None else f" ({_gibibytes(cache['free_bytes'])} free)"
        yield f"cache of {name}: {cache['path']}{free}{state}"
    yield f"Hub: {'a token is stored' if found['hub_token'] else 'no token'}"
    if found["environment"]:
        yield f"environment: {', '.join(f'{name}={value}' for name, value in found['environment'].items())}"


def _device(device: dict[str, Any]) -> str:
    parts = [f"{device['kind']} {device['name']}"]
    if "cores" in device:
        parts.append(f"{counted(device['cores'], 'core')}, {counted(device['threads'], 'thread')} in use")
    if "memory_bytes" in device:
        parts.append(f"{_gibibytes(device['memory_bytes'])} of memory ({_gibibytes(device['free_bytes'])} free)")
    if "capability" in device:
        parts.append(f"compute capability {device['capability']}, runtime {device['runtime']}")
    return ", ".join(parts)


def _gibibytes(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
