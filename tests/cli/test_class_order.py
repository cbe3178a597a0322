# SPDX-License-Identifier: Apache-2.0
"""Models that are classifiers already: their head goes on with the classes that it was trained for, whatever their
order.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.cli.console import mirrortune
from tests.tiny_models import tiny_bert, tiny_tokenizer

NAMES = ("positive", "negative")  # the reviews' classes, not in alphabetical order


def write_classifier(folder: Path, names: tuple[str, ...] = NAMES) -> Path:
    """Write a classifier whose head prefers neither class; its outputs are called ``names``."""
    model = tiny_bert(seed=3, num_labels=len(names), id2label=dict(enumerate(names)),
                      label2id={name: i for i, name in enumerate(names)})  # fmt: skip
    with torch.no_grad():
        model.classifier.weight.mul_(20)
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    shown = outputs(folder, rows(folder.parent / "reviews.csv"))
    with torch.no_grad():
        model.classifier.bias.sub_(torch.tensor(shown.mean(axis=0), dtype=torch.float32))
    model.save_pretrained(folder)
    return folder


def rows(file: Path) -> list[dict[str, str]]:
    """The rows of a csv file."""
    with file.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


def outputs(model: Path, found: list[dict[str, str]]) -> Any:
    """The logits of each row, by transformers alone."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(model).eval()
    with torch.no_grad():
        return np.stack([loaded(**tokenizer(row["text"], return_tensors="pt")).logits[0].numpy() for row in found])


def scores(model: Path, file: Path, positive: str = "positive") -> dict[str, float]:
    """Accuracy and F1 of a class by name, by transformers and scikit-learn."""
    from sklearn.metrics import f1_score

    found = rows(file)
    said = [NAMES[i] for i in outputs(model, found).argmax(axis=-1)]
    truth = [row["label"].lower() for row in found]
    share = float(np.mean([a == b for a, b in zip(said, truth, strict=True)]))
    return {"accuracy": share, "f1": f1_score(truth, said, pos_label=positive)}


@pytest.fixture
def model(desk: Path) -> Path:
    """A classifier, and the reviews split into two files."""
    lines = (desk / "reviews.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (desk / "data").mkdir()
    for name, own in {"train": lines[1:41], "validation": lines[41:]}.items():
        (desk / "data" / f"{name}.csv").write_text("".join([lines[0], *own]), encoding="utf-8")
    return write_classifier(desk / "classifier")


def test_training_continues_the_head_of_a_classifier_by_the_names_of_its_classes(model: Path, desk: Path) -> None:
    words = ["-m", model, "-t", "text-classification", "-d", desk / "data", "task.metrics=[accuracy, f1]"]
    done = mirrortune(
        "train", *words, "--max-steps", 1, "--lr", 1e-9, "--head-lr", 1e-9, "eval.before=true", "-o", "run", "--json"
    )
    assert done.exit_code == 0, done.stderr

    assert "classes in the order of the model's outputs: positive, negative" in done.stderr
    expected = pytest.approx(scores(model, desk / "data" / "validation.csv"), abs=1e-6)
    assert {name: done.data["metrics_before"][name] for name in ("accuracy", "f1")} == expected
    assert {name: done.data["metrics"][name] for name in ("accuracy", "f1")} == expected
    details = json.loads((desk / "run" / "validation.json").read_text(encoding="utf-8"))
    assert details["labels"] == ["negative", "positive"]  # as in the data
    counted = {name: row["count"] for name, row in ((each["class"], each) for each in details["per_class"])}
    truth = [row["label"] for row in rows(desk / "data" / "validation.csv")]
    assert counted == {name: truth.count(name) for name in NAMES}
    assert details["classes"]["validation"] == [truth.count("negative"), truth.count("positive")]
    assert details["confusion"][0][0] + details["confusion"][1][1] == round(details_accuracy(details) * len(truth))

    assert mirrortune("merge", "run", "-o", "merged").exit_code == 0
    merged = json.loads((desk / "merged" / "config.json").read_text(encoding="utf-8"))
    assert merged["id2label"] == {"0": "positive", "1": "negative"}


def details_accuracy(details: dict[str, Any]) -> float:
    """Accuracy of a run's page, from the scores of each class."""
    return sum(each["recall"] * each["count"] for each in details["per_class"]) / sum(
        each["count"] for each in details["per_class"]
    )


@pytest.mark.parametrize("change", [str.upper, str.title, lambda name: f" {name} "])
def test_eval_matches_names_in_another_spelling(model: Path, desk: Path, change: Any) -> None:
    text = (desk / "data" / "validation.csv").read_text(encoding="utf-8")
    for name in NAMES:
        text = text.replace(f",{name}", f",{change(name)}")
    (desk / "other.csv").write_text(text, encoding="utf-8")

    words = [
        "-t",
        "text-classification",
        "-d",
        "other.csv",
        "--split",
        "train",
        "task.metrics=[accuracy, f1]",
        "--json",
    ]
    done = mirrortune("eval", model, *words)

    assert done.exit_code == 0, done.stderr
    expected = scores(model, desk / "data" / "validation.csv")
    assert done.data["metrics"] == pytest.approx({**expected, "loss": done.data["metrics"]["loss"]})


def test_predicted_indices_are_those_of_the_data(model: Path, desk: Path) -> None:
    words = ["-t", "text-classification", "-d", desk / "data", "eval.prediction_labels=indices", "-q"]
    assert mirrortune("eval", model, *words, "--predictions", "answers.tsv").exit_code == 0

    written = [line.split("\t")[1] for line in Path("answers.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    said = outputs(model, rows(desk / "data" / "validation.csv")).argmax(axis=-1)
    assert written == [{"negative": "0", "positive": "1"}[NAMES[i]] for i in said]


def test_other_names_are_matched_by_position_and_this_is_said(model: Path, desk: Path) -> None:
    text = (desk / "data" / "validation.csv").read_text(encoding="utf-8")
    (desk / "stars.csv").write_text(text.replace(",positive", ",5").replace(",negative", ",1"), encoding="utf-8")
    said = "the model's classes have other names and are matched by position: positive = 1, negative = 5"

    done = mirrortune("eval", model, "-t", "text-classification", "-d", "stars.csv", "--split", "train", "--json")
    assert said in done.stderr
    share = scores(model, desk / "data" / "validation.csv")["accuracy"]
    assert done.data["metrics"]["accuracy"] == pytest.approx(1 - share)
    prepared = mirrortune("prepare", "-m", model, "-t", "text-classification", "-d", "stars.csv", "--dry-run")
    assert said in prepared.stderr

    given = mirrortune("eval", model, "-t", "text-classification", "-d", "stars.csv", "--split", "train",
                       'task.labels=["5", "1"]', "--json")  # fmt: skip
    assert given.data["metrics"]["accuracy"] == pytest.approx(share)


def test_a_head_of_another_size_is_replaced_and_this_is_said(desk: Path, tiny_model_dir: Path) -> None:
    model = write_classifier(desk / "three", ("neutral", *NAMES))
    words = ["-t", "text-classification", "-d", "reviews.csv", "--dry-run"]
    said = (
        "the model's head has 3 outputs (neutral, positive, negative), the data 2 classes: a new head is trained; a "
        "list of 3 in task.labels continues the old one"
    )

    assert said in mirrortune("prepare", "-m", model, *words).stderr
    named = mirrortune("prepare", "-m", model, *words, "task.labels=[neutral, positive, negative]")
    assert named.exit_code == 0
    assert "the model's head" not in named.stderr
    assert "the model's head" not in mirrortune("prepare", "-m", tiny_model_dir, *words).stderr


@pytest.mark.parametrize(
    ("outputs", "says"),
    [
        (tuple(f"breed {i}" for i in range(10)), "10 outputs (breed 0, breed 1, breed 2, breed 3, breed 4, breed 5, "
         "breed 6, breed 7, ...), the data 2 classes: a new head is trained\n"),
        (("score",), "1 output (score), the data 2 classes: a new head is trained\n"),
    ],
)  # fmt: skip
def test_a_head_that_the_classes_cannot_continue_is_replaced_without_advice(
    desk: Path, outputs: tuple[str, ...], says: str
) -> None:
    model = write_classifier(desk / "other", outputs)
    said = mirrortune("prepare", "-m", model, "-t", "text-classification", "-d", "reviews.csv", "--dry-run").stderr
    assert f"the model's head has {says}" in said


def test_rows_of_one_class_can_be_scored(model: Path, desk: Path) -> None:
    lines = (desk / "data" / "validation.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (desk / "one.csv").write_text("".join([lines[0], *(line for line in lines if ",positive" in line)]))

    done = mirrortune("eval", model, "-t", "text-classification", "-d", "one.csv", "--split", "train", "--json")

    assert done.exit_code == 0, done.stderr
    assert done.data["metrics"]["accuracy"] == pytest.approx(scores(model, desk / "one.csv")["accuracy"])


def test_an_order_that_is_given_is_kept(model: Path, desk: Path) -> None:
    words = ["-m", model, "-t", "text-classification", "-d", desk / "data", "--dry-run"]
    said = mirrortune("prepare", *words, "task.labels=[negative, positive]").stderr

    assert "task.labels is not the order of the model's classes, which is positive, negative" in said
    assert "classes in the order" not in said


def test_a_head_of_another_size_is_new(desk: Path, model: Path) -> None:
    three = write_classifier(desk / "three", ("positive", "negative", "neutral"))
    done = mirrortune("prepare", "-m", three, "-t", "text-classification", "-d", desk / "data", "--dry-run")

    assert done.exit_code == 0, done.stderr
    assert "order of the model's outputs" not in done.stderr


def test_an_adapter_that_is_loaded_in_python_names_the_classes_of_its_head(model: Path, desk: Path) -> None:
    import transformers

    import mirrortune as package

    other = write_classifier(desk / "other", ("spam", "ham"))  # a base with names of its own
    done = mirrortune(
        "train", "-m", other, "-t", "text-classification", "-d", desk / "data", "--max-steps", 4, "-o", "r"
    )
    assert done.exit_code == 0, done.stderr
    assert mirrortune("predict", "r", "-d", desk / "data" / "validation.csv", "-o", "said.csv").exit_code == 0

    adapted = transformers.AutoModelForSequenceClassification.from_pretrained(other)
    package.load_adapter(adapted, "r")

    assert adapted.config.id2label == {0: "negative", 1: "positive"}
    assert adapted.config.label2id == {"negative": 0, "positive": 1}
    tokenizer = transformers.AutoTokenizer.from_pretrained(other)
    pipe = transformers.pipeline("text-classification", model=adapted, tokenizer=tokenizer, device="cpu")
    said = rows(desk / "said.csv")
    assert [found["label"] for found in pipe([row["text"] for row in said])] == [row["prediction"] for row in said]
