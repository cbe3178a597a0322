# SPDX-License-Identifier: Apache-2.0
"""What the runs of ``tests/bench/real.py`` say of published claims: contrasts of methods, and spectra of adapters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from mirrortune.compare.grid import lr_folder, slug
from tests.bench.real_report import SEEDS

Found = dict[str, dict[str, Any]]
CONTRASTS = (
    ("mirror", "neighbor"), ("mirror", "random"), ("adaptive", "mirror"), ("mirror", "svft"), ("mirror", "lora:rank=1"),
    ("mirror:unit=angle", "neighbor:unit=angle"), ("mirror:unit=angle", "random:unit=angle"),
    ("mirror:unit=angle", "mirror"), ("mirror:unit=angle", "svft"), ("mirror:unit=angle", "lora:rank=1"),
    ("mirror:scale_top_k=all", "mirror"), ("mirror:scale_top_k=all", "scale"), ("mirror:scale_top_k=all", "svft"),
    ("adaptive:scale_top_k=all", "mirror:scale_top_k=all"), ("mirror:scale_top_k=all", "lora:rank=8"),
    ("adaptive:scale_top_k=all:unit=weight", "mirror-scale"), ("mirror-scale", "mirror:scale_top_k=all"),
    ("mirror-scale", "mirror"), ("mirror-scale", "scale"), ("mirror-scale", "svft"), ("mirror-scale", "road"),
    ("mirror-scale", "lora:rank=1"), ("mirror-scale", "lora:rank=8"), ("mirror-scale", "full"),
    ("svft", "lora:rank=8"), ("lora-sb", "svft"), ("lora-sb", "lora:rank=8"), ("psoft", "lora:rank=1"),
    ("psoft", "lora:rank=8"), ("mirror-scale", "psoft"),
)  # fmt: skip
"""Pairs of methods that the claims compare: the first is said to be ahead."""


def gaps(task: dict[str, Any], first: str, second: str) -> list[float]:
    """Return the difference of two methods' scores, times 100, for every seed that both have finished."""
    methods = task["methods"]
    if first not in methods or second not in methods:
        return []
    split = task["splits"][-1]
    own = [
        dict(zip(methods[m]["seeds"], methods[m]["reported"][split]["values"], strict=True)) for m in (first, second)
    ]
    return [100 * (own[0][seed] - own[1][seed]) for seed in sorted(own[0].keys() & own[1].keys())]


def contrasts(found: Found) -> str:
    """Return a table in Markdown: the mean difference on every task, and that over tasks with its test."""
    import scipy.stats

    lines = [f"| first - second | {' | '.join(found)} | tasks ahead | mean of tasks | p |",
             "|" + "---|" * (len(found) + 4)]  # fmt: skip
    for first, second in CONTRASTS:
        by_task = [gaps(task, first, second) for task in found.values()]
        means = [fmean(own) for own in by_task if len(own) >= SEEDS]
        if not means:
            continue
        cells = [f"{fmean(own):+.1f} ({len(own)})" if own else "" for own in by_task]
        ahead = f"{sum(mean > 0 for mean in means)} of {len(means)}"
        mean, p = f"{fmean(means):+.1f}", ""
        if len(means) > 2 and len(set(means)) > 1:
            tested = scipy.stats.ttest_1samp(means, 0.0)
            low, high = tested.confidence_interval()
            mean, p = f"{mean} [{low:+.1f}, {high:+.1f}]", f"{tested.pvalue:.2g}"
        lines.append(f"| `{first}` - `{second}` | {' | '.join(cells)} | {ahead} | {mean} | {p} |")
    lines += ["", "Difference in score, times 100, between runs with the same task and seed; (n): number of seeds. "
              "The last three columns leave out tasks with fewer than three seeds. From three tasks on, the mean over "
              "tasks has its 95% confidence interval, and p is that of a two-sided t-test over the tasks' means, not "
              "corrected for the number of contrasts."]  # fmt: skip
    return "\n".join(lines) + "\n"


def spectra(found: Found, folder: Path, task: str) -> str:
    """Return a table in Markdown: what ``mirrortune analyze`` says of the first run of every method on a task.

    Args:
        found: finished comparisons.
        folder: of the comparisons; gets what was analysed, in ``spectra``.
        task: one of them.
    """
    lines = ["| method | change | amplified | re-oriented | new | top σ | tail σ | turned | top σ amplified |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for method, own in found[task]["methods"].items():
        if not own["trainable_parameters"]:
            continue
        cells = folder / task / "cells"
        (run,) = cells.glob(f"*/{slug(own['label'])}/{lr_folder(own['lr'])}/seed-{own['seeds'][0]}")
        seen = analysed(run, folder / "spectra" / f"{task}-{slug(method)}.json")
        overall, values = seen["overall"], seen["overall"]["value_change"]
        shares = [f"{100 * overall['shares'][name]:.1f}%" for name in ("amplification", "reorientation", "new")]
        # A rotation alone changes no singular value but by rounding, which has no direction.
        amplified = f"{100 * seen['amplified']:.0f}%" if abs(values["top"]) > 1e-6 else ""
        lines.append(
            f"| `{method}` | {100 * overall['relative']:.1f}% | {' | '.join(shares)} | {100 * values['top']:+.2f}% "
            f"| {100 * values['tail']:+.2f}% | {overall['turned']:.1f}° | {amplified} |"
        )
    lines += ["", f"`mirrortune analyze` of the run with the first seed on {task}: size of the change by the norm of "
              "the weights, and its parts; median change of the 16 largest and of the smaller half of singular values, "
              "median angle of the leading subspace; matrices whose top singular values grow most."]  # fmt: skip
    return "\n".join(lines) + "\n"


def analysed(run: Path, file: Path) -> dict[str, Any]:
    """Return what ``analyze`` finds over all matrices of a run, kept in ``file``."""
    if not file.is_file():
        words = [sys.executable, "-m", "mirrortune", "analyze", str(run), "--json"]
        seen = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout)
        file.parent.mkdir(exist_ok=True)
        kept = {"overall": seen["overall"], "amplified": seen["claims"][0]["agreeing"]}
        file.write_text(json.dumps(kept) + "\n", encoding="utf-8")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found
