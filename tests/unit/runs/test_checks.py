# SPDX-License-Identifier: Apache-2.0
"""Settings of a run as typed values."""

from __future__ import annotations

from pathlib import Path

import pytest

from mirrortune.config.recipe import override_layer, resolve
from mirrortune.runs.checks import inputs_of, unpack, unpack_for_eval


def test_every_data_set_of_a_list_is_an_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.csv", "b.csv", "c.csv"):
        (tmp_path / name).touch()
    words = ["data.path=[a.csv#5, {path: b.csv, weight: 2, label_column: y}, hf://o/n, '[a-c].csv']"]
    resolved = resolve([override_layer([*words, "data.validation_path=c.csv"])])
    found = inputs_of(resolved)
    assert {given.what for given in found} == {"data"}
    assert sorted(given.path.name for given in found) == ["a.csv"] * 2 + ["b.csv"] * 2 + ["c.csv"] * 2
    settings = unpack_for_eval(resolved.recipe).data
    assert settings.is_mixture
    assert [source.weight for source in settings.sources] == [1, 2, 1, 1]
    assert settings.sources[1].columns == {"label_column": "y"}
    one = unpack_for_eval(resolve([override_layer(["data.path=a.csv"])]).recipe).data
    assert (one.is_mixture, one.place) == (False, settings.sources[0].place.__class__.parse("a.csv"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["task.kind=image-classification"], 1e-2),
        (["task.kind=text-classification"], 2e-2),
        (["task.kind=image-classification", "adapter.method=mirror"], 2e-2),
        (["task.kind=image-classification", "train.lr=2e-2"], 2e-2),
    ],
)
def test_the_default_rate_depends_on_the_kind_of_task(words: list[str], expected: float) -> None:
    recipe = resolve([override_layer(["model.name=m", "data.path=rows", *words])]).recipe

    assert unpack(recipe).loop.lr == expected
