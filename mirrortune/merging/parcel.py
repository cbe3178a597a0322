# SPDX-License-Identifier: Apache-2.0
"""Choose the files of an adapter or a merged model to push, and remove local paths from copies of them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from mirrortune.errors import ConfigError, VerificationError
from mirrortune.merging.redaction import DIGESTS, Redaction
from mirrortune.reports import model_card
from mirrortune.reports.finished_run import is_there, regular_file
from mirrortune.system.atomic import MARKER
from mirrortune.system.hub import ADAPTER_FILES
from mirrortune.system.outputs import read_marker
from mirrortune.system.paths import json_object_or_none, sha256_of
from mirrortune.system.tensor_files import INDEX, index_of, read_headers

CARD, RECIPE, RESULTS, REPORT, CURVES = "README.md", "recipe.yaml", "results.json", "merge.json", "curves.png"
_PNG = b"\x89PNG\r\n\x1a\n"
# Files of tokenizers and processors, which a person adds to the merge of a base that has none.
_OF_A_TOKENIZER = re.compile(
    r"(tokenizer|preprocessor|processor|feature_extractor|image_processor|video_preprocessor)_config\.json"
    r"|tokenizer\.(json|model)|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|(spiece|sentencepiece\.bpe|source|target)\.(model|spm)|chat_template\.(jinja|json)"
    r"|additional_chat_templates/[\w.-]+\.jinja|[\w.-]+\.tiktoken|normalizer\.json"
)
# Other texts that a merge copies from its base.
_SETTINGS = re.compile(
    r"(generation_)?config\.json|modules\.json|config_sentence_transformers\.json|sentence_[\w-]+_config\.json"
    r"|\d+_\w+/config\.json"
)
_MODULES = "modules.json"  # sentence-transformers' list of classes and subfolders
_LARGEST_TEXT = 16 * 2**20  # bytes; larger JSON files are vocabularies


@dataclass(slots=True)
class Parcel:
    """The files of one push.

    Attributes:
        staged: empty folder for copies.
        files: local file by path in the repository.
        left_out: files of the folder that are not uploaded.
        redaction: removes local paths from the copies.
        notes: what the user is told about the files.
    """

    staged: Path
    files: dict[str, Path] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    redaction: Redaction = field(default_factory=Redaction)
    notes: list[str] = field(default_factory=list)

    def write(self, name: str, text: str) -> None:
        """Add a file with the content ``text``."""
        path = self.staged / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        self.files[name] = path

    def add(self, folder: Path, name: str, redact: Callable[[str, str], str] | None = None) -> None:
        """Add a file of a folder, unchanged or with the content ``redact(text, name)``.

        Raises:
            VerificationError: the file is missing, damaged, a symbolic link, or not a regular file.
        """
        path = regular_file(folder, name)
        if redact is None:
            self.files[name] = path
            return
        try:
            self.write(name, redact(path.read_text(encoding="utf-8"), name))
        except UnicodeDecodeError as error:
            raise VerificationError(str(path), "it is not UTF-8", fix="Save it as UTF-8") from error
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise VerificationError(str(path), f"damaged ({type(error).__name__})", fix="Restore it") from error

    def digests(self) -> dict[str, str]:
        """Return the hashes of the copies."""
        copies = {name: path for name, path in self.files.items() if path.is_relative_to(self.staged)}
        return {name: sha256_of(path) for name, path in copies.items()}

    def describe(self) -> list[str]:
        """Return one line for each file with its size, each redaction, and the files that are left out."""
        width = max(map(len, self.files))
        lines = [f"  {name:{width}}  {path.stat().st_size:>15,} bytes" for name, path in sorted(self.files.items())]
        lines += [f"  {line}" for line in (*self.notes, *self.redaction.describe())]
        shown = ", ".join(self.left_out[:12]) + (", ..." if len(self.left_out) > 12 else "")
        return lines + ([f"  not sent, as not of the model: {shown}"] if self.left_out else [])


def adapter_parcel(folder: Path, staged: Path, *, is_of_run: bool) -> Parcel:
    """Collect the files of an adapter and, if it belongs to a run, the run's recipe, results and curves."""
    parcel = Parcel(staged)
    redaction = parcel.redaction
    config, weights = ADAPTER_FILES[2], (ADAPTER_FILES[1], ADAPTER_FILES[3])
    for name in weights:
        if is_there(folder / name):
            parcel.add(folder, name)
    digest = None
    if is_there(folder / config):
        parcel.add(folder, config, redaction.settings)
        digest = hashlib.sha256(parcel.files[config].read_bytes()).hexdigest()
    parcel.add(folder, ADAPTER_FILES[0], lambda text, name: redaction.adapter(text, name, digest))
    if is_of_run and folder.name == "adapter":
        for name, redact in ((RECIPE, redaction.recipe), (RESULTS, redaction.results), (CURVES, None)):
            if is_there(folder.parent / name):
                parcel.add(folder.parent, name, redact)
        _add_own_card(parcel, folder.parent)
        if CURVES in parcel.files and not parcel.files[CURVES].read_bytes().startswith(_PNG):
            raise VerificationError(str(parcel.files[CURVES]), "damaged (not a PNG image)", fix="Restore it")
    else:
        _add_own_card(parcel, folder)
    return parcel


def _add_own_card(parcel: Parcel, folder: Path) -> None:
    """Add the model card of a folder if a person has written or edited it."""
    if not is_there(folder / CARD):
        return
    parcel.add(folder, CARD, lambda text, _: text)
    if model_card.is_generated(parcel.files[CARD].read_text(encoding="utf-8")):
        del parcel.files[CARD]
    else:  # again, as the paths to cut are known only now
        parcel.add(folder, CARD, parcel.redaction.card)
        parcel.notes.append(f"{CARD} is the card of {folder}, which was written or edited by hand")


def merged_parcel(folder: Path, report: dict[str, Any], staged: Path) -> Parcel:
    """Collect the files of a merged model.

    These are the model card, the files in the merge report, and the files of a tokenizer or processor, which a person
    may have added.
    """
    parcel = Parcel(staged)
    redaction = parcel.redaction
    known = {
        path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_symlink() or path.is_file()
    }
    names = {*map(str, report["files"]), *(n for n in known if n == CARD or _OF_A_TOKENIZER.fullmatch(n))}
    parcel.left_out = sorted(known - names - {MARKER})
    texts = {
        RECIPE: redaction.recipe,
        REPORT: lambda text, name: redaction.merge_report(text, name, parcel.digests()),
        CARD: lambda text, name: model_card.edited(text, lambda own: redaction.card(own, name)),
    }
    # The card last: paths found in other files are cut from it. Before it the report, which holds their hashes.
    for name in sorted(names, key=lambda n: (n == CARD, n == REPORT, n)):
        _check_name(folder, name)
        is_setting = (
            name.endswith(".json") and name != _MODULES
            and (folder / name).is_file() and (folder / name).stat().st_size < _LARGEST_TEXT
        )  # fmt: skip
        parcel.add(folder, name, texts.get(name) or (redaction.settings if is_setting else None))
    return parcel


def check_texts(base: Path) -> None:
    """Check for symbolic links among the files of a base that are copied into a merged model, such as templates.

    A link in an untrusted model could point to any file of the user, whose copy ``push`` would then upload. Links that
    stay inside the folder or the Hub's cache are allowed.

    Raises:
        VerificationError: a link leads out of the folder; the error names it.
    """
    from huggingface_hub import constants  # noqa: PLC0415

    folder = Path(os.path.realpath(base))
    # The Hub's cache stores a repository as links: models--OWNER--NAME/snapshots/COMMIT/FILE -> ../../blobs/HASH.
    is_cached = folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--")
    roots = [folder.parents[1] if is_cached else folder, Path(os.path.realpath(constants.HF_HUB_CACHE))]
    for path in (*folder.glob("*"), *folder.glob("additional_chat_templates/*"), *folder.glob("*/config.json")):
        name, real = path.relative_to(folder).as_posix(), Path(os.path.realpath(path))
        is_copied = _OF_A_TOKENIZER.fullmatch(name) or _SETTINGS.fullmatch(name)
        if is_copied and not any(real.is_relative_to(root) for root in roots):
            raise VerificationError(
                str(base / name), f"it is a link out of the model's folder, to {real}, and is not copied",
                fix="Put the file itself there",
            )  # fmt: skip


def _check_name(folder: Path, name: str) -> None:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or any(part.startswith(".") for part in pure.parts) or "\\" in name:
        raise VerificationError(
            str(folder / REPORT), f"it lists '{name}', which is not a file of a model", fix="Merge again"
        )


def check_files(folder: Path, report: dict[str, Any]) -> list[str]:
    """Check that the weights of a merged model are those that the merge has verified, by its records.

    Args:
        folder: merged folder.
        report: report of the merge.

    Returns:
        Notes for the user: other files that were changed.

    Raises:
        VerificationError: a file of weights is missing, cut off or changed, or the records disagree.
    """
    names, digests, marker = {*map(str, report["files"])}, report[DIGESTS], read_marker(folder)
    for name in names:
        _check_name(folder, name)
    recorded = names if marker is None else marker.files
    weights_there = {name for name in recorded if name.endswith(".safetensors")}
    if odd := (names - recorded) | (weights_there - names):
        problem = f"{MARKER} and {REPORT} disagree about '{min(odd)}'"
        raise VerificationError(str(folder), problem, fix="Merge again")
    try:
        names |= set(index_of(folder / INDEX)) if (folder / INDEX).exists() else set()
        weights = [regular_file(folder, name) for name in sorted(names) if name.endswith(".safetensors")]
        read_headers(weights)
    except ConfigError as error:
        raise VerificationError(error.where, error.problem, fix="Merge again") from error
    changed = sorted(n for n in names & digests.keys() - {CARD} if sha256_of(regular_file(folder, n)) != digests[n])
    if found := [name for name in changed if ".safetensors" in name]:
        problem = f"it was changed after the merge was verified: its hash is not the one in {REPORT}"
        raise VerificationError(str(folder / found[0]), problem, fix="Merge again")
    if unknown := [path.name for path in weights if path.name not in digests]:
        raise VerificationError(str(folder / unknown[0]), f"{REPORT} holds no hash of it", fix="Merge again")
    return [f"{name} was changed after the merge" for name in changed]


def read_report(folder: Path) -> dict[str, Any]:
    """Read the report ``merge.json`` of a merged folder.

    Raises:
        VerificationError: the report is damaged.
    """
    found = json_object_or_none(regular_file(folder, REPORT)) or {}
    types = {"verification": dict, "files": list, DIGESTS: dict}
    if not all(isinstance(found.get(key), kind) for key, kind in types.items()):
        raise VerificationError(str(folder / REPORT), "damaged", fix="Merge again")
    return found
