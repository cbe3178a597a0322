# SPDX-License-Identifier: Apache-2.0
"""image-classification from the command line: class folders and tables, from train to a merged folder."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.cli.console import Outcome, mirrortune, write_table
from tests.tiny_models import write_tiny_vision


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny DINOv2."""
    return write_tiny_vision(tmp_path_factory.mktemp("models") / "tiny-dino")


def picture(label: str, random: np.random.Generator) -> Image.Image:
    """Noise, bright on the left or on the right; grey or in colour."""
    values = random.integers(0, 120, (20, 24, 3), dtype=np.uint8)
    values[:, slice(0, 12) if label == "left" else slice(12, 24)] += 120
    image = Image.fromarray(values)
    return image.convert("L") if random.random() < 0.5 else image


def write_folders(folder: Path, **rows: int) -> Path:
    """Class folders of ``rows`` pictures a class in each split."""
    random = np.random.default_rng(0)
    for split, count in rows.items():
        for label in ("left", "right"):
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                picture(label, random).save(folder / split / label / f"{i:03d}.png")
    return folder


def train(model: Path, data: object, *words: object, out: str = "run") -> Outcome:
    """A short training."""
    flags = ["-m", model, "-t", "image-classification", "-d", data, "-o", out, "--json", *words]
    return mirrortune("train", *flags)


def test_a_rule_is_learned_from_class_folders_and_survives_merging(desk: Path, vision: Path) -> None:
    write_folders(desk / "pictures", train=40, validation=20, test=15)

    outcome = train(vision, "pictures", "--epochs", 5, "--batch-size", 8, "--head-lr", "1e-2", "data.image_size=8")

    assert outcome.data["metrics"]["accuracy"] >= 0.9, outcome.stderr
    assert "train: 80 rows, 8 x 8 pixels" in outcome.stderr
    assert mirrortune("eval", "run", "--split", "test", "--json").data["rows"] == 30
    merged = mirrortune("merge", "run", "-o", "merged", "--json").data
    assert merged["verification"]["passed"]
    assert merged["verification"]["max_abs_logit_error"] < 1e-3
    assert mirrortune("eval", "merged", "--json").data["metrics"] == pytest.approx(outcome.data["metrics"], abs=1e-4)
    assert json.loads((desk / "merged" / "preprocessor_config.json").read_text())["crop_size"] == {
        "height": 8,
        "width": 8,
    }
    config = json.loads((desk / "merged" / "config.json").read_text())
    assert config["id2label"] == {"0": "left", "1": "right"}


@pytest.mark.slow
def test_folders_and_tables_of_the_same_images_give_the_same_run(desk: Path, vision: Path) -> None:
    folder = write_folders(desk / "pictures", all=12) / "all"
    paths = sorted(folder.rglob("*.png"))
    rows = [(str(path.relative_to(desk)), path.parent.name) for path in paths]
    write_table(desk / "paths.csv", rows, ("file", "label"))
    encoded = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    pq.write_table(pa.table({"image": encoded, "label": [label for _, label in rows]}), desk / "structs.parquet")
    pq.write_table(
        pa.table({"img": [e["bytes"] for e in encoded], "y": [label for _, label in rows]}), desk / "b.parquet"
    )
    logs, seen = [], []
    for number, data in enumerate(("pictures/all", "structs.parquet")):
        outcome = train(vision, data, "--max-steps", 1, "data.augment=crop-flip", out=str(number))
        assert outcome.exit_code == 0, outcome.stderr
        assert "label column" in outcome.stderr
        logs.append((desk / str(number) / "metrics.jsonl").read_text())
    assert len(set(logs)) == 1
    for data in ("structs.parquet", "paths.csv", "b.parquet"):
        words = ["-m", vision, "-t", "image-classification", "-d", data, "--dry-run", "--show", 99]
        shown = mirrortune("prepare", *words).stderr
        seen.append(shown[shown.index("example 1 of") :])
    assert len(set(seen)) == 1


def test_class_names_of_a_hub_table_are_kept(desk: Path, vision: Path) -> None:
    random = np.random.default_rng(0)
    streams = []
    for i in range(20):
        stream = io.BytesIO()
        picture(("left", "right")[i % 2], random).save(stream, "JPEG")
        streams.append(stream.getvalue())
    features = {"label": {"names": ["links", "rechts"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    table = pa.table({"image": [{"bytes": s, "path": None} for s in streams], "label": [i % 2 for i in range(20)]})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), desk / "hub.parquet")

    assert train(vision, "hub.parquet", "--max-steps", 1).exit_code == 0
    assert json.loads((desk / "run/adapter/adapter.json").read_text())["task"]["labels"] == ["links", "rechts"]


@pytest.mark.parametrize(
    ("words", "exit_code", "says"),
    [
        (["data.image_size=10"], 2, "data.image_size: got 10, the model's patches are 4 pixels wide"),
        (["data.augment=flop"], 2, "data.augment: unknown augmentation 'flop'. Did you mean 'flip'?"),
        (["--text-column", "label"], 2, "data.text_columns: image-classification has none"),
        (["--max-length", 32], 2, "data.max_length: got 32, but images have no tokens. Set data.image_size"),
        (["--image-column", "picture"], 3, "--image-column 'picture' is not a column"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    desk: Path, vision: Path, words: list[object], exit_code: int, says: str
) -> None:
    write_folders(desk / "pictures", train=4)
    outcome = train(vision, "pictures", *words)
    assert outcome.exit_code == exit_code, outcome.stderr
    assert says in outcome.said


def test_a_text_model_or_a_text_task_is_refused(desk: Path, vision: Path, tiny_model_dir: Path) -> None:
    write_folders(desk / "pictures", train=4)
    text_model = train(tiny_model_dir, "pictures")
    assert text_model.exit_code == 2
    assert "its architecture has no head for this task" in text_model.said
    text_task = mirrortune("train", "-m", vision, "-t", "text-classification", "-d", "reviews.csv")
    assert text_task.exit_code == 2
    assert "its architecture has no head for this task" in text_task.said
    setting = mirrortune(
        "train", "-m", tiny_model_dir, "-t", "text-classification", "-d", "reviews.csv", "data.image_size=8"
    )
    assert "data.image_size: text-classification has none, got 8" in setting.said


def test_a_broken_image_is_named_before_training(desk: Path, vision: Path) -> None:
    folder = write_folders(desk / "pictures", train=4)
    (folder / "train" / "left" / "001.png").write_text("<html>404</html>")
    outcome = train(vision, "pictures")
    assert outcome.exit_code == 3
    assert "image 'left/001.png' cannot be read" in outcome.said
