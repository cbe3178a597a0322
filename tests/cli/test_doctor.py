# SPDX-License-Identifier: Apache-2.0
"""doctor: a description of the machine as lines and as one JSON object."""

from __future__ import annotations

from mirrortune import __version__
from tests.cli.console import mirrortune


def test_doctor_describes_the_machine_in_lines_and_as_json() -> None:
    said = mirrortune("doctor")
    data = mirrortune("doctor", "--json").data

    lines = dict(line.split(": ", 1) for line in said.stdout.splitlines()[1:])
    assert said.exit_code == 0
    assert said.is_plain
    assert said.stdout.startswith(f"mirrortune {__version__}, Python ")
    assert {
        "packages",
        "device",
        "precision",
        "bf16",
        "fp16",
        "flash attention",
        "torch.compile",
        "Hub",
    } <= lines.keys()
    assert lines["cache of mirrortune"].startswith(data["caches"]["mirrortune"]["path"])
    assert data["mirrortune"] == __version__
