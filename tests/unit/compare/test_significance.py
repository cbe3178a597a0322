# SPDX-License-Identifier: Apache-2.0
"""The paired tests: known values, and how often they cry wolf."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from mirrortune.compare.significance import Paired, Sample, bootstrap_interval, compare_with_reference, holm
from mirrortune.errors import ConfigError
from mirrortune.tasks.metrics import METRICS

ACCURACY = METRICS["accuracy"].compute


def sample(skill: float, *, rows: int, seeds: int, seed: int) -> Sample:
    """Predictions that are right with probability ``skill``; the references are the same in every sample."""
    references = np.random.default_rng(99).integers(2, size=rows)
    random = np.random.default_rng(seed)
    predictions = [np.where(random.random(rows) < skill, references, 1 - references) for _ in range(seeds)]
    values = tuple(float(np.mean(p == references)) for p in predictions)
    return Sample(values=values, predictions=tuple(predictions), references=(references,) * seeds)


def against(skill: float, base_skill: float, *, seed: int = 0, rows: int = 500, seeds: int = 5) -> Paired:
    """One method against a reference of another skill."""
    samples = {
        "base": sample(base_skill, rows=rows, seeds=seeds, seed=2 * seed),
        "other": sample(skill, rows=rows, seeds=seeds, seed=2 * seed + 1),
    }
    return compare_with_reference(samples, "base", ACCURACY, higher_is_better=True)[0]


def test_holm_equals_the_textbook() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, None, 0.9]) == pytest.approx([1.0, None, 1.0])
    assert holm([]) == []


def test_the_t_test_is_scipys() -> None:
    import scipy.stats

    base, other = (0.70, 0.72, 0.69, 0.73), (0.74, 0.73, 0.72, 0.77)
    found = compare_with_reference(
        {"base": Sample(values=base), "other": Sample(values=other)}, "base", ACCURACY, higher_is_better=True
    )[0]
    assert found.p_value == pytest.approx(scipy.stats.ttest_rel(other, base).pvalue)
    assert found.difference == pytest.approx(np.mean(other) - np.mean(base))
    assert (found.low, found.high) == (None, None)


def test_a_real_difference_is_found_in_both_directions() -> None:
    assert against(0.85, 0.70).verdict == "better"
    assert against(0.70, 0.85).verdict == "worse"


def test_a_lower_error_is_better() -> None:
    samples = {"base": Sample(values=(1.0, 1.1, 1.05)), "other": Sample(values=(0.5, 0.61, 0.54))}
    assert compare_with_reference(samples, "base", ACCURACY, higher_is_better=False)[0].verdict == "better"


def test_noise_is_called_noise() -> None:
    # Twenty comparisons of equals: at most a few may be taken for a difference, whatever their p-values look like.
    verdicts = [against(0.75, 0.75, seed=seed, rows=200).verdict for seed in range(20)]
    assert verdicts.count("better") + verdicts.count("worse") <= 2
    assert verdicts.count("within the noise") >= 16


def test_one_seed_proves_nothing() -> None:
    found = against(0.9, 0.5, seeds=1)
    assert (found.p_value, found.low, found.verdict) == (None, None, "not tested")


@pytest.mark.parametrize("changed", ["rows", "references", "order", "seeds", "predictions"])
def test_methods_that_were_scored_on_other_rows_are_not_tested(changed: str) -> None:
    base, other = sample(0.7, rows=30, seeds=3, seed=0), sample(0.9, rows=30, seeds=3, seed=1)
    assert base.references is not None
    assert other.predictions is not None
    last = {"rows": base.references[2][:6], "references": 1 - base.references[2], "order": base.references[2][::-1]}
    if changed == "predictions":
        other = dataclasses.replace(other, predictions=(*other.predictions[:2], other.predictions[2][:6]))
    elif changed == "seeds":
        other = Sample(values=other.values[:1])
    else:
        other = dataclasses.replace(other, references=(*base.references[:2], last[changed]))
    with pytest.raises(ConfigError, match="'other' cannot be tested against 'base': "):
        compare_with_reference({"base": base, "other": other}, "base", ACCURACY, higher_is_better=True)


def test_missing_numbers_among_the_references_are_the_same() -> None:
    rows = np.array([0.5, np.nan, 1.0])
    same = Sample(values=(0.5, 0.6), predictions=(rows, rows), references=(rows, rows.copy()))
    found = compare_with_reference({"base": same, "other": same}, "base", lambda *_: 0.0, higher_is_better=True)
    assert found[0].verdict == "within the noise"


def test_equal_scores_are_no_difference() -> None:
    same = Sample(values=(0.5, 0.6, 0.7))
    found = compare_with_reference({"base": same, "other": same}, "base", ACCURACY, higher_is_better=True)[0]
    assert (found.p_value, found.verdict) == (1.0, "not significant")


def of_seeds(*scores: float) -> Sample:
    """Seeds with these scores by ``average_prediction``, whatever rows are drawn."""
    rows = tuple(np.full(4, score) for score in scores)
    return Sample(values=scores, predictions=rows, references=(np.zeros(4),) * len(scores))


def average_prediction(predictions: Any, _: Any) -> float:
    """A metric."""
    return float(predictions.mean())


def test_a_difference_that_only_the_correction_makes_insignificant_is_not_called_noise() -> None:
    samples = {"base": of_seeds(0.5, 0.5, 0.5), "one": of_seeds(0.55, 0.57, 0.59), "two": of_seeds(0.55, 0.57, 0.59)}
    for found in compare_with_reference(samples, "base", average_prediction, higher_is_better=True):
        assert found.low is not None
        assert found.low > 0
        assert found.p_value is not None
        assert found.p_adjusted is not None
        assert found.p_value < 0.05 < found.p_adjusted
        assert found.verdict == "not significant"


@pytest.mark.parametrize("gaps", [(0.01, 0.03), (0.01, 0.04, -0.02), (0.01, 0.02, 0.03, 0.01, 0.05)])
def test_over_few_seeds_the_interval_is_that_of_a_t_test(gaps: tuple[float, ...]) -> None:
    import scipy.stats

    found = bootstrap_interval(of_seeds(*gaps), of_seeds(*[0.0] * len(gaps)), average_prediction)
    assert found == pytest.approx(tuple(scipy.stats.ttest_1samp(gaps, 0).confidence_interval()), rel=0.02, abs=1e-4)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_changes_no_other_verdict(broken: float) -> None:
    assert bootstrap_interval(of_seeds(0.5, broken), of_seeds(0.5, 0.6), average_prediction) is None
    samples = {
        "base": Sample(values=(0.5, 0.6, 0.7)), "broken": Sample(values=(0.5, broken, 0.7)),
        "good": Sample(values=(0.9, 1.0, 1.101)),
    }  # fmt: skip
    found = {p.label: p for p in compare_with_reference(samples, "base", ACCURACY, higher_is_better=True)}
    assert (found["broken"].p_value, found["broken"].p_adjusted, found["broken"].verdict) == (None, None, "not tested")
    assert found["good"].p_adjusted == found["good"].p_value
    assert found["good"].verdict == "better"


def test_two_seeds_that_tie_prove_nothing_without_rows() -> None:
    def verdict(base: tuple[float, ...], other: tuple[float, ...]) -> str:
        samples = {"base": Sample(values=base), "other": Sample(values=other)}
        return compare_with_reference(samples, "base", ACCURACY, higher_is_better=True)[0].verdict

    assert verdict((0.5, 0.5), (0.502, 0.502)) == "not tested"
    assert verdict((0.1, 0.3), (0.2, 0.4)) == "not tested", "these differ by rounding"
    assert verdict((0.5,) * 3, (0.502,) * 3) == "better"


def test_the_interval_sees_that_the_rows_are_a_sample_too() -> None:
    # The same few rows, every seed the same predictions: over seeds there is no spread at all, over rows there is.
    few, many = (
        bootstrap_interval(
            Sample(values=(0.8,) * 5, predictions=(better,) * 5, references=(truth,) * 5),
            Sample(values=(0.7,) * 5, predictions=(worse,) * 5, references=(truth,) * 5),
            ACCURACY,
        )
        for rows in (20, 2000)
        for truth in [np.zeros(rows, dtype=int)]
        for better, worse in [[(np.arange(rows) % 10 >= right).astype(int) for right in (8, 7)]]
    )
    assert few is not None
    assert many is not None
    assert few[0] <= 0 < many[0] < 0.1 < many[1] < few[1]


def test_rows_that_differ_between_seeds_are_drawn_for_each_seed() -> None:
    random = np.random.default_rng(0)
    references = tuple(random.integers(2, size=40) for _ in range(3))
    right = Sample(values=(1.0,) * 3, predictions=references, references=references)
    wrong = Sample(values=(0.0,) * 3, predictions=tuple(1 - r for r in references), references=references)
    assert bootstrap_interval(right, wrong, ACCURACY) == (1.0, 1.0)


def test_ranks_that_each_model_gave_are_compared() -> None:
    better, worse = np.tile([1, 1, 2], 40), np.tile([1, 3, 4], 40)
    samples = {
        name: Sample(values=(score, score + 0.01), predictions=(np.zeros(120),) * 2, references=(ranks,) * 2)
        for name, ranks, score in (("base", worse, 0.3), ("ours", better, 0.6))
    }
    ranked = {name: own.by_ranks() for name, own in samples.items()}
    metric = METRICS["recall_at_1"]
    (found,) = compare_with_reference(ranked, "base", metric.of_ranks, higher_is_better=True)
    assert found.low is not None
    assert found.high is not None
    expected = metric.compute(better, better) - metric.compute(worse, worse)
    assert 0 < found.low < expected < found.high


def test_large_tables_of_probabilities_are_resampled_less_often() -> None:
    seen: list[int] = []

    def metric(odds: Any, _: Any) -> float:
        seen.append(len(odds))
        return float(odds[:, 0].mean())

    odds = np.zeros((4_000, 100))
    own = Sample(values=(0.0, 0.0), predictions=(odds,) * 2, references=(odds[:, 0],) * 2, kind="probabilities")
    assert bootstrap_interval(own, own, metric) == (0.0, 0.0)
    assert len(seen) == 4 * 500
