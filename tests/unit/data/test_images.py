# SPDX-License-Identifier: Apache-2.0
"""images: every mode, every place an image can be, and augmentation that depends on seed, epoch and row alone."""

from __future__ import annotations

import io
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image, ImageOps

from mirrortune.data.columns import choose_media_columns
from mirrortune.data.dataset import Split, load_data
from mirrortune.data.files.images import AUGMENTATIONS, ImageExamples, ImageReader, encode_images, to_rgb
from mirrortune.errors import ConfigError, DataError
from mirrortune.models.load import find_model
from mirrortune.system.paths import DataPlace
from tests.tiny_models import write_tiny_vision

SIDE = 16


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny DINOv2 with an image processor."""
    return write_tiny_vision(tmp_path_factory.mktemp("models") / "tiny-dino")


def reader(folder: Path, size: int | None = None) -> ImageReader:
    """The model's reader."""
    return ImageReader.load(find_model(str(folder)), "AutoModelForImageClassification", size)


def gradient(mode: str = "L") -> Image.Image:
    """Dark on the left, light on the right."""
    return Image.fromarray(np.tile(np.linspace(0, 255, SIDE, dtype=np.uint8), (SIDE, 1))).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    """The bytes of a file."""
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def examples(values: list[Any], image_reader: ImageReader, folder: Path | None = None, **options: Any) -> ImageExamples:
    """Rows of images with targets 0, 1, 2, ..."""
    table = pa.table({"image": values})
    targets = np.arange(len(values))
    settings = {"augment": "none", "seed": 0, **options}
    split = Split(table=table, source="rows.parquet", folder=folder)
    return encode_images(split, "image", targets, targets < 0, image_reader, **settings)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    found = to_rgb(gradient("RGB").convert(mode) if mode not in ("LAB",) else Image.new("LAB", (SIDE, SIDE)))
    assert found.mode == "RGB"
    assert found.size == (SIDE, SIDE)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "CMYK"])
def test_grey_values_survive_the_mode(mode: str) -> None:
    grey = np.asarray(to_rgb(gradient("RGB").convert(mode)))[0, :, 0].astype(int)
    assert np.abs(grey - np.asarray(gradient())[0].astype(int)).max() <= 1


def test_sixteen_bits_are_scaled_and_not_cut_off() -> None:
    values = np.tile(np.linspace(0, 65535, SIDE, dtype=np.uint16), (SIDE, 1))
    reopened = Image.open(io.BytesIO(encoded(Image.fromarray(values))))
    assert reopened.mode.startswith("I")
    assert np.abs(np.asarray(to_rgb(reopened))[0, :, 1].astype(int) - np.linspace(0, 255, SIDE)).max() <= 1


@pytest.mark.parametrize("top", [1.0, 255.0])
def test_real_values_are_taken_by_their_range(top: float) -> None:
    values = np.tile(np.linspace(0, top, SIDE, dtype=np.float32), (SIDE, 1))
    assert np.asarray(to_rgb(Image.fromarray(values)))[0, -1].tolist() == [255, 255, 255]


def test_what_is_transparent_is_white() -> None:
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    half = Image.new("LA", (2, 2), (0, 128))
    assert np.asarray(to_rgb(clear)).min() == 255
    assert np.asarray(to_rgb(half)).tolist()[0][0] == [127, 127, 127]


def test_a_palette_may_have_a_transparent_colour() -> None:
    picture = Image.new("P", (2, 2), 0)
    picture.putpalette([10, 20, 30, 200, 100, 50])
    reopened = Image.open(io.BytesIO(_with_transparency(picture)))
    assert np.asarray(to_rgb(reopened)).min() == 255


def _with_transparency(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG", transparency=0)
    return stream.getvalue()


def test_a_picture_lying_on_its_side_is_turned_upright() -> None:
    picture, stream = Image.new("RGB", (4, 8), "red"), io.BytesIO()
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(stream, "JPEG", exif=exif)
    assert to_rgb(Image.open(io.BytesIO(stream.getvalue()))).size == (8, 4)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_all_orientations_are_those_of_pillow(orientation: int, form: str) -> None:
    picture = Image.fromarray(np.arange(84, dtype=np.uint8).reshape(4, 7, 3) * 3)
    stream, tags = io.BytesIO(), Image.Exif()
    tags[0x0112] = orientation
    picture.save(stream, form, exif=tags)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(stream.getvalue())))
    assert to_rgb(Image.open(io.BytesIO(stream.getvalue()))).tobytes() == expected.tobytes()


def test_a_tag_of_a_wrong_type_does_not_matter() -> None:
    """Pillow's exif_transpose writes all tags again, and fails on a resolution that is a text."""
    picture, stream = Image.new("RGB", (4, 8), "red"), io.BytesIO()
    tags = struct.pack("<H", 2) + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHI4s", 0x011A, 2, 4, b"72")
    picture.save(stream, "JPEG", exif=b"Exif\0\0II*\0" + struct.pack("<I", 8) + tags + bytes(4))
    assert to_rgb(Image.open(io.BytesIO(stream.getvalue()))).size == (8, 4)


def test_bytes_paths_and_structs_are_the_same_image(vision: Path, tmp_path: Path) -> None:
    content = encoded(gradient("RGB"))
    (tmp_path / "a.png").write_bytes(content)
    places: list[list[Any]] = [
        [content],
        ["a.png"],
        [str(tmp_path / "a.png")],
        [{"bytes": content, "path": None}],
        [{"bytes": None, "path": "a.png"}],
    ]
    batches = [examples(values, reader(vision), tmp_path).batch(np.array([0])) for values in places]
    for batch in batches:
        assert set(batch) == {"pixel_values", "targets"}
        assert batch["pixel_values"].equal(batches[0]["pixel_values"])


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (b"not an image", "rows.parquet row 2: its image cannot be read (UnidentifiedImageError"),
        (None, "row 2: its image cannot be read (it is missing)"),
        (b"", "row 2: its image cannot be read"),
    ],
)
def test_images_that_cannot_be_opened_are_refused_at_once(vision: Path, value: Any, says: str) -> None:
    with pytest.raises(DataError) as caught:
        examples([encoded(gradient()), value], reader(vision))
    assert says in str(caught.value)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_an_image_cut_short_is_refused_at_once_and_one_with_more_after_its_end_is_not(
    vision: Path, format: str
) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    whole = encoded(noise, format)
    with pytest.raises(DataError, match=r"rows\.parquet row 2: its image cannot be read \(OSError: .*truncated"):
        examples([whole, whole[: len(whole) // 2]], reader(vision))
    first, second = examples([whole, whole + bytes(2000)], reader(vision)).batch(np.arange(2))["pixel_values"]
    assert torch.equal(first, second)


def test_an_image_damaged_within_names_its_row(vision: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    whole = encoded(noise, "PNG")
    rows = examples([whole[:3000] + bytes(3000) + whole[6000:]], reader(vision))
    with pytest.raises(DataError, match=r"rows\.parquet row 1: its image cannot be read"):
        rows.batch(np.array([0]))


def test_the_size_is_the_processors_own_or_what_is_asked(vision: Path) -> None:
    own, asked = reader(vision), reader(vision, 8)
    assert own.size == (16, 16)
    assert own.num_positions == 1 + 16
    assert asked.size == (8, 8)
    assert asked.num_positions == 1 + 4
    assert examples([encoded(gradient())], asked).batch(np.array([0]))["pixel_values"].shape == (1, 3, 8, 8)
    # What the processor cuts off keeps its share: it scaled to 20 and cut 16 out, now it scales to 10 and cuts 8 out.
    assert dict(asked.processor.size) == {"shortest_edge": 10}


def test_a_size_that_patches_do_not_divide_is_refused(vision: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.image_size: got 10, the model's patches are 4 pixels wide.*multiple of 4, such as 8"
    ):
        reader(vision, 10)


def test_positions_are_stretched_where_the_model_must_be_asked(tmp_path: Path) -> None:
    vit = write_tiny_vision(tmp_path / "vit", family="ViT")
    assert reader(vit).switches == {}
    assert reader(vit, 8).switches == {"interpolate_pos_encoding": True}


def test_saved_processors_keep_the_size(vision: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((vision / "config.json").read_bytes())
    reader(vision, 8).save_pretrained(tmp_path)
    assert reader(tmp_path).size == (8, 8)


def rows_of_noise(image_reader: ImageReader, **options: Any) -> ImageExamples:
    """Eight different images."""
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in range(8)]
    return examples([encoded(image) for image in images], image_reader, **options)


@pytest.mark.parametrize("augment", sorted(AUGMENTATIONS))
def test_augmentation_depends_on_seed_epoch_and_row_alone(vision: Path, augment: str) -> None:
    rows = rows_of_noise(reader(vision), augment=augment)
    whole = rows.batch(np.arange(8), epoch=1)["pixel_values"]
    alone = [rows.batch(np.array([i]), epoch=1)["pixel_values"][0] for i in reversed(range(8))]
    assert all(whole[7 - i].equal(image) for i, image in enumerate(alone))
    others = [rows.batch(np.arange(8), epoch=2), replace(rows, seed=1).batch(np.arange(8), epoch=1)]
    assert all(whole.equal(other["pixel_values"]) == (augment == "none") for other in others)


@pytest.mark.parametrize("augment", sorted(AUGMENTATIONS))
def test_scored_rows_are_not_augmented(vision: Path, augment: str) -> None:
    plain = rows_of_noise(reader(vision)).batch(np.arange(8))["pixel_values"]
    assert rows_of_noise(reader(vision), augment=augment).batch(np.arange(8))["pixel_values"].equal(plain)


def test_crops_are_boxes_of_the_image() -> None:
    image = gradient("RGB")
    sizes = {AUGMENTATIONS["crop-flip"](image, np.random.default_rng(i)).size for i in range(50)}
    assert len(sizes) > 10
    assert all(3 / 4 * 0.8 <= width / height <= 4 / 3 * 1.25 for width, height in sizes)
    assert min(width * height for width, height in sizes) >= 0.3 * SIDE**2


def test_models_of_grey_images_get_one_channel(tmp_path: Path) -> None:
    grey = write_tiny_vision(tmp_path / "grey", num_channels=1)
    assert examples([encoded(gradient("RGB"))], reader(grey)).batch(np.array([0]))["pixel_values"].shape == (
        1,
        1,
        16,
        16,
    )


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"img": [b"x"], "label": [0]}, ("img", "label")),
        ({"id": ["3"], "image": ["a.png"], "label": [0]}, ("image", "label")),
        (
            {"photo": [{"bytes": b"x", "path": None}], "fine_label": [0], "text": ["t"], "label": [1]},
            ("photo", "label"),
        ),
        ({"file_name": ["a.png"], "class": ["c"]}, ("file_name", "class")),
    ],
)
def test_columns_are_detected(columns: dict[str, list[Any]], expected: tuple[str, str]) -> None:
    image, label, notes = choose_media_columns(pa.table(columns), "image", None, None, "rows.csv")
    assert (image, label) == expected
    assert notes[0] == f"image column '{image}' (detected; --image-column to change)"


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (None, "rows.csv: no column looks like images. Allowed: one of the columns note, label"),
        ("label", "rows.csv: image column 'label' holds int64"),
        ("picture", "--image-column 'picture' is not a column"),
    ],
)
def test_tables_without_images_are_refused(image: str | None, says: str) -> None:
    with pytest.raises(DataError) as caught:
        choose_media_columns(pa.table({"note": ["a"], "label": [1]}), "image", image, None, "rows.csv")
    assert says in str(caught.value)


def test_class_folders_are_splits_of_paths_and_labels(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            gradient().save(tmp_path / split / label / "1.png")
            (tmp_path / split / label / "notes.txt").write_text("x")
    data = load_data(DataPlace.parse(str(tmp_path)))
    train = data.require("train", "here")
    assert set(data.splits) == {"train", "val"} or set(data.splits) == {"train", "validation"}
    assert train.table.to_pydict() == {"image": ["cat/1.png", "dog/1.png"], "label": ["cat", "dog"]}
    assert train.folder == tmp_path / "train"
    assert load_data(DataPlace.parse(str(tmp_path / "train"))).require("train", "here").table.equals(train.table)
    assert len(data.origin["sha256"]["train"]) == 64


def test_a_folder_of_neither_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    with pytest.raises(
        DataError, match=r"no train, validation or test file; it holds cat.*folder of images for each class"
    ):
        load_data(DataPlace.parse(str(tmp_path)))


def test_a_processor_that_crops_a_part_by_itself_gives_the_asked_size(tmp_path: Path) -> None:
    from transformers import ConvNextConfig, ConvNextImageProcessorPil

    sizes = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "image_size": 64}
    ConvNextConfig(**sizes, architectures=["ConvNextForImageClassification"]).save_pretrained(tmp_path)
    ConvNextImageProcessorPil(size={"shortest_edge": 64}, crop_pct=0.875).save_pretrained(tmp_path)
    found = examples([encoded(Image.new("RGB", size)) for size in ((50, 80), (90, 70))], reader(tmp_path, 32))
    assert found.batch(np.arange(2))["pixel_values"].shape == (2, 3, 32, 32)


def test_a_processor_without_a_size_takes_none(monkeypatch: pytest.MonkeyPatch, vision: Path) -> None:
    monkeypatch.setattr("mirrortune.data.files.images.load_image_processor", lambda _: object())  # such as timm's
    assert reader(vision).size is None
    with pytest.raises(ConfigError, match=r"data\.image_size: this model's image processor has one size"):
        reader(vision, 32)
