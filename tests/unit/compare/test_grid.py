# SPDX-License-Identifier: Apache-2.0
"""What a comparison runs next: learning rates on their ladder, the grid's edge, seeds, and nothing twice."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirrortune.compare.grid import (
    Cell,
    ChooseBy,
    Chosen,
    Contender,
    Grid,
    Score,
    around,
    choose,
    lr_folder,
    make_grid,
    next_cells,
    parse_contender,
    parse_lrs,
    shown_lr,
    slug,
    step_from,
)
from mirrortune.compare.run import Comparison
from mirrortune.config.recipe import flatten, override_layer, resolve
from mirrortune.config.schema import Recipe
from mirrortune.errors import ConfigError
from mirrortune.system.console import Reporter


def grid(*labels: str, seeds: int = 3, tune_seeds: int = 1, extensions: int = 2) -> Grid:
    """One task, the given methods, learning rates 1e-3, 3e-3 and 1e-2."""
    contenders = tuple(
        Contender(label=label, settings={}, lr_key="train.lr", lrs=(1e-3, 3e-3, 1e-2)) for label in labels or ("a",)
    )
    seeds_, tuning = tuple(range(seeds)), tuple(range(tune_seeds))
    return Grid(tasks=("t",), contenders=contenders, seeds=seeds_, tune_seeds=tuning, extensions=extensions)


def run_all(made: Grid, quality: Callable[[Cell], Score]) -> tuple[list[Cell], Callable[[Cell], Score | None]]:
    """Run a comparison one cell at a time; returns the cells in order, and their scores."""
    done: dict[Cell, Score] = {}
    while todo := next_cells(made, done.get):
        assert todo[0] not in done
        done[todo[0]] = quality(todo[0])
        assert len(done) < 1000
    return list(done), done.get


def outcome(made: Grid, quality: Callable[[Cell], Score]) -> tuple[list[Cell], Chosen]:
    """The cells that were run for the first method, and what was chosen."""
    cells, score = run_all(made, quality)
    return cells, choose(made, "t", made.contenders[0], score)


def peak(at: float) -> Callable[[Cell], Score]:
    """A quality that is best at one learning rate."""
    return lambda cell: (-abs(math.log(cell.lr / at)), 0.0)


def test_the_best_rate_inside_the_grid_gets_all_seeds() -> None:
    cells, chosen = outcome(grid(), peak(3e-3))
    assert (chosen.lr, chosen.is_at_edge, chosen.missing) == (3e-3, False, ())
    assert sorted(cells) == sorted(
        [Cell("t", "a", lr, 0) for lr in (1e-3, 3e-3, 1e-2)] + [Cell("t", "a", 3e-3, seed) for seed in (1, 2)]
    )


@pytest.mark.parametrize(("at", "chosen_lr"), [(3e-2, 3e-2), (3e-4, 3e-4), (1e-2, 1e-2), (1e-3, 1e-3)])
def test_the_grid_grows_while_its_edge_is_best(at: float, chosen_lr: float) -> None:
    cells, chosen = outcome(grid(), peak(at))
    assert (chosen.lr, chosen.is_at_edge) == (chosen_lr, False)
    assert len([c for c in cells if c.seed == 0]) in (4, 5)


@pytest.mark.parametrize(("given", "at", "tried"), [
    ((1e-2, 2e-2), 2.4e-2, {1e-2, 2e-2, 3e-2}), ((1.5e-2, 3e-2), 1.3e-2, {1e-2, 1.5e-2, 3e-2}),
    ((5e-5,), 5e-5, {3e-5, 5e-5, 1e-4}),
])  # fmt: skip
def test_the_grid_grows_by_the_next_rate_of_the_ladder(given: tuple[float, ...], at: float, tried: set[float]) -> None:
    made = grid()
    made = dataclasses.replace(made, contenders=(dataclasses.replace(made.contenders[0], lrs=given),))
    cells, _ = outcome(made, peak(at))
    assert {cell.lr for cell in cells} == tried


def test_the_grid_stops_growing_and_says_so() -> None:
    chosen = outcome(grid(extensions=2), peak(1e3))[1]
    assert (chosen.lr, chosen.is_at_edge) == (1e-1, True)
    assert outcome(grid(extensions=0), peak(1e3))[1].lr == 1e-2


def test_a_tie_goes_to_the_lower_loss_then_to_the_lower_rate() -> None:
    assert outcome(grid(extensions=0), lambda c: (0.5, -1.0 if c.lr == 3e-3 else -2.0))[1].lr == 3e-3
    assert outcome(grid(extensions=0), lambda c: (0.5, -1.0))[1].lr == 1e-3


@pytest.mark.parametrize(("choose_by", "chosen"), [("score", 1e-3), ("loss", 1e-2)])
def test_the_loss_judges_if_asked_to(tmp_path: Path, choose_by: ChooseBy, chosen: float) -> None:
    made = dataclasses.replace(grid(extensions=0), choose_by=choose_by)
    comparison = Comparison(root=tmp_path, grid=made, recipes={}, reporter=Reporter())
    for lr, accuracy, loss in ((1e-3, 0.8, 0.5), (3e-3, 0.7, 0.6), (1e-2, 0.7, 0.4)):
        folder = Cell("t", "a", lr, 0).folder(tmp_path)
        folder.mkdir(parents=True)
        found = {"selection_metric": "accuracy", "metrics": {"accuracy": accuracy, "loss": loss}}
        (folder / "results.json").write_text(json.dumps(found))
    assert choose(made, "t", made.contenders[0], comparison.score).lr == chosen
    (folder / "results.json").write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        comparison.score(Cell("t", "a", 1e-2, 0))


def test_a_rate_that_diverges_is_never_chosen() -> None:
    def quality(cell: Cell) -> Score:
        return (-math.inf, -math.inf) if cell.lr > 2e-3 else (0.1, -5.0)

    _, chosen = outcome(grid(extensions=0), quality)
    assert chosen.lr == 1e-3


def test_several_tuning_seeds_are_averaged() -> None:
    # Lucky once: the first seed alone would choose 1e-2.
    def quality(cell: Cell) -> Score:
        return (1.0 if cell.lr == 1e-2 and cell.seed == 0 else 0.9 if cell.lr == 3e-3 else 0.0, 0.0)

    assert outcome(grid(tune_seeds=3), quality)[1].lr == 3e-3
    assert outcome(grid(tune_seeds=1, extensions=0), quality)[1].lr == 1e-2


@given(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, unique=True), st.integers(1, 4), st.integers(0, 3),
       st.floats(1e-5, 1), st.data())  # fmt: skip
def test_stopping_anywhere_changes_nothing(
    labels: list[str], seeds: int, extensions: int, at: float, data: st.DataObject
) -> None:
    made = grid(*labels, seeds=seeds, extensions=extensions)
    cells, _ = run_all(made, peak(at))
    # Whatever finished so far, and in whatever order, the rest of the same cells is run and no other.
    kept = data.draw(st.sets(st.sampled_from(cells)))
    done = {cell: peak(at)(cell) for cell in kept}
    while todo := next_cells(made, done.get):
        done |= {cell: peak(at)(cell) for cell in todo}
    assert set(done) == set(cells)


@given(st.floats(1e-9, 1e3))
def test_the_ladder_of_rates(lr: float) -> None:
    nearest = step_from(lr, 0)
    assert 1 / 1.9 < nearest / lr < 1.9
    assert f"{nearest:.0e}"[0] in "13"
    assert around(nearest) == (step_from(lr, -1), nearest, step_from(lr, 1))
    low, middle, high = around(lr)
    assert low < middle == lr < high
    assert {low, high} <= {step_from(lr, step) for step in (-1, 0, 1)}


def test_methods_are_read_with_their_settings() -> None:
    found = parse_contender("lora-xs:rank=8:train.epochs=2:lr=1e-2/3e-3", base_head_lr=1e-3)
    assert found.settings == {"adapter.method": "lora-xs", "adapter.rank": 8, "train.epochs": 2}
    assert (found.lr_key, found.lrs) == ("train.lr", (3e-3, 1e-2))
    scaled = parse_contender("mirror:scale_top_k=all", base_head_lr=1e-3)
    assert scaled.settings["adapter.options.scale_top_k"] == "all"
    assert scaled.lrs == (1e-2, 2e-2, 3e-2)


def test_the_head_alone_is_tuned_by_its_own_rate() -> None:
    found = parse_contender("none", base_head_lr=5e-3)
    assert (found.lr_key, found.lrs) == ("train.head_lr", (3e-3, 5e-3, 1e-2))
    assert parse_contender("full", base_head_lr=5e-3).lr_key == "train.lr"
    assert parse_contender("full", base_head_lr=5e-3, lr_grid="1e-5,1e-4").lrs == (1e-5, 1e-4)


@pytest.mark.parametrize("text", ["", "a", "1e-3,-1", "0", "nan", "inf", "1e-3//1"])
def test_bad_rates_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="learning rates"):
        parse_lrs(text)


def test_all_problems_of_the_methods_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        make_grid({"t": Recipe()}, "miror,svft:bands,mirror,mirror", seeds=2, tune_seeds=3, lr_grid=None, extensions=1)
    said = str(error.value)
    for part in ("Did you mean 'mirror'", "'bands' in 'svft:bands'", "mirror named twice", "--tune-seeds: got 3"):
        assert part in said


def test_every_cell_has_a_folder_of_its_own() -> None:
    rates = (1e-3, 3e-3, 1e-2, 0.011, 0.014, math.nextafter(1e-2, 1))
    cells = [Cell("glue/rte", label, lr, seed) for label in ("a:b=1", "a") for lr in rates for seed in (0, 1)]
    assert len({cell.folder(Path()) for cell in cells}) == len(cells)
    assert [lr_folder(lr) for lr in (1e-5, 0.03, 1.0, 30.0)] == ["lr-1e-05", "lr-3e-02", "lr-1e+00", "lr-3e+01"]
    assert slug("lora:rank=8") == "lora-rank-8"


SCORED = [
    key
    for key in flatten(Recipe())
    if key.startswith(("model.", "task.", "data.", "eval.")) and key != "model.trust_remote_code"
]


@pytest.mark.parametrize("key", SCORED)
def test_methods_differ_in_nothing_that_changes_what_is_scored(key: str) -> None:
    # Those named here train or compute otherwise and are scored on the same rows, references and metrics.
    own = {
        "model": "attention dropout dtype load_in",
        "data": "augment blank_text contained image_size max_seconds max_train_rows packing prefix shuffle_buffer",
        "eval": "batch_size before samples",
        "task": "",
    }
    section, name = key.split(".")
    if name in own[section].split():
        assert parse_contender(f"none:{key}=1", base_head_lr=1e-3).settings[key] == 1
        return
    for word in (f"none:{key}=1", f"none:{key}.x=1"):
        with pytest.raises(ConfigError, match=rf"sets {key}, so that it could be scored on other rows") as error:
            make_grid({"t": Recipe()}, f"mirror,{word}", seeds=1, tune_seeds=1, lr_grid="1e-2", extensions=0)
        assert "Set it for all methods" in str(error.value)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("mirror:adapter.options=3:scale_top_k=2", "sets adapter.options both as a value and, in adapter.options.scal"),
        ("mirror:scale_top_k=2:adapter.options=3", "sets adapter.options both as a value and, in adapter.options.scal"),
        ("mirror:adapter.method.x=1", "sets adapter.method both"),
        ("mirror:train.lr.x=1", "sets train.lr both"),
        ("mirror:train.seed.x=1", "sets train.seed both"),
        ("mirror:train.seed=1", "Use --seeds"),
        ("mirror:lr=1e-3:train.lr=1e-2", "sets both lr and train.lr"),
        ("none:train.head_lr=0", "learning rates '0'"),
        ("mirror:train.lr=x", "learning rates 'x'"),
        ("mirror:train.max_steps=", "mirror:train.max_steps=: it has no value"),
        ("mirror:train.lr=null", "learning rates 'None'"),
    ],
)
def test_settings_of_methods_that_contradict_each_other_are_refused(word: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_contender(word, base_head_lr=1e-3)
    assert said in str(error.value)


def test_a_rate_of_a_method_is_the_middle_of_its_grid() -> None:
    for grid in (None, "1e-3,1e-2"):
        assert parse_contender("mirror:train.lr=1e-4", base_head_lr=1e-3, lr_grid=grid).lrs == (3e-5, 1e-4, 3e-4)
        assert parse_contender("mirror:lr=1e-4", base_head_lr=1e-3, lr_grid=grid).lrs == (1e-4,)


def test_a_default_rate_is_that_of_the_kind_of_task() -> None:
    options: dict[str, Any] = {"seeds": 1, "tune_seeds": 1, "lr_grid": None, "extensions": 0}
    for kind, expected in (("image-classification", (3e-3, 1e-2, 3e-2)), ("text-classification", around(2e-2))):
        recipe = resolve([override_layer([f"task.kind={kind}"])]).recipe
        (found,) = make_grid({"rows": recipe}, "mirror-scale", **options).contenders
        assert found.lrs == expected


def test_every_recipe_has_the_rates_of_its_own_head_and_kind() -> None:
    words = {"text": ["task.kind=text-classification", "train.head_lr=1e-3"],
             "image": ["task.kind=image-classification", "train.head_lr=1e-2"]}  # fmt: skip
    recipes = {name: resolve([override_layer(own)]).recipe for name, own in words.items()}

    made = make_grid(recipes, "none,mirror-scale", seeds=1, tune_seeds=1, lr_grid=None, extensions=0)

    none, scaled = made.contenders
    assert {cell.lr for cell in choose(made, "text", none, lambda _: None).missing} == {3e-4, 1e-3, 3e-3}
    assert {cell.lr for cell in choose(made, "image", none, lambda _: None).missing} == {3e-3, 1e-2, 3e-2}
    assert (scaled.first_lrs("text"), scaled.first_lrs("image")) == (around(2e-2), (3e-3, 1e-2, 3e-2))


def test_names_that_lead_to_the_same_folder_are_refused() -> None:
    with pytest.raises(ConfigError) as error:
        make_grid(
            {"glue/rte": Recipe(), "glue-rte": Recipe()}, "lora:alpha=1,lora:alpha=-1,none", seeds=2, tune_seeds=1,
            lr_grid=None, extensions=1,
        )  # fmt: skip
    said = str(error.value)
    assert "--methods: the runs of 'lora:alpha=1' and 'lora:alpha=-1' would be in the same folder" in said
    assert "RECIPE: the runs of 'glue/rte' and 'glue-rte' would be in the same folder, 'glue-rte'" in said


@given(st.floats(1e-12, 1e3), st.floats(1e-12, 1e3))
def test_only_equal_rates_have_the_same_name(one: float, other: float) -> None:
    for name in (lr_folder, shown_lr):
        assert (name(one) == name(other)) == (one == other)
    assert float(lr_folder(one).removeprefix("lr-")) == float(shown_lr(one)) == one


def test_the_runs_of_a_comparison_answer_no_samples_unless_the_recipe_asks(tmp_path: Path) -> None:
    def samples(*words: str) -> int | None:
        made = Comparison(tmp_path, grid(), {"t": resolve([override_layer(list(words))]).recipe}, Reporter())
        return made.cell_recipe(Cell("t", "a", 1e-3, 0)).eval.samples

    assert samples() == 0
    assert samples("eval.samples=2") == 2
