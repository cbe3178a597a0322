# SPDX-License-Identifier: Apache-2.0
"""Files of answers: plain names, one line a row, and nothing that acts on a terminal."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from mirrortune.config.recipe import override_layer, resolve
from mirrortune.errors import ConfigError
from mirrortune.runs.evaluate import prediction_file, predictions_output, write_predictions

PLAIN = ["RTE.tsv", "my answers.txt", "a-b_c.1", "\u00e9.tsv"]
NOT_PLAIN = [
    "../x.tsv",
    "/tmp/x.tsv",
    "a/b.tsv",
    "a\\b.tsv",
    ".bashrc",
    "..",
    ".",
    "",
    "C:x",
    "a\nb",
    "a\x1b[2J",
    "a\x00",
]


@pytest.mark.parametrize("name", PLAIN)
def test_plain_names_are_taken(tmp_path: Path, name: str) -> None:
    assert resolve([override_layer([f"eval.prediction_files={{test: '{name}'}}"])]).recipe.eval.prediction_files
    assert prediction_file(tmp_path, "test", {"test": name}) == tmp_path / name


@pytest.mark.parametrize("name", ["p.csv", "p.JSONL", "p.parquet"])
def test_names_of_other_formats_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^--predictions: predictions are tab-sep.* {name} has .* run predict -o {name}\.$"
    ):
        prediction_file(tmp_path / name, "test", {})


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_others_are_refused_where_they_are_read_and_where_they_are_used(tmp_path: Path, name: str) -> None:
    quoted = name.encode("unicode_escape").decode()
    with pytest.raises(ConfigError, match="a plain file name" if "\x00" not in name else "plain file name|not valid"):
        resolve([override_layer([f'eval.prediction_files={{test: "{quoted}"}}'])])
    with pytest.raises(ConfigError, match="a plain file name"):
        prediction_file(tmp_path, "test", {"test": name})
    with pytest.raises(ConfigError, match="a plain file name"):
        prediction_file(tmp_path, f"../{name}", {})


@pytest.mark.parametrize("name", ["a\nb", "a\tb", "a\r", "\x1b[2J", "a\x85b", "a\u2028b", "\ud800"])
def test_class_names_that_would_break_the_file_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"class name .* control character.*eval\.prediction_labels=indices"):
        write_predictions(tmp_path / "p.tsv", np.array([0]), ("fine", name), None)
    assert not (tmp_path / "p.tsv").exists()


def test_texts_are_written_in_one_line_each(tmp_path: Path) -> None:
    texts = ["a\nb\t c", "\x1b[2Jx", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\U0001f469\u200d\U0001f52c"]

    write_predictions(tmp_path / "p.tsv", texts, None, None)

    written = (tmp_path / "p.tsv").read_text(encoding="utf-8")
    assert written == f"index\tprediction\n0\ta b c\n1\t[2Jx\n2\t{texts[2]}\n3\t{texts[3]}\n"


@pytest.mark.parametrize("place", ["pipe", "/dev/null", "/dev/zero"])
def test_predictions_go_to_no_pipe_and_no_device(tmp_path: Path, place: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="is not a regular file"):
        prediction_file(tmp_path / place, "test", {})


def test_what_a_killed_command_left_is_removed_by_the_next(tmp_path: Path) -> None:
    for name in ("p.tsv", "other.tsv"):
        (tmp_path / f".{name}.mt-ab12cd34.partial").write_text("ind")
    with predictions_output(tmp_path / "p.tsv", [], overwrite=False):
        write_predictions(tmp_path / "p.tsv", ["a"], None, None)

    assert {path.name for path in tmp_path.iterdir()} == {"p.tsv", ".other.tsv.mt-ab12cd34.partial"}
