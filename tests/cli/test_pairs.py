# SPDX-License-Identifier: Apache-2.0
"""Pairs that the user lists, rounds of pairs, and all outputs, from the command line to the merged model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mirrortune.adapters.files.adapter_file import read_adapter
from mirrortune.adapters.files.load import stored_pairs
from tests.cli.console import Outcome, mirrortune

PAIRS: dict[str, Any] = {"query|key|value": [[0, 5], [7, 1]], "dense": [[2, 3]]}


def train(model: Path, *words: object, out: str = "run") -> Outcome:
    """Three steps on the reviews."""
    base = ("-m", model, "-t", "text-classification", "-d", "reviews.csv", "-o", out, "--max-steps", 3, "--json")
    return mirrortune("train", *base, *words)


def pairs_of(run: Path) -> dict[str, list[list[int]]]:
    """The pairs that a run's adapter holds, by layer."""
    return {name: pairs.tolist() for name, pairs in stored_pairs(read_adapter(run / "adapter")).items()}


def write_pairs(path: Path, pairs: object) -> Path:
    """A .json file of pairs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(pairs), encoding="utf-8")
    return path


def test_a_file_of_pairs_goes_the_whole_way(desk: Path, tiny_model_dir: Path) -> None:
    write_pairs(desk / "pairs.json", PAIRS)
    trained = train(tiny_model_dir, "--method", "givens", "--pairing", "pairs.json").data
    found = pairs_of(desk / "run")
    assert trained["trainable_parameters"] == sum(map(len, found.values())) == 6 * 2 + 7
    query = next(pairs for name, pairs in found.items() if name.endswith("layer.0.attention.self.query"))
    assert query == [[0, 5], [1, 7]]

    (desk / "pairs.json").unlink()  # the run needs it no more
    scored = mirrortune("eval", "run", "--json").data
    assert scored["metrics"] == pytest.approx(trained["metrics"], abs=1e-5)
    assert mirrortune("merge", "run", "-o", "merged", "--json").data["verification"]["passed"]
    again = mirrortune("train", "run/recipe.yaml", "-o", "again", "--json").data
    assert again["metrics"] == trained["metrics"]
    assert pairs_of(desk / "again") == found


def test_a_resumed_run_keeps_its_pairs(desk: Path, tiny_model_dir: Path) -> None:
    write_pairs(desk / "pairs.json", PAIRS)
    train(tiny_model_dir, "--pairing", "pairs.json")
    write_pairs(desk / "pairs.json", {**PAIRS, "dense": [[1, 3]]})
    outcome = train(tiny_model_dir, "--pairing", "pairs.json", "--resume")
    assert outcome.exit_code == 2
    assert "--resume: adapter.pairing: the run was started with" in outcome.said
    write_pairs(desk / "pairs.json", PAIRS)
    assert train(tiny_model_dir, "--pairing", "pairs.json", "--resume").exit_code == 0


@pytest.mark.slow
def test_pairs_are_listed_in_a_recipe_or_beside_it(desk: Path, tiny_model_dir: Path) -> None:
    write_pairs(desk / "recipes" / "pairs.json", [[0, 5], [1, 7]])
    recipe = desk / "recipes" / "mine.yaml"
    found = []
    for pairing in ("pairs.json", "[[0, 5], [1, 7]]", "\n    - [5, 0]\n    - [1, 7]"):
        text = f"adapter:\n  method: givens\n  pairing: {pairing}\n  target_modules: query\n"
        recipe.write_text(text, encoding="utf-8")
        trained = train(tiny_model_dir, recipe, "--overwrite").data
        found.append((trained["metrics"], pairs_of(desk / "run")))
        assert trained["trainable_parameters"] == 4
    assert found[0] == found[1] == found[2]


def test_a_mapping_replaces_a_name_and_a_name_a_mapping(desk: Path, tiny_model_dir: Path) -> None:
    recipe = desk / "mine.yaml"
    recipe.write_text("adapter: {method: givens, pairing: random, target_modules: query}\n", encoding="utf-8")
    assert train(tiny_model_dir, recipe, "adapter.pairing={query: [[0, 1]]}").data["trainable_parameters"] == 2
    recipe.write_text(
        "adapter: {method: givens, pairing: {query: [[0, 1]]}, target_modules: query}\n", encoding="utf-8"
    )
    assert train(tiny_model_dir, recipe, "--pairing", "mirror", out="other").data["trainable_parameters"] == 32


@pytest.mark.parametrize(
    ("pairing", "says"),
    [
        ("nowhere.json", "--pairing: cannot read nowhere.json"),
        ("text.json", "--pairing: cannot read text.json (Expecting value"),
        ("twice.json", "--pairing: cannot read twice.json (key 'query' appears twice)"),
        ("number.json", "--pairing: number.json holds a number. Allowed: a list of pairs, or an object of such lists"),
        ("overlap.json", "direction 1 is in the pairs [0, 1] and [1, 2]"),
        ("far.json", "direction 32 is listed, and 32 are kept in"),
        ("typo.json", "'querry' matches none of the 13 linear layers. Nearest: query"),
        ("explicit", "'explicit' takes pairs that you list, and there are none here"),
        ("mirro", "unknown pairing 'mirro'. Did you mean 'mirror'?"),
    ],
)
def test_wrong_pairs_are_refused_before_the_weights(desk: Path, tiny_model_dir: Path, pairing: str, says: str) -> None:
    write_pairs(desk / "number.json", 3)
    write_pairs(desk / "overlap.json", [[0, 1], [1, 2]])
    write_pairs(desk / "far.json", [[0, 32]])
    write_pairs(desk / "typo.json", {"querry": [[0, 1]], "all-linear": [[0, 1]]})
    (desk / "text.json").write_text("pairs")
    (desk / "twice.json").write_text('{"query": [[0, 1]], "query": [[0, 2]]}')
    outcome = train(tiny_model_dir, "--pairing", pairing)
    assert outcome.exit_code == 2
    assert says in outcome.said
    assert outcome.stdout == ""
    assert not (desk / "run").exists()


def test_a_wrong_file_of_pairs_is_reported_with_everything_else(desk: Path, tiny_model_dir: Path) -> None:
    outcome = train(tiny_model_dir, "--pairing", "nowhere.json", "--lr", "fast")
    assert "--pairing: cannot read nowhere.json" in outcome.said
    assert "--lr: got 'fast'" in outcome.said


@pytest.mark.slow
def test_rounds_over_all_outputs_go_the_whole_way(desk: Path, tiny_model_dir: Path) -> None:
    words = ("--rank", "out", "adapter.options={rounds: 2, scale_top_k: 3}")
    planned = mirrortune(
        "prepare", "-m", tiny_model_dir, "-t", "text-classification", "-d", "reviews.csv", *words, "--json"
    )
    trained = train(tiny_model_dir, *words).data
    # Eleven layers of 32 outputs and two of 64.
    assert planned.data["trainable_parameters"] == trained["trainable_parameters"] == 2 * (11 * 16 + 2 * 32) + 13 * 3
    scored = mirrortune("eval", "run", "--json").data
    assert scored["metrics"] == pytest.approx(trained["metrics"], abs=1e-5)
    assert mirrortune("merge", "run", "-o", "merged", "--json").data["verification"]["passed"]


def test_all_outputs_are_for_rotations_of_the_output_side(desk: Path, tiny_model_dir: Path) -> None:
    outcome = train(tiny_model_dir, "--method", "psoft", "--rank", "out")
    assert outcome.exit_code == 2
    assert (
        "adapter.rank: out keeps output directions that no input reaches; 'psoft' does not rotate only the output side"
        in outcome.said
    )
