# SPDX-License-Identifier: Apache-2.0
"""What the project aims at, and what the benches have measured of it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.contestants import REFERENCE
from tests.bench.parts import PARTS

Results = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A number that should not be larger than another.

    Attributes:
        part: whose results say it.
        line: what is measured, in words.
        aim: the most that it should be.
        read: the number from the part's ``results.json``; KeyError or TypeError where it has not been measured.
        is_strict: whether the aim itself is too much.
    """

    part: str
    line: str
    aim: float
    read: Callable[[Results], float]
    is_strict: bool = False

    def row(self, results: Mapping[str, Results], *, is_judged: bool = True) -> list[str]:
        """Line, aim, measured, verdict."""
        try:
            value = self.read(results[self.part])
        except (KeyError, TypeError, ZeroDivisionError, statistics.StatisticsError):
            return [self.line, self._aim(), "", "not measured"]
        is_met = value < self.aim if self.is_strict else value <= self.aim
        verdict = ("met" if is_met else "missed") if is_judged else "too short to tell"
        return [self.line, self._aim(), f"{value:.3g}", verdict]

    def _aim(self) -> str:
        return f"{'<' if self.is_strict else '<='} {self.aim:g}"


def _steps(name: str, to: str) -> Callable[[Results], float]:
    return lambda r: r["methods"][name]["step_ratio"] / r["methods"][to]["step_ratio"]


def _saved(name: str) -> Callable[[Results], float]:
    return lambda r: r["methods"][name]["saved_bytes"] / r["methods"][REFERENCE]["saved_bytes"]


def _runs(name: str, to: str, clock: str) -> Callable[[Results], float]:
    def read(results: Results) -> float:
        both = zip(results["seconds"][name], results["seconds"][to], strict=True)
        return statistics.median(a[clock] / b[clock] for a, b in both)

    return read


def _of_steps(part: str, where: str) -> list[Target]:
    """What is asked of a training step."""
    found = [
        Target(part=part, line=f"step at rank 64 relative to LoRA ({where})", aim=1.0,
               read=_steps("mirror r=64", REFERENCE)),
        Target(part=part, line=f"saved activations at rank 64 relative to LoRA ({where})", aim=0.75,
               read=_saved("mirror r=64")),
    ]  # fmt: skip
    for other in ("dora r=8", "oft", "boft", "hra r=8"):
        found.append(Target(part=part, line=f"step at full rank relative to {other} ({where})", aim=1.0, is_strict=True,
                            read=_steps("mirror", other)))  # fmt: skip
    return found


def _of_full_rank(part: str, where: str, aim: float) -> Target:
    """All directions against all weights: the gradient of all directions takes as much as that of the weight."""
    line = f"step at full rank relative to full fine-tuning ({where})"
    return Target(part=part, line=line, aim=aim, read=_steps("mirror", "full"))


def _of_runs(clock: str) -> list[Target]:
    return [
        Target(part="end-to-end", line="whole run relative to Trainer + LoRA, padded", aim=0.6,
               read=_runs("ours", "padded", clock)),
        Target(part="end-to-end", line="whole run relative to Trainer + LoRA, dynamic padding", aim=0.9,
               read=_runs("ours", "dynamic", clock)),
        Target(part="end-to-end", line="start-up relative to imports and loading", aim=1.3,
               read=_runs("start: ours", "start: bare", clock)),
    ]  # fmt: skip


def _of_banks() -> list[Target]:
    """What is asked of many adapters in one batch."""

    def ratio(method: str, length: str, to: str) -> Callable[[Results], float]:
        return lambda r: r["ratios"][method][length]["64"] / r["ratios"][method][length][to]

    found = []
    for length, what in (("32", "32 tokens a row"), ("1", "one generation step")):
        for method in ("mirror", "mirror r=64"):
            for to, whose, aim in (("1", "one adapter", 1.15), ("peft", "PEFT", 0.2)):
                line = f"64 adapters in a batch relative to {whose} ({method}, {what})"
                found.append(Target(part="bank", line=line, aim=aim, read=ratio(method, length, to)))
    found.append(Target(part="bank", line="1,000 adapters of a BERT-base at full rank, GB", aim=0.3,
                        read=lambda r: r["memory"]["tensors"] / 1e9))  # fmt: skip
    return found


def _of_trainings() -> list[Target]:
    """What is asked of whole trainings on a GPU."""

    def ratio(key: str) -> Callable[[Results], float]:
        return lambda r: r["commands"]["mirror-scale r=64, bf16"][key] / r["commands"][f"{REFERENCE}, bf16"][key]

    line = "of a training at rank 64 in bf16 relative to LoRA"
    return [
        Target(part="precisions", line=f"step {line}", aim=1.0, read=ratio("median_step_seconds")),
        Target(part="precisions", line=f"peak memory {line}", aim=1.0, read=ratio("peak_memory_bytes")),
    ]


def targets(device: str, clock: str) -> list[Target]:
    """All that is asked of runs on a device; runs are compared by ``clock``, ``wall`` or ``cpu``."""
    if device == "cuda":
        found = [
            *_of_trainings(),
            Target(part="peak-8b", line="peak memory of an 8B-shaped model at rank 128 relative to LoRA r=8", aim=1.0,
                   read=lambda r: r["peaks"]["mirror r=128"] / r["peaks"][REFERENCE]),
            Target(part="peak-8b", line="the same in GB, on one GPU", aim=80.0,
                   read=lambda r: r["peaks"]["mirror r=128"] / 1e9),
        ]  # fmt: skip
        for name in PARTS[device]:
            if name.startswith("methods"):
                where = name.removeprefix("methods-").replace("-", ", ") + " tokens a row"
                found += [*_of_steps(name, where), _of_full_rank(name, where, 1.05)]
        return found + _of_runs(clock)
    exact = {"residual": 1e-12, "orthogonality": 1e-8}
    return [
        *_of_steps("methods", "1,024 tokens"),
        *_of_steps("steps-256", "256 tokens")[:2],
        _of_full_rank("steps-1024", "1,024 tokens", 1.05),
        _of_full_rank("steps-4096", "4,096 tokens", 1.0),
        *_of_runs(clock),
        *_of_banks(),
        Target(part="factorise", line="factorising 72 matrices of a BERT-base on these cores, seconds", aim=15.0,
               read=lambda r: r["whole"]["seconds"] * r["whole"]["of"] / r["whole"]["count"]),
        *(Target(part="factorise", line=f"their {name}, ill-conditioned ones included", aim=aim,
                 read=lambda r, name=name: r["ways"]["gesdd"][name]) for name, aim in exact.items()),  # type: ignore[misc]
    ]  # fmt: skip


def read_results(folder: Path, device: str) -> dict[str, Results]:
    """``results.json`` of every part that has been run, by the part's name."""
    found = {}
    for name, part in PARTS[device].items():
        path = folder / part.folder / "results.json"
        if path.is_file():
            found[name] = json.loads(path.read_text(encoding="utf-8"))
    return found


def table(rows: list[list[str]], remarks: list[str]) -> str:
    """In Markdown."""
    lines = ["| quantity | target | measured | |", "|---|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows), ""]
    return "\n".join([*lines, *remarks]) + "\n"
