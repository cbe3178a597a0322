# SPDX-License-Identifier: Apache-2.0
"""Summarise the comparisons of many matrices by kind, by depth, and by what each method could have captured.

Shares are averaged with the energy ||Delta||^2 of each matrix's change as weight; other values are medians over
matrices.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from mirrortune.analyze.spectra.approximations import Approximation
from mirrortune.analyze.spectra.spectra import MatrixComparison

SHARES = ("amplification", "reorientation", "new")
GROUPS = ("top", "middle", "tail")


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysed:
    """A matrix that two checkpoints share.

    Attributes:
        name: name of the weight in the base checkpoint.
        kind: name within a layer, such as ``attention.self.query``; the same at every depth.
        depth: index of its layer, or None outside the layers.
        shape: shape of the matrix, (O, I).
        comparison: comparison of both versions, or None if the matrix did not change, but for ``rounding``.
        angles: plane angles in degrees if the tuned side is an adapter that rotates planes, else None.
        rounding: energy of rounding the base's weight to the dtype of the tuned one; 0 if that is as precise.
    """

    name: str
    kind: str
    depth: int | None
    shape: tuple[int, int]
    comparison: MatrixComparison | None
    angles: list[float] | None = None
    rounding: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixGroup:
    """The summary of all matrices, or of those of one kind or depth.

    If no matrix changed, ``shares``, ``value_change``, ``turned``, ``stable_rank`` and ``top_energy`` are None.

    Attributes:
        matrices: number of matrices.
        changed: number of matrices that changed.
        relative: ||Delta|| / ||W|| over all matrices.
        shares: shares of amplification, reorientation and new directions in the change.
        value_change: median relative change of singular values in the top, middle and tail.
        turned: median angle of the top directions in degrees, averaged over both sides.
        stable_rank: median stable rank of the change.
        top_energy: median energy of the change in the top directions of the base as a multiple of chance, averaged over
            output and input directions.
        num_new: number of new directions.
    """

    matrices: int
    changed: int
    relative: float
    shares: dict[str, float] | None
    value_change: dict[str, float] | None
    turned: float | None
    stable_rank: float | None
    top_energy: float | None
    num_new: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """The energy that a method captures at each size, over all matrices.

    Attributes:
        sizes: ranks, numbers of directions, or numbers of bands.
        parameters: number of trained parameters at each size.
        captured: captured share of the change's energy at each size, from 0 to 1.
    """

    sizes: list[int]
    parameters: list[int]
    captured: list[float]

    def at(self, budget: float) -> tuple[int, float] | None:
        """Return (parameters, captured) of the best size within ``budget`` parameters, or None if all are larger."""
        fitting = [(c, -p) for p, c in zip(self.parameters, self.captured, strict=True) if p <= budget]
        best = max(fitting, default=None)
        return None if best is None else (-best[1], best[0])


def changed(matrices: Iterable[Analysed]) -> list[MatrixComparison]:
    """Return the comparisons of the matrices that changed."""
    return [m.comparison for m in matrices if m.comparison is not None]


def summarise(matrices: Sequence[Analysed], base_energy: dict[str, float]) -> MatrixGroup:
    """Summarise a group of matrices.

    Args:
        matrices: matrices of the group.
        base_energy: ||W||^2 of each matrix by name.
    """
    found = changed(matrices)
    total = sum(c.energy for c in found)
    weight = sum(base_energy[m.name] for m in matrices)
    if not found:
        return MatrixGroup(matrices=len(matrices), changed=0, relative=0.0, shares=None, value_change=None, turned=None,
                     stable_rank=None, top_energy=None, num_new=0)  # fmt: skip
    return MatrixGroup(
        matrices=len(matrices),
        changed=len(found),
        relative=(total / weight) ** 0.5 if weight else float("nan"),
        shares={name: sum(c.shares[name] * c.energy for c in found) / total for name in SHARES},
        value_change={
            name: middle(found, lambda c, name=name: c.value_change.get(name))  # type: ignore[misc]
            for name in GROUPS
            if any(name in c.value_change for c in found)
        },
        turned=middle(found, mean_turn),
        stable_rank=middle(found, lambda c: c.delta["stable_rank"]),
        top_energy=middle(found, top_energy),
        num_new=sum(c.num_new for c in found),
    )


def by(matrices: Sequence[Analysed], key: Callable[[Analysed], str]) -> dict[str, list[Analysed]]:
    """Group matrices by a key, in order of first appearance."""
    groups: dict[str, list[Analysed]] = {}
    for matrix in matrices:
        groups.setdefault(key(matrix), []).append(matrix)
    return groups


def middle(found: Sequence[MatrixComparison], value: Callable[[MatrixComparison], float | None]) -> float:
    """Return the median of ``value`` over the comparisons for which it is not None."""
    return median(v for c in found if (v := value(c)) is not None)


def mean_turn(comparison: MatrixComparison) -> float:
    """Return the mean angle of the top directions over both sides, in degrees."""
    angles = [*comparison.turned["output"], *comparison.turned["input"]]
    return sum(angles) / len(angles)


def top_energy(comparison: MatrixComparison) -> float:
    """Return the energy of the change in the leading subspace of the base as a multiple of chance.

    It is averaged over both sides, for the largest reported subspace size up to the top k.
    """
    size = max((k for k in comparison.subspace_energy if k <= comparison.top_k), default=1)
    share = comparison.subspace_energy[size]
    return (share["output"] / share["output_chance"] + share["input"] / share["input_chance"]) / 2


def curves(found: Sequence[MatrixComparison]) -> dict[str, Curve]:
    """Sum the curve of each method over all matrices; beyond its largest size, a matrix counts with that size."""
    total = sum(c.energy for c in found)
    by_method: dict[str, list[dict[int, Approximation]]] = {}
    for comparison in found:
        own: dict[str, dict[int, Approximation]] = {}
        for a in comparison.approximations:
            own.setdefault(a.method, {})[a.size] = a
        for method, sized in own.items():
            by_method.setdefault(method, []).append(sized)
    result = {}
    for method, entries in by_method.items():
        # "full" has a single size, which differs between matrices.
        wanted = [max(max(e) for e in entries)] if method == "full" else sorted({s for e in entries for s in e})
        points = [_sum_at(entries, size) for size in wanted]
        result[method] = Curve(
            sizes=wanted, parameters=[p for p, _ in points], captured=[min(1.0, c / total) for _, c in points]
        )
    return result


def _sum_at(entries: list[dict[int, Approximation]], size: int) -> tuple[int, float]:
    chosen = [e[max(fits)] for e in entries if (fits := [s for s in e if s <= size])]
    return sum(a.parameters for a in chosen), sum(a.captured for a in chosen)


def name_kinds(names: Iterable[str]) -> dict[str, tuple[str, int | None]]:
    """Derive the kind and depth of each weight from the numbers in its name, without knowledge of model families.

    The first number is the depth and the part after it the kind; a name without a number is a kind as it stands. In a
    kind, further numbers become ``*``, and leading parts are dropped as long as no other kind has the same ending.
    """
    parsed = {}
    for name in names:
        words = name.removesuffix(".weight").split(".")
        place = next((i for i, word in enumerate(words) if word.isdigit()), None)
        rest = words if place is None else words[place + 1 :]
        rest = [re.sub(r"^\d+$", "*", word) for word in rest] or words[:1]
        parsed[name] = (tuple(rest), None if place is None else int(words[place]))
    kinds = {rest for rest, _ in parsed.values()}
    short = {kind: _shortest(kind, kinds - {kind}) for kind in kinds}
    return {name: (short[rest], depth) for name, (rest, depth) in parsed.items()}


def _shortest(kind: tuple[str, ...], others: set[tuple[str, ...]]) -> str:
    for length in range(1, len(kind)):
        ending = kind[-length:]
        if ending[0] != "*" and not any(other[-length:] == ending for other in others):
            return ".".join(ending)
    return ".".join(kind)
