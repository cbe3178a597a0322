# SPDX-License-Identifier: Apache-2.0
"""predict --bank: each row is answered by its own adapter, as that adapter answers it alone."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mirrortune.inference.bank import AdapterBank
from tests.cli.console import mirrortune, write_lines
from tests.cli.test_predict import fail_at
from tests.tiny_models import WORDS, write_tiny_causal

Rows = list[dict[str, Any]]
SHOPS = {"4": ("bad", "good"), "17": ("cheap", "dear", "fair"), "23": ("bad", "good")}
FLAGS = ("--adapter-column", "shop", "--format", "jsonl", "-q")


def told(*words: object) -> Rows:
    """The rows that predict writes to standard output."""
    outcome = mirrortune("predict", *words)
    assert outcome.exit_code == 0, outcome.stderr
    return [json.loads(line) for line in outcome.stdout.splitlines()]


@pytest.fixture(scope="module")
def shops(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A folder of a run for each shop, two of which have the same classes."""
    folder, draw = tmp_path_factory.mktemp("shops"), random.Random(0)
    cache = tmp_path_factory.mktemp("cache")
    for number, (shop, labels) in enumerate(SHOPS.items()):
        texts = [f"the film was {draw.choice(WORDS)} and {draw.choice(WORDS)}" for _ in range(24)]
        rows = [{"text": text, "label": labels[i % len(labels)]} for i, text in enumerate(texts)]
        data = write_lines(folder.parent / f"{folder.name}-{shop}.jsonl", rows)
        flags = ["-m", tiny_model_dir, "-t", "text-classification", "-d", data, "--epochs", 1, "--batch-size", 8]
        flags += ["--head-lr", "1e-1", "--seed", number, "--method", ("mirror", "psoft", "mirror")[number]]
        trained = mirrortune("train", *flags, "-o", folder / "run" / shop, "-q", cache=cache)
        assert trained.exit_code == 0, trained.stderr
    return folder / "run"


def rows_of_shops(count: int = 17) -> Rows:
    """Rows of all shops."""
    draw = random.Random(1)
    return [{"text": f"it was {draw.choice(WORDS)} {draw.choice(WORDS)}", "shop": int(draw.choice([*SHOPS]))}
            for _ in range(count)]  # fmt: skip


def test_rows_are_answered_as_by_their_adapters_alone(shops: Path, tiny_model_dir: Path, desk: Path) -> None:
    rows = rows_of_shops()
    data = write_lines(desk / "rows.jsonl", rows)
    found = told(tiny_model_dir, "--bank", shops, "-d", data, "--top", 3, *FLAGS)
    assert [row["shop"] for row in found] == [row["shop"] for row in rows]
    assert len({row["prediction"] for row in found}) > 2
    for shop, labels in SHOPS.items():
        own = [row for row in found if str(row["shop"]) == shop]
        asked = write_lines(desk / f"{shop}.jsonl", [row for row in rows if str(row["shop"]) == shop])
        alone = told(shops / shop, "-d", asked, "--top", 3, "--format", "jsonl", "-q")
        for one, other in zip(own, alone, strict=True):
            assert one["prediction"] in labels
            assert one["prediction"] == other["prediction"]
            assert one["score"] == pytest.approx(other["score"], abs=1e-5)
            assert one.get("prediction_3") == other.get("prediction_3")


def test_a_saved_bank_answers_as_its_folder(shops: Path, tiny_model_dir: Path, desk: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    bank = AdapterBank.load(AutoModelForSequenceClassification.from_pretrained(tiny_model_dir), shops)
    bank.save(desk / "bank.safetensors")
    data = write_lines(desk / "rows.jsonl", rows_of_shops(5))
    of_file, of_folder = (told(tiny_model_dir, "--bank", place, "-d", data, *FLAGS)
                          for place in (desk / "bank.safetensors", shops))  # fmt: skip
    assert of_file == of_folder


def test_what_is_no_file_in_a_bank_is_not_opened(shops: Path, tiny_model_dir: Path, desk: Path) -> None:
    data = write_lines(desk / "rows.jsonl", rows_of_shops(5))
    shutil.copytree(shops, desk / "bank")
    (desk / "bank" / "folder" / "adapter.json").mkdir(parents=True)
    (desk / "bank" / "lost").mkdir()
    (desk / "bank" / "lost" / "adapter.json").symlink_to(desk / "nowhere")
    (desk / "bank" / "pipe").mkdir()
    os.mkfifo(desk / "bank" / "pipe" / "adapter.json")  # from which nothing ever comes

    assert told(tiny_model_dir, "--bank", desk / "bank", "-d", data, *FLAGS)


def test_all_rows_without_an_adapter_are_named_before_anything_is_answered(
    shops: Path, tiny_model_dir: Path, desk: Path
) -> None:
    rows = rows_of_shops(6)
    for row, shop in ((1, "9"), (3, ""), (4, "x"), (5, "9")):
        rows[row]["shop"] = shop
    data = write_lines(desk / "rows.jsonl", [{**row, "shop": str(row["shop"])} for row in rows])
    words = ("predict", tiny_model_dir, "--bank", shops, "-d", data, *FLAGS)
    refused = mirrortune(*words)
    assert refused.exit_code == 3
    assert refused.stdout == ""
    assert "the bank has no adapter '9' (lines 2, 6), 'x' (line 5)" in refused.said
    assert "no adapter is named in line 4, and the base has no head for this task" in refused.said
    assert "Allowed: 17, 23, 4" in refused.said
    skipped = told(*words[1:], "--on-error", "skip")
    assert [row["prediction"] is None for row in skipped] == [False, True, False, True, True, True]
    assert "no adapter 'x'" in skipped[4]["error"]


def test_bad_rows_at_the_start_do_not_fix_the_columns(shops: Path, tiny_model_dir: Path, desk: Path) -> None:
    rows = rows_of_shops(66)
    for row in rows[:64]:  # the first block
        row["shop"] = "x"
    data = write_lines(desk / "rows.jsonl", [{**row, "shop": str(row["shop"])} for row in rows])

    skipped = told(tiny_model_dir, "--bank", shops, "-d", data, *FLAGS, "--on-error", "skip")

    assert [row["score"] is None for row in skipped] == [True] * 64 + [False] * 2
    assert all(list(row) == ["text", "shop", "prediction", "score", "error"] for row in skipped)


def test_adapters_that_no_row_names_do_not_matter(shops: Path, tiny_model_dir: Path, desk: Path) -> None:
    bank = shutil.copytree(shops, desk / "bank")
    damaged, other = (shutil.copytree(shops / "4", bank / name) for name in ("0", "1"))
    (damaged / "adapter" / "adapter.json").write_text("{", encoding="utf-8")
    rows = [{"text": "a good film", "stars": number / 8} for number in range(8)]
    data = write_lines(desk / "stars.jsonl", rows)
    shutil.rmtree(other)
    flags = ["-m", tiny_model_dir, "-t", "regression", "-d", data, "--max-steps", 1, "-q", "-o", other]
    assert mirrortune("train", *flags).exit_code == 0
    data = write_lines(desk / "rows.jsonl", rows_of_shops(5))
    words = (tiny_model_dir, "--bank", bank, "-d", data, *FLAGS)
    assert told(*words) == told(tiny_model_dir, "--bank", shops, "-d", data, *FLAGS)

    write_lines(data, [{"text": "a", "shop": shop} for shop in (0, 4)])
    answered = told(*words, "--on-error", "skip")
    assert [row["score"] is None for row in answered] == [True, False]
    assert "damaged" in answered[0]["error"]
    write_lines(data, [{"text": "a", "shop": shop} for shop in (4, 1)])
    refused = mirrortune("predict", *words)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "adapter '4': it is for text-classification, and '1' for regression" in refused.said


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--bank", "BANK", "-d", "rows.jsonl"], 2, "--bank: it needs --adapter-column"),
        (["--adapter-column", "shop", "-d", "rows.jsonl"], 2, "--adapter-column: it needs --bank"),
        (["--bank", "BANK", "--adapter-column", "shop", "--text", "a"], 2, "no column of adapters"),
        (["--bank", "BANK", "--adapter-column", "shp", "-d", "rows.jsonl"], 3, "Did you mean 'shop'?"),
        (["--bank", "BANK", "--adapter-column", "shop", "-d", "rows.jsonl", "--force-base"], 2, "--force-base"),
        (["--bank", "nowhere", "--adapter-column", "shop", "-d", "rows.jsonl"], 2, "no adapters are there"),
        (["--bank", "BANK", "--adapter-column", "shop", "-d", "rows.jsonl", "--threshold", 0.5], 2, "--threshold"),
        (["-t", "regression", "--bank", "BANK", "--adapter-column", "shop", "-d", "rows.jsonl"], 2, "--task"),
    ],
)
def test_what_a_bank_cannot_answer_is_refused(
    shops: Path, tiny_model_dir: Path, desk: Path, words: list[object], code: int, said: str
) -> None:
    write_lines(desk / "rows.jsonl", rows_of_shops(2))
    refused = mirrortune("predict", tiny_model_dir, *[shops if word == "BANK" else word for word in words])
    assert (refused.exit_code, refused.stdout) == (code, "")
    assert said in refused.said


def test_a_bank_that_has_grown_is_continued(
    shops: Path, tiny_model_dir: Path, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, runs = desk / "bank", shutil.copytree(shops, desk / "runs")
    bank.mkdir()
    for shop in SHOPS:
        (bank / shop).symlink_to(runs / shop)
    data = write_lines(desk / "rows.jsonl", rows_of_shops(130))
    words = ("predict", tiny_model_dir, "--bank", bank, "-d", data, "--adapter-column", "shop", "-o", "a.csv")

    def stopped(*more: str) -> None:
        with monkeypatch.context() as broken:
            fail_at(2, broken, KeyboardInterrupt())
            assert mirrortune(*words, *more).exit_code == 130

    assert mirrortune(*words[:-1], "whole.csv").exit_code == 0
    stopped()
    shutil.copytree(shops / "4", bank / "5")
    stopped("--resume")
    shutil.rmtree(bank / "5")  # a row of the second part may have had it
    gone = mirrortune(*words, "--resume")
    assert (gone.exit_code, "bank: 5." in gone.said) == (2, True), gone.said
    shutil.copytree(shops / "4", bank / "5")
    for file in ("adapter.json", "adapter.safetensors"):
        shutil.copy(runs / "23" / "adapter" / file, runs / "4" / file)  # read in place of those in 4/adapter
    other = mirrortune(*words, "--resume")
    assert (other.exit_code, "bank: 4: adapter.json, adapter.safetensors." in other.said) == (2, True), other.said
    for file in ("adapter.json", "adapter.safetensors"):
        (runs / "4" / file).unlink()
    resumed = mirrortune(*words, "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert (desk / "a.csv").read_bytes() == (desk / "whole.csv").read_bytes()

    stopped("--overwrite", "--on-error", "skip")
    shutil.copytree(shops / "4", bank / "6")
    grown = mirrortune(*words, "--resume")  # a row may have the error that there is no adapter 6
    assert (grown.exit_code, "bank: 6." in grown.said) == (2, True), grown.said


def test_an_adapter_is_no_base_of_a_bank(shops: Path, desk: Path) -> None:
    data = write_lines(desk / "rows.jsonl", rows_of_shops(2))
    refused = mirrortune("predict", shops / "4", "--bank", shops, "-d", data, *FLAGS)
    assert refused.exit_code == 2
    assert "holds an adapter of its own" in refused.said


def test_the_bank_is_never_the_output(shops: Path, tiny_model_dir: Path, desk: Path) -> None:
    data = write_lines(desk / "rows.jsonl", rows_of_shops(2))
    inside = shops / "4" / "adapter" / "answers.csv"
    refused = mirrortune(
        "predict", tiny_model_dir, "--bank", shops, "-d", data, "--adapter-column", "shop", "-o", inside
    )
    assert refused.exit_code == 2
    assert not inside.exists()


@pytest.mark.slow
def test_prompts_are_answered_by_the_base_where_no_adapter_is_named(
    desk: Path, make_poets: Callable[[Path], Path]
) -> None:
    model = make_poets(desk)
    rows: Rows = [
        {"prompt": text, "poet": poet} for text, poet in (("a", "b"), ("the film", None), ("so", "a"), ("a", "a"))
    ]
    flags = ("--format", "jsonl", "-q", "--max-new-tokens", 6)
    data = write_lines(desk / "rows.jsonl", rows)
    found = told(model, "--bank", desk / "poets", "-d", data, "--adapter-column", "poet", *flags)
    sampled = told(model, "--bank", desk / "poets", "-d", data, "--adapter-column", "poet", *flags,
                   "--temperature", 1.0, "--batch-size", 1)  # fmt: skip
    for poet in ("a", "b"):
        own = write_lines(desk / f"{poet}.jsonl", [{"prompt": row["prompt"]} for row in rows])
        alone = told(desk / "poets" / poet, "-d", own, *flags)
        drawn = told(desk / "poets" / poet, "-d", own, *flags, "--temperature", 1.0)
        for number, row in enumerate(rows):
            if row["poet"] == poet:
                assert found[number]["prediction"] == alone[number]["prediction"]
                assert sampled[number]["prediction"] == drawn[number]["prediction"]
    assert isinstance(found[1]["prediction"], str)


@pytest.fixture
def make_poets() -> Callable[[Path], Path]:
    """Trains two adapters of a language model into ``poets``, and returns the model."""

    def made(desk: Path) -> Path:
        model = write_tiny_causal(desk / "lm", template=None)
        for poet in ("a", "b"):
            rows = [{"prompt": word, "completion": poet * 3} for word in WORDS[:16]]
            flags = [
                "-m",
                model,
                "-t",
                "causal-lm",
                "-d",
                write_lines(desk / f"{poet}.jsonl", rows),
                "--epochs",
                2,
                "--lr",
                "3e-2",
            ]
            assert mirrortune("train", *flags, "-o", desk / "runs" / poet, "-q").exit_code == 0
            shutil.copytree(desk / "runs" / poet / "adapter", desk / "poets" / poet)
        return model

    return made
