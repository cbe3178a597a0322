# SPDX-License-Identifier: Apache-2.0
"""How the turns of a model are written that does not say what it was trained on."""

from __future__ import annotations

from pathlib import Path

import pytest

from mirrortune.config.recipe import override_layer, resolve
from mirrortune.inference.speakers import _form, load_speaker
from mirrortune.system.console import Reporter
from tests.tiny_models import write_tiny_causal

_NAMED = "data.label_column=answer"


@pytest.mark.parametrize(
    ("words", "has_template", "form"),
    [
        ([], True, "chat"),
        ([], False, "text"),
        (["task.format=text"], True, "text"),
        # Merged folders, whose recipe names data and perhaps its columns.
        (["data.path=a.jsonl"], True, "chat"),
        (["data.path=a.jsonl"], False, "prompt"),
        (["data.path=a.jsonl", "task.format=text"], True, "prompt"),
        (["data.path=a.jsonl", _NAMED, "data.text_columns=[question]"], True, "prompt"),
        (["data.path=a.jsonl", _NAMED, "data.text_columns=[question]", "task.format=chat"], True, "chat"),
        (["data.path=a.jsonl", _NAMED, "data.text_columns=[instruction, input]"], True, "chat"),
        (["data.path=a.jsonl", _NAMED, "data.text_columns=[instruction, input]"], False, "alpaca"),
        (["data.path=a.jsonl", _NAMED, "data.text_columns=[instruction, input]", "task.format=text"], True, "alpaca"),
    ],
)
def test_the_form_of_turns_follows_the_template_and_the_recipe(words: list[str], has_template: bool, form: str) -> None:
    assert _form(resolve([override_layer(words)]).recipe, has_template=has_template) == form


def test_a_blank_template_is_none(tmp_path: Path) -> None:
    model = write_tiny_causal(tmp_path / "blank", template="\n")
    recipe = resolve([]).recipe
    assert load_speaker(str(model), recipe, Reporter()).form == "text"
