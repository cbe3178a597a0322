# SPDX-License-Identifier: Apache-2.0
"""Real models from weights to a verified merge: scored as they are, trained for a few steps, merged, scored again.

    python -m tests.bench.real_models ASSETS FOLDER [NAME ...]

ASSETS is the folder of ``tests/bench/assets.py``; what is missing there is made. Every command is a process of its own,
as a user would start it; FOLDER gets the runs and the merged models. One JSON object is printed.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.assets import build
from tests.cli.console import finish, start

_SMOLLM2 = "smollm2-135m-instruct"
_CHAT = ("-t", "causal-lm", "--batch-size", 8, "--max-length", 64, "--max-steps", 8, "--lr", "2e-2",
         "--target-modules", "q_proj|v_proj")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model on data.

    Attributes:
        model: inside the folder of assets.
        data: inside the folder of assets.
        rows: of each split that are taken; of images, of each class.
        words: the command line besides model and data.
        base: a full-precision model, inside the folder of assets, that the adapter is merged into as well.
    """

    model: str
    data: str
    rows: dict[str, int]
    words: Sequence[object]
    base: str | None = None

    @property
    def assets(self) -> list[str]:
        """What has to be there."""
        return [name.partition("/")[0] for name in (self.model, self.data, self.base) if name is not None]


_TURNS = {"train": 64, "validation": 32}
CASES = {
    "SmolLM2-135M-Instruct, bf16 weights in float32": Case(
        model=_SMOLLM2, data="chatterbot", rows=_TURNS, words=(*_CHAT, "model.dtype=float32")
    ),
    "SmolLM2-135M-Instruct, GGUF Q4_1": Case(
        model="smollm2-135m-gguf/SmolLM2-135M-Instruct.Q4_1.gguf", data="chatterbot", rows=_TURNS,
        words=(*_CHAT, "model.dtype=float32"), base=_SMOLLM2,
    ),
    "SmolLM2-135M-Instruct, bitsandbytes 4bit": Case(
        model=_SMOLLM2, data="chatterbot", rows=_TURNS, words=(*_CHAT, "--load-in", "4bit", "model.dtype=float32"),
        base=_SMOLLM2,
    ),
    "SmolLM2-135M-Instruct, bitsandbytes 8bit": Case(
        model=_SMOLLM2, data="chatterbot", rows=_TURNS, words=(*_CHAT, "--load-in", "8bit", "model.dtype=float32"),
    ),
    "DINOv2-small": Case(
        model="dinov2-small", data="fashion-mnist-16shot", rows={"train": 16, "validation": 10},
        words=("-t", "image-classification", "data.image_size=98", "--epochs", 2, "--batch-size", 16),
    ),
}  # fmt: skip


def run(name: str, assets: Path, folder: Path) -> dict[str, Any]:
    """One case: the numbers of every command."""
    case = CASES[name]
    build(assets, case.assets)
    data, trained, merged = folder / "data", folder / "run", folder / "merged"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    take_rows(assets / case.data, data, case.rows)
    words = ["-m", assets / case.model, "-d", data, *case.words]
    found: dict[str, Any] = {}
    if "causal-lm" in case.words and "--load-in" not in case.words:
        found["before"] = _json("eval", assets / case.model, "-d", data, "-t", "causal-lm", "--max-length", 64,
                                "model.dtype=float32")["metrics"]  # fmt: skip
    result = _json("train", *words, "--method", "mirror", "-o", trained)
    found |= {key: result[key] for key in ("metrics", "trainable_parameters", "adapter_bytes", "train_seconds")}
    found["merge"] = _json("merge", trained, "-o", merged)["verification"]
    found["merged_bytes"] = sum(file.stat().st_size for file in merged.iterdir())
    found["merged_metrics"] = _json("eval", merged, "-d", data, *_reading(case))["metrics"]
    if case.base is not None:
        into = folder / "merged-full"
        found["merge --base"] = _json("merge", trained, "-o", into, "--base", assets / case.base)["verification"]
    return found


def _reading(case: Case) -> list[object]:
    """How a plain model is told to read the data."""
    at = {word: place for place, word in enumerate(case.words)}
    kept = [case.words[at[flag] : at[flag] + 2] for flag in ("-t", "--max-length") if flag in at]
    return [*(word for pair in kept for word in pair), *(w for w in case.words if str(w).startswith("data."))]


def take_rows(source: Path, target: Path, rows: dict[str, int]) -> None:
    """Some rows of each split, drawn with a fixed seed: lines, or images of each class."""
    draw = random.Random(0)
    for split, count in rows.items():
        if (source / f"{split}.jsonl").is_file():
            lines = (source / f"{split}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            target.mkdir(exist_ok=True)
            (target / f"{split}.jsonl").write_text("".join(draw.sample(lines, count)), encoding="utf-8")
        else:
            for place in sorted((source / split).iterdir()):
                (target / split / place.name).mkdir(parents=True)
                for file in draw.sample(sorted(place.iterdir()), count):
                    shutil.copy(file, target / split / place.name)


def _json(*words: object) -> dict[str, Any]:
    return finish(start(*words, "--json"), timeout=3600).data


def main() -> None:
    """Run the named cases, or all of them, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", choices=[[], *CASES], default=[])
    given = parser.parse_args()
    found = {name: run(name, given.assets, given.folder / str(list(CASES).index(name)))
             for name in given.names or CASES}  # fmt: skip
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
