# SPDX-License-Identifier: Apache-2.0
"""Decode images of any mode to pixels when their batch is made.

Only Pillow and the Pillow version of the model's image processor are used, so that results do not depend on whether
torchvision is installed. Random augmentation depends only on (seed, epoch, row), so it is the same for any number of
processes, in any order, and after a resume.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from mirrortune.data.dataset import Split
from mirrortune.data.examples import Batch, Examples, IntArray, Rows, Targets
from mirrortune.data.files.class_folders import IMAGE_FORMATS
from mirrortune.data.files.media import FileCells
from mirrortune.errors import ConfigError, DataError, counted, unknown_name
from mirrortune.models.load import ModelSource, forward_parameters, load_image_processor

Image = Any  # PIL.Image.Image; Pillow is imported when the first image is
_WHITE = 255
_ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
"""Mark at the end of a file, by format."""
_TAIL = 1024  # bytes that are searched for the mark, which some programs write a few others after
_ORIENTATION = 0x0112  # of EXIF
_TURNS = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
    8: "ROTATE_90",
}  # fmt: skip
"""Value of the tag -> what turns the image upright."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageReader:
    """A model's image processor, at the requested size.

    Attributes:
        processor: of transformers; ``size`` and ``crop_size`` are changed in place.
        size: (height, width) of the model's inputs, or None if the processor does not fix it.
        num_channels: 3, or 1 for models of grey images.
        num_positions: patches of an image plus one; 1 for models without patches.
        switches: additional arguments of the model's forward.
    """

    processor: Any
    size: tuple[int, int] | None
    num_channels: int
    num_positions: int
    switches: dict[str, bool] = field(default_factory=dict)

    @classmethod
    def load(cls, source: ModelSource, auto_class: str, asked: int | None) -> ImageReader:
        """Load the reader for a model; ``asked`` is the side of a square in pixels, None for the processor's size.

        Raises:
            ConfigError: if the model has no image processor, or does not support the size.
        """
        # Pillow warns about odd metadata, with a line of its source, from whichever thread makes the batch.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        processor = load_image_processor(source)
        config = source.config
        patch = getattr(config, "patch_size", None)
        patch = patch[0] if isinstance(patch, (list, tuple)) else patch
        own = getattr(config, "image_size", None)
        if asked is not None:
            if isinstance(patch, int) and asked % patch:
                near = round(asked / patch) * patch or patch
                raise ConfigError(
                    "data.image_size", f"got {asked}, the model's patches are {patch} pixels wide",
                    allowed=f"a multiple of {patch}, such as {near}",
                )  # fmt: skip
            if not hasattr(processor, "size"):
                raise ConfigError("data.image_size", "this model's image processor has one size", fix="Remove it")
            _set_size(processor, asked)
        size = _output_size(processor)
        is_other = size is not None and isinstance(own, int) and size != (own, own)
        patches = math.prod(side // patch for side in size) if size and isinstance(patch, int) else 0
        return cls(
            processor=processor,
            size=size,
            num_channels=getattr(config, "num_channels", None) or 3,
            num_positions=patches + 1,
            # Models with fixed position embeddings interpolate them to another grid only on request.
            switches={"interpolate_pos_encoding": True}
            if is_other and "interpolate_pos_encoding" in forward_parameters(auto_class, config)
            else {},
        )

    def pixels(self, images: list[Image], source: str) -> Batch:
        """Return the model inputs for ``images`` (RGB, or grey for models of grey images): tensors (B, ...)."""
        arguments: dict[str, Any] = {"images": images}
        if self.num_channels == 1:
            arguments = {"images": [np.asarray(i)[..., None] for i in images], "input_data_format": "channels_last"}
            arguments["do_convert_rgb"] = False
        try:
            made = dict(self.processor(**arguments, return_tensors="pt"))
        except ValueError as error:
            if self.size is None:
                raise DataError(
                    source, "the model's image processor leaves images at different sizes", fix="Set data.image_size"
                ) from error
            raise
        return {**made, **self.switches}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the processor's files, with the size in use."""
        self.processor.save_pretrained(folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageExamples(Examples):
    """Rows of images.

    Attributes:
        images: one per row.
        targets: one per row, shape (N,).
        num_unlabelled: rows without a target.
        reader: of the model.
        augment: a name in ``AUGMENTATIONS``.
        seed: of the augmentation.
    """

    images: FileCells
    targets: Targets
    num_unlabelled: int
    reader: ImageReader
    augment: str
    seed: int
    num_truncated: int = 0

    @override
    def __len__(self) -> int:
        return len(self.targets)

    @property
    @override
    def lengths(self) -> IntArray:
        return np.full(len(self), self.reader.num_positions)

    @override
    def batch(self, rows: Rows, epoch: int | None = None) -> Batch:
        """Return the outputs of the image processor for the given rows (``pixel_values``), and ``targets`` (B,)."""
        found = []
        for row in rows:
            image = self._image(int(row))
            if epoch is not None:
                image = AUGMENTATIONS[self.augment](image, np.random.default_rng([self.seed, epoch, int(row)]))
            found.append(image)
        batch = self.reader.pixels(found, self.images.places.source)
        batch["targets"] = torch.from_numpy(np.ascontiguousarray(self.targets[rows]))
        return batch

    @override
    def describe(self) -> str:
        size = "images of their own size" if self.reader.size is None else "{1} x {0} pixels".format(*self.reader.size)
        return f"{counted(len(self), 'row')}, {size}"

    def check(self) -> None:
        """Open every image, without decoding it if its file ends as its format does; DataError with the first that
        fails.
        """
        for row in range(len(self)):
            with self._opened(row) as image:
                if not _has_its_end(image):  # cut short, or merely written without an end
                    image.load()

    def _image(self, row: int) -> Image:
        with self._opened(row) as opened:
            return to_rgb(opened, self.reader.num_channels)

    @contextlib.contextmanager
    def _opened(self, row: int) -> Iterator[Image]:
        from PIL import Image as Pillow  # noqa: PLC0415

        try:
            with Pillow.open(self.images.open(row), formats=_formats()) as image:
                yield image
        except Pillow.DecompressionBombError as error:
            allowed = f"{2 * (Pillow.MAX_IMAGE_PIXELS or 0):,}"
            raise self.images.unreadable(row, f"it has {_bomb_size(error)}, allowed are {allowed}") from error
        except Exception as error:  # Pillow's plugins raise exceptions of all types
            raise self.images.unreadable(row, error) from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return the raster formats that this Pillow decodes by itself.

    Without such a list, Pillow would also try formats that start a program, such as PostScript, under any file name.
    """
    from PIL import Image as Pillow  # noqa: PLC0415

    Pillow.init()
    return tuple(sorted({*IMAGE_FORMATS.values()} & {*Pillow.OPEN}))


def _has_its_end(image: Image) -> bool:
    """Return whether the file of an opened image has the mark at its end that its format demands, if it does."""
    mark, file = _ENDS.get(image.format), getattr(image, "fp", None)
    if mark is None or file is None:
        return True
    place = file.tell()
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - _TAIL))
    tail = file.read(_TAIL)
    file.seek(place)
    return mark in tail


def _bomb_size(error: Exception) -> str:
    """Return the size of an image that is too large, from Pillow's error."""
    found = re.search(r"\d+ pixels", str(error))
    return f"{int(found[0].split()[0]):,} pixels" if found else str(error)


def to_rgb(image: Image, num_channels: int = 3) -> Image:
    """Convert any image to 8-bit RGB, or to grey for one channel.

    The image is rotated upright, 16 bits are scaled down, and transparency is composited over white. Of an animation,
    the first frame is used.
    """
    from PIL import Image as Pillow  # noqa: PLC0415

    image.load()
    # Not ImageOps.exif_transpose, which rewrites all other tags and fails on those of a wrong type.
    if (turn := _TURNS.get(image.getexif().get(_ORIENTATION))) is not None:
        image = image.transpose(Pillow.Transpose[turn])
    if image.mode.startswith("I") or image.mode == "F":
        image = Pillow.fromarray(_eight_bits(np.asarray(image)))
    if "transparency" in image.info or "A" in image.getbands() or image.mode == "PA":
        image = image.convert("RGBA")
        ground = Pillow.new("RGBA", image.size, (_WHITE, _WHITE, _WHITE, _WHITE))
        image = Pillow.alpha_composite(ground, image)
    return image.convert("L" if num_channels == 1 else "RGB")


def _eight_bits(values: Any) -> Any:
    """Scale 16-bit, 32-bit or floating-point grey values to 8 bits.

    The scale is the range of their type or, if the type does not determine it, the smallest common range that fits.
    """
    highest = float(values.max(initial=0))
    if values.dtype == np.uint16:
        top = 65535.0
    elif values.dtype.kind == "f":
        top = 1.0 if highest <= 1.0 else 255.0 if highest <= 255.0 else highest
    else:  # 32-bit integers hold 8 or 16 bits in practice
        top = 255.0 if highest <= 255 else 65535.0 if highest <= 65535 else highest
    return np.clip(np.rint(values.astype(np.float64) * (255.0 / top)), 0, 255).astype(np.uint8)


def _set_size(processor: Any, side: int) -> None:
    """Set the processor's output to ``side`` x ``side``; the proportion that it crops off is kept."""
    square = {"height": side, "width": side}
    size, crop = dict(processor.size or {}), dict(getattr(processor, "crop_size", None) or {})
    if getattr(processor, "do_center_crop", False) and crop.get("height"):
        scale = side / crop["height"]
        edges = ("shortest_edge", "height", "width")
        processor.size = {name: round(size[name] * scale) for name in edges if size.get(name)} or square
        processor.crop_size = square
    elif getattr(processor, "crop_pct", None) is not None:  # it crops to squares of the shortest edge by itself
        processor.size = {"shortest_edge": side}
    else:
        processor.size = square
    processor.do_resize = True


def _output_size(processor: Any) -> tuple[int, int] | None:
    size, crop = dict(getattr(processor, "size", None) or {}), dict(getattr(processor, "crop_size", None) or {})
    if getattr(processor, "do_center_crop", False) and crop.get("height"):
        return int(crop["height"]), int(crop["width"])
    if getattr(processor, "do_resize", False) and size.get("height"):
        return int(size["height"]), int(size["width"])
    return None


def _flip(image: Image, random: np.random.Generator) -> Image:
    from PIL import ImageOps  # noqa: PLC0415

    return ImageOps.mirror(image) if random.random() < 0.5 else image


def _crop(image: Image, random: np.random.Generator) -> Image:
    """Crop a random box of 35% to all of the area and of aspect 3:4 to 4:3 (Szegedy et al. 2015, section 6; with
    narrower ranges, as backbones are adapted here rather than trained).
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * random.uniform(0.35, 1.0)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        wide, high = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < high <= height:
            left, top = int(random.integers(width - wide + 1)), int(random.integers(height - high + 1))
            return image.crop((left, top, left + wide, top + high))
    return image


AUGMENTATIONS: dict[str, Callable[[Image, np.random.Generator], Image]] = {
    "none": lambda image, random: image,
    "flip": _flip,
    "crop-flip": lambda image, random: _flip(_crop(image, random), random),
}


def check_augmentation(name: str) -> None:
    """Raise a ConfigError with the nearest name if there is no such augmentation."""
    if name not in AUGMENTATIONS:
        raise unknown_name("data.augment", "augmentation", name, AUGMENTATIONS)


def encode_images(
    split: Split, column: str, targets: Targets, missing: Any, reader: ImageReader, *, augment: str, seed: int
) -> ImageExamples:
    """Encode the images of a split; DataError with the row of one that cannot be opened."""
    examples = ImageExamples(
        images=FileCells.of(split, column, role="image", readable=f"images ({', '.join(_formats())})"), targets=targets,
        num_unlabelled=int(missing.sum()), reader=reader, augment=augment, seed=seed,
    )  # fmt: skip
    examples.check()
    return examples
