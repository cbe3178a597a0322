# SPDX-License-Identifier: Apache-2.0
"""A Hub on loopback that serves real data sets under the ids that the shipped recipes name.

    python -m tests.bench.real_hub [FOLDER]

FOLDER holds parquet files, a folder ``owner__name`` for each data set and a folder in it for each configuration; by
default it is ``$MIRRORTUNE_REALDATA``, or ``../shared/realdata`` beside this checkout. The data is not part of
mirrortune: most of it is licensed for research only. Prints the environment of a client, serves until Ctrl-C, and
exits with a word if the folder is not there. Models are not served: name a local one.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

from tests.hub_server import LoopbackHub

FOLDER_VARIABLE = "MIRRORTUNE_REALDATA"
_BESIDE = Path(__file__).parents[2].parent / "shared" / "realdata"
_SPLITS = ("train", "validation", "test")


def data_folder(given: Path | None = None) -> Path | None:
    """Return the folder of the data: ``given``, that of the environment, or that beside the checkout; None if it is
    missing or holds no data set.
    """
    folder = given or Path(os.environ.get(FOLDER_VARIABLE) or _BESIDE)
    return folder.resolve() if any(folder.glob("*__*/**/*.parquet")) else None


def publish(source: Path, root: Path) -> list[str]:
    """Link every data set of ``source`` into the folder of a Hub, write its card, and return the ids."""
    published = []
    for folder in sorted(source.glob("*__*")):
        files = sorted(path.relative_to(folder) for path in folder.rglob("*.parquet"))
        if not files:
            continue
        name = folder.name.replace("__", "/", 1)
        target = root / "datasets" / name
        for file in files:
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            (target / file).symlink_to((folder / file).resolve())
        (target / "README.md").write_text(card(files), encoding="utf-8")
        published.append(name)
    return published


def card(files: Sequence[Path]) -> str:
    """Return a data set's README.md, whose front matter names configurations, splits and their files.

    Args:
        files: relative to the repository. A folder is a configuration, except ``data``, which like the top level holds
            the only one, as on the Hub.
    """
    configs = []
    for folder in sorted({file.parent for file in files}):
        splits = [s for s in _SPLITS if any(f.parent == folder and f.name.startswith(f"{s}-") for f in files)]
        found = [{"split": split, "path": (folder / f"{split}-*").as_posix()} for split in splits]
        name = folder.as_posix()
        configs.append({"config_name": "default" if name in (".", "data") else name, "data_files": found})
    return f"---\n{yaml.safe_dump({'configs': configs}, sort_keys=False)}---\n"


@contextmanager
def real_hub(source: Path) -> Iterator[LoopbackHub]:
    """Serve the data sets of ``source`` in the body of a ``with`` statement."""
    with tempfile.TemporaryDirectory(prefix="mirrortune-real-hub-") as place:
        publish(source, Path(place))
        with LoopbackHub(Path(place)) as hub:
            yield hub


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    given = parser.parse_args().folder
    source = data_folder(given)
    if source is None:
        missing = given or os.environ.get(FOLDER_VARIABLE) or _BESIDE
        sys.stdout.write(f"skipped: no data sets in {missing} (name a folder, or set {FOLDER_VARIABLE})\n")
        return
    with real_hub(source) as hub:
        sys.stdout.write(f"HF_ENDPOINT={hub.endpoint} HF_HUB_OFFLINE=0\n")
        sys.stdout.flush()
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    main()
