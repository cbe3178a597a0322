# SPDX-License-Identifier: Apache-2.0
"""model_card: the recipe in it, and one too long for it."""

from __future__ import annotations

from typing import Any

from mirrortune.config import strict_yaml
from mirrortune.reports.model_card import edited, is_generated, run_card, signed

RESULT: dict[str, Any] = {
    "metrics": {"accuracy": 0.5},
    "trainable_parameters": 3,
    "head_parameters": 4,
    "adapter_bytes": 100,
    "train_seconds": 2.0,
}


def card(recipe: dict[str, Any]) -> str:
    """The card of a run by a recipe."""
    return run_card(
        "run", {"name": "base"}, "mirror", {"kind": "text-classification"}, RESULT, strict_yaml.dump(recipe)
    )


def test_the_recipe_is_in_the_card() -> None:
    assert "The recipe:\n\n```yaml\nadapter:\n  pairing:\n  - [0, 5]\n```\n" in card({"adapter": {"pairing": [[0, 5]]}})


def test_a_recipe_of_a_thousand_pairs_is_not() -> None:
    text = card({"adapter": {"pairing": [[2 * k, 2 * k + 1] for k in range(1000)]}})
    assert "The recipe:\n\n`recipe.yaml`, which is too long to be shown here.\n" in text
    assert len(text.splitlines()) < 40


def test_a_card_that_was_edited_is_no_generated_one() -> None:
    text = signed(card({"adapter": {"pairing": [[0, 5]]}}))
    assert is_generated(text)
    assert is_generated(text.replace("\n", "\r\n"))
    for changed in (
        text.replace("---\n\n", "license: mit\n---\n\n", 1), text.replace("# run\n", "# My model\n\nIt is good.\n"),
        text + "\nIt is good.\n", "",
    ):  # fmt: skip
        assert not is_generated(changed)
        assert edited(changed, str.upper) == changed.upper()
    assert is_generated(edited(text, str.upper))
