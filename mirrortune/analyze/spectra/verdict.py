# SPDX-License-Identifier: Apache-2.0
"""Summarise an analysis in sentences.

They say what the change mostly consists of, whether published findings for full fine-tuning hold, and which method
could have made the change. Criteria are stated with their results.

The four claims are findings of "Weight Spectra Induced Efficient Model Adaptation" (arXiv 2505.23099), operationalised
with mirrortune's own measures and thresholds, because only the paper's summary is public.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mirrortune.analyze.spectra.spectra import MatrixComparison
from mirrortune.analyze.spectra.summary import SHARES, Curve, MatrixGroup, mean_turn, middle

# Sizes at which methods are compared, as shares of the number of weights in the analysed matrices.
BUDGETS = (0.0003, 0.001, 0.01, 0.1)
_WORDS = {"amplification": "amplification", "reorientation": "re-orientation", "new": "new directions"}
_AGREE = 0.75
_ROUNDING = 1e-6
"""Change of a sum of singular values or of a subspace, relative to itself, that may be the rounding of float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A published finding, tested on two checkpoints.

    Attributes:
        text: text of the finding.
        criterion: condition under which the finding holds for a matrix.
        evidence: measured values as text.
        agreeing: share of the changed matrices for which it holds, or None.
        holds: whether ``agreeing`` is at least 3/4; None if nothing can be measured.
    """

    text: str
    criterion: str
    evidence: str
    agreeing: float | None
    holds: bool | None


def claims(found: Sequence[MatrixComparison]) -> list[Claim]:
    """Test the four claims on the matrices that changed."""
    # Very small matrices have no middle and tail.
    usable = [c for c in found if {"top", "middle", "tail"} <= set(c.value_change) and "tail" in c.kept]
    if not usable:
        return []

    def value(group: str, *, size: bool = False) -> float:
        return middle(usable, lambda c: (c.value_change_size if size else c.value_change)[group])

    def kept(group: str) -> float:
        return middle(usable, lambda c: c.kept[group])

    return [
        _claim(
            "the top singular values are amplified",
            "their sum grows by more than rounding, and by a larger share than the middle's and the tail's",
            f"top {value('top'):+.2%}, middle {value('middle'):+.2%}, tail {value('tail'):+.2%} (medians)",
            usable,
            lambda c: c.value_change["top"] > max(_ROUNDING, c.value_change["middle"], c.value_change["tail"]),
        ),
        _claim(
            "the other singular values are nearly unchanged",
            "they move by less than 1% of their sum, in the middle and in the tail",
            f"middle {value('middle', size=True):.2%}, tail {value('tail', size=True):.2%}, "
            f"top {value('top', size=True):.2%} (medians)",
            usable,
            lambda c: max(c.value_change_size["middle"], c.value_change_size["tail"]) < 0.01,
        ),
        _claim(
            "the dominant singular vectors are re-oriented",
            "the top subspace keeps less of itself than the tail half does, by more than rounding",
            f"top vectors turned by {middle(usable, mean_turn):.2f} degrees; of the subspaces stayed: "
            f"top {kept('top'):.2%}, tail {kept('tail'):.2%} (medians)",
            usable,
            lambda c: c.kept["tail"] - c.kept["top"] > _ROUNDING,
        ),
        _claim(
            "the non-dominant subspace is stable",
            "the tail half keeps at least 95% of itself",
            f"kept {kept('tail'):.2%}; change relative to what it meets: "
            f"top {middle(usable, lambda c: c.block_change.get('top')):.2%}, "
            f"rest {middle(usable, lambda c: c.block_change.get('rest')):.2%} (medians)",
            usable,
            lambda c: c.kept["tail"] >= 0.95,
        ),
    ]


def _claim(
    text: str,
    criterion: str,
    evidence: str,
    usable: Sequence[MatrixComparison],
    test: Callable[[MatrixComparison], bool],
) -> Claim:
    agreeing = sum(map(test, usable)) / len(usable)
    return Claim(text=text, criterion=criterion, evidence=evidence, agreeing=agreeing, holds=agreeing >= _AGREE)


def verdict(
    group: MatrixGroup, found: Sequence[MatrixComparison], curves: dict[str, Curve], num_weights: int
) -> list[str]:
    """Return the verdict as sentences.

    Args:
        group: summary of all matrices.
        found: comparisons of the matrices that changed.
        curves: captured energy of each method.
        num_weights: number of weights in the matrices that changed.
    """
    if group.shares is None:
        return [f"Nothing changed in {group.matrices} matrices."]
    shares = group.shares
    first = max(SHARES, key=lambda name: shares[name])
    kind = f"mostly {_WORDS[first]}" if shares[first] >= 0.5 else "a mixture"
    parts = ", ".join(f"{shares[name]:.0%} {_WORDS[name]}" for name in SHARES)
    ranks = middle(found, lambda c: c.delta["rank_90"] / min(c.shape))
    lines = [
        f"{group.changed} of {group.matrices} matrices changed, by {group.relative:.2%} of their norm. "
        f"The change is {kind}: {parts}.",
        f"It has a stable rank of {group.stable_rank:.1f} (median); 90% of its energy takes {ranks:.0%} of the "
        f"directions. The base's leading directions hold {group.top_energy:.1f} times what chance would put there.",
    ]
    return [*lines, *_best_methods(curves, num_weights)]


def _best_methods(curves: dict[str, Curve], num_weights: int) -> list[str]:
    small = {name: curve for name, curve in curves.items() if name != "full"}
    found = []
    for budget in BUDGETS:
        scores = {n: s for n, c in small.items() if (s := c.at(budget * num_weights)) is not None}
        if scores:
            best = max(scores, key=lambda n: (scores[n][1], -scores[n][0]))
            found.append(f"{best} with {scores[best][0]:,} ({scores[best][1]:.1%})")
    if not found:
        return []
    return [f"Largest share of the change by number of trainable parameters: {'; '.join(dict.fromkeys(found))}."]
