# SPDX-License-Identifier: Apache-2.0
"""Laws of outputs: only folders that mirrortune wrote are replaced, and nothing that it did not write is ever changed,
deleted or hidden.

Whose a path is follows from how the worlds below are made, not from :meth:`Marker.owns`, which is under test.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirrortune.errors import ConfigError
from mirrortune.system import atomic, outputs, run_directory
from mirrortune.system.atomic import MARKER, discard
from mirrortune.system.claims import claimed
from mirrortune.system.outputs import (
    LORA,
    MERGED,
    RUN,
    Input,
    Marker,
    OutputKind,
    may_replace,
    output_folder,
    settle,
    write_marker,
)
from mirrortune.system.run_directory import RunDirectory
from tests.trees import tree

# What mirrortune wrote into the folder "a" or what waits beside it: listed in its marker, or reserved for runs.
LISTED = ("model.safetensors", "config.json", "sub/config.json", "sub/deep/vocab.txt")
RESERVED = (
    "recipe.yaml", "metrics.jsonl", "adapter/adapter.json", "checkpoints/step-000001/state.json",
    "tensorboard/mirrortune/events.out.tfevents.1.a.2.0", "wandb/run-20260101_000000-ab/files/config.yaml",
    "checkpoints/.step-000001.replaced/state.json",
)  # fmt: skip
# What a user put there. A name that ends in / is an empty folder; those with > are links to the outside.
THEIRS = (
    "notes.txt", "notes/mine.txt", "sub/notes.txt", "sub/deep/notes.txt", "sub/deep/deeper/notes.txt",
    "adapter/notes.txt", "checkpoints/notes.txt", "checkpoints/step-000001/notes.txt", "adapter.json", "state.json",
    ".notes.txt.mt-ab12cd34.partial", ".notes.replaced/notes.txt", "checkpoints/.notes.replaced/state.json", "wandb",
    ".hidden", ".mine.claim", "merged/config.json", f"merged/{MARKER}", "Recipe.yaml", "plans/", "sub/plans/",
    "wandb/x/recipe.yaml", "tensorboard/notes.txt", "._backup/notes.txt",
    "checkpoints/step-000001/plans/", "link>thesis.txt", "link>folder", "sub/link>folder", "sub>folder",
    "adapter>folder", "checkpoints>folder", "checkpoints/step-000001>folder", "reports>folder",
)  # fmt: skip
CONTENT = (*LISTED, *RESERVED)
SCRATCH = ".a.mt-ab12cd34.partial"
MARKERS = st.sampled_from(["own", "own", "own", "other kind", "none", "linked", "broken"])
KINDS = st.sampled_from([RUN, MERGED, LORA])


@dataclass(frozen=True)
class Folder:
    """What is drawn for one folder that an output command may meet.

    Attributes:
        kind: of the command that wrote it.
        ours: paths that it wrote.
        theirs: paths that a user added.
        marker: whether it is there and valid.
        is_pending: whether the marker says that the folder it replaces still waits.
    """

    kind: OutputKind
    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    marker: str
    is_pending: bool = False


@st.composite
def folders(draw: st.DrawFn, kinds: st.SearchStrategy[OutputKind] = KINDS) -> Folder:
    """A folder of a kind, half of them with something of the user's in it."""
    kind = draw(kinds)
    ours = draw(st.lists(st.sampled_from([*LISTED, *RESERVED] if kind is RUN else LISTED), max_size=4, unique=True))
    theirs = draw(st.lists(st.sampled_from(THEIRS), min_size=1, max_size=2, unique=True)) if draw(st.booleans()) else []
    marker = draw(MARKERS)
    return Folder(kind, tuple(ours), tuple(theirs), marker, is_pending=draw(st.sampled_from([False, False, True])))


@dataclass
class World:
    """A folder with the output ``a``, what lies beside it, and the user's own things elsewhere.

    Attributes:
        root: holds ``a``.
        outside: of the user, what links lead to.
        theirs: paths below ``root`` of the user.
    """

    root: Path
    outside: Path
    theirs: set[str] = field(default_factory=set)

    @property
    def output(self) -> Path:
        return self.root / "a"

    def is_free(self, place: str) -> bool:
        """Whether nothing is there, nor a link or a file where a folder would be needed."""
        name = place.partition(">")[0]
        above = [self.root / part for part in PurePosixPath(name).parents]
        return not os.path.lexists(self.root / name) and not any(p.is_symlink() or p.is_file() for p in above)

    def put(self, place: str, *, theirs: bool) -> None:
        """Make a path where it is free."""
        if not self.is_free(place):
            return
        name, _, target = place.partition(">")
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if target:
            path.symlink_to(self.outside / target)
        elif name.endswith("/"):
            path.mkdir()
        else:
            path.write_text(f"content of {name}")
        if theirs:
            self.theirs.add(name.rstrip("/"))

    def fill(self, folder: str, content: Folder) -> None:
        """Make a folder with its marker, which lists what is not reserved."""
        (self.root / folder).mkdir(parents=True)
        for below in content.theirs:
            self.put(f"{folder}/{below}", theirs=True)
        for below in content.ours:
            self.put(f"{folder}/{below}", theirs=False)
        self.mark(folder, content)

    def mark(self, folder: str, content: Folder) -> None:
        place = self.root / folder
        kind = content.kind.name if content.marker != "other kind" else "figures"
        there = {p.relative_to(place).as_posix() for p in place.rglob("*")}
        marker = Marker(kind, frozenset(there & set(content.ours) & set(LISTED)), is_pending=content.is_pending)
        if content.marker == "linked":  # to one that would allow anything
            write_marker(self.outside, Marker(content.kind.name, frozenset(there)))
            (place / MARKER).symlink_to(self.outside / MARKER)
        elif content.marker == "broken":
            (place / MARKER).write_text('{"files": ["' + '", "'.join(there) + '"]}')
        elif content.marker != "none":
            write_marker(place, marker)

    def seen(self) -> dict[str, str]:
        """What every path is."""
        return {p.removeprefix(f"{self.root.parent}/"): what for p, what in tree(self.root, self.outside).items()}


@contextmanager
def world() -> Iterator[World]:
    """Make a world with nothing in it but what links lead to; nothing waits for the disk."""
    with tempfile.TemporaryDirectory() as place, patch.object(os, "fsync", lambda handle: None):
        made = World(Path(place, "root"), Path(place, "outside"))
        made.root.mkdir()
        for name in ("thesis.txt", "folder/adapter.json", "folder/state.json", "folder/notes.txt"):
            (made.outside / name).parent.mkdir(parents=True, exist_ok=True)
            (made.outside / name).write_text(f"years of work on {name}")
        yield made


def replace(
    made: World,
    kind: OutputKind,
    *,
    overwrite: bool,
    read: list[Input],
    meanwhile: tuple[str, ...] = (),
    fails: bool = False,
) -> None:
    """Write the output as a command does; ``meanwhile`` the user puts something there."""

    def work() -> None:
        with pytest.raises(ConfigError, match="is writing there"), claimed(made.output):
            raise AssertionError("the output is not claimed while it is written")
        for place in meanwhile:
            made.put(f"a/{place}", theirs=True)

    if kind is RUN:
        run = RunDirectory(made.output)
        with run.held(read, overwrite=overwrite, resume=False):
            work()
            run.create(read, overwrite=overwrite)
            run.write_text("recipe.yaml", "new")
            if fails:
                raise ConfigError("output", "failed as it was meant to")
            run.take_place()
        return

    def write(folder: Path) -> None:
        (folder / "new").mkdir()
        (folder / "new" / "model.safetensors").write_text("new")
        work()
        if fails:
            raise ConfigError("output", "failed as it was meant to")

    with output_folder(made.output, read, kind, overwrite=overwrite) as put:
        put(write)


def may_be_replaced(content: Folder | None, theirs: set[str], kind: OutputKind, *, overwrite: bool) -> bool:
    """What the rules say of a folder, by how it was made."""
    if theirs:
        return False
    if content is None or (content.marker == "none" and not content.ours):  # missing or empty
        return True
    is_ours = content.marker == "own" and content.kind is kind
    return is_ours and (overwrite or not content.ours)  # one with nothing but its marker was never begun


READ = st.lists(st.sampled_from(["a", "a/sub", "a/notes.txt", "b", ".", "a/../a"]), max_size=1)


@settings(max_examples=300)
@given(
    content=st.one_of(st.none(), folders()),
    same_kind=st.sampled_from([True, True, True, False]),
    kind=KINDS,
    read=READ,
    overwrite=st.sampled_from([True, True, False]),
    fails=st.booleans(),
    meanwhile=st.lists(st.sampled_from(THEIRS), max_size=1).map(tuple),
)
def test_a_folder_is_replaced_only_if_all_in_it_is_ours(
    content: Folder | None, same_kind: bool, kind: OutputKind, read: list[str], overwrite: bool, fails: bool,
    meanwhile: tuple[str, ...],
) -> None:  # fmt: skip
    with world() as made:
        if content is not None:
            made.fill("a", content)
            kind = content.kind if same_kind else kind
        inputs = [Input("model", made.root / path) for path in read]
        is_read = any(path != "b" and (made.root / path).exists() for path in read)
        is_allowed = not is_read and may_be_replaced(content, made.theirs, kind, overwrite=overwrite)
        before = made.seen()
        meanwhile = tuple(place for place in meanwhile if made.is_free(f"a/{place}"))
        words: dict[str, Any] = {"overwrite": overwrite, "read": inputs, "meanwhile": meanwhile, "fails": fails}

        if is_allowed and not meanwhile and not fails:
            replace(made, kind, **words)
            new = {"root/a/recipe.yaml", "root/a/checkpoints"} if kind is RUN else {"root/a/new/model.safetensors"}
            left = {p for p in made.seen() if p.startswith("root/")} - {"root/a", "root/a/new", f"root/a/{MARKER}"}
            assert left == new
            assert {p: w for p, w in made.seen().items() if p.startswith("outside/")} == {
                p: w for p, w in before.items() if p.startswith("outside/")
            }
            return
        with pytest.raises(ConfigError):
            replace(made, kind, **words)
        after = made.seen()
        is_new_run = kind is RUN and is_allowed and not before.keys() & {f"root/a/{path}" for path in CONTENT}
        changed = {p: w for p, w in after.items() if before.get(p) != w}
        if not is_new_run:  # one that failed stays, with what it says about it
            assert before.keys() <= after.keys()
            assert all(p.removeprefix("root/") in made.theirs or w == "folder" for p, w in changed.items())
        if not (is_new_run or (is_allowed and meanwhile)):
            assert after == before


@settings(max_examples=120)
@given(
    content=folders(),
    late=st.lists(st.sampled_from([*THEIRS, "new/mine.txt", "new>folder"]), min_size=1, max_size=2).map(tuple),
    is_exchanged=st.booleans(),
)
def test_what_comes_after_the_last_look_is_moved_into_the_new_folder(
    content: Folder, late: tuple[str, ...], is_exchanged: bool
) -> None:
    """A user may save a file between the check and the exchange; no lock keeps them out."""
    with world() as made:
        made.fill("a", Folder(content.kind, content.ours, (), "own"))
        before = made.seen()
        came: dict[str, str] = {}
        looks = []

        def look(*words: Any, **named: Any) -> None:
            may_replace(*words, **named)
            looks.append(words)
            if len(looks) == 2:
                for place in late:
                    made.put(f"a/{place}", theirs=True)
                came.update({p: w for p, w in made.seen().items() if p.removeprefix("root/") in made.theirs})

        exchange = atomic.exchange if is_exchanged else lambda one, other: False
        with (
            patch.object(outputs, "may_replace", look),
            patch.object(run_directory, "may_replace", look),
            patch.object(atomic, "exchange", exchange),
        ):
            replace(made, content.kind, overwrite=True, read=[])
        after = made.seen()
        for path, what in came.items():
            # What has a name that the new folder has too lies beside it.
            name = PurePosixPath(path).name
            is_taken = path in ("root/a/new", "root/a/checkpoints")
            places = [path, f"a.old/{name}", f".a.replaced/{name}"] if is_taken else [path]
            assert any(w == what and any(map(PurePosixPath(p).match, places)) for p, w in after.items()), path
        outside = {p: w for p, w in before.items() if p.startswith("outside/")}
        assert {p: w for p, w in after.items() if p.startswith("outside/")} == outside


@dataclass(frozen=True)
class Leftover:
    """What a killed process may have left beside an output, or a user has there under such a name.

    Attributes:
        old: the folder that was set aside.
        scratch: whether the temporary folder has the marker of one, another or none.
        written: what is in it, under the output's name.
    """

    old: Folder | None
    scratch: str | None
    written: Folder | None


LEFTOVERS = st.builds(
    Leftover,
    old=st.one_of(st.none(), folders()),
    scratch=st.sampled_from([None, "unfinished", "unfinished", "other", "none"]),
    written=st.one_of(st.none(), folders(st.just(MERGED))),
)


def lay(made: World, left: Leftover) -> None:
    """Make the leftovers of ``a``."""
    if left.old is not None:
        made.fill(".a.replaced", left.old)
    if left.scratch is not None:
        (made.root / SCRATCH).mkdir()
        if left.written is not None:
            made.fill(f"{SCRATCH}/a", left.written)
        if left.scratch != "unfinished":
            made.put(f"{SCRATCH}/notes.txt", theirs=True)
        if left.scratch != "none":
            write_marker(made.root / SCRATCH, Marker(left.scratch, frozenset()))


def lost(made: World, before: dict[str, str], left: Leftover) -> set[str]:
    """What the user had and has no more, neither where it was nor at the same place in the output or what waits
    for it. In a temporary folder of ours, content without a marker was being written, and nobody's.
    """
    after = made.seen()
    is_half = left.scratch == "unfinished" and left.written and left.written.marker not in ("own", "other kind")
    gone = set()
    for path in made.theirs:
        if is_half and path.startswith(SCRATCH):
            continue
        below = path.removeprefix(f"{SCRATCH}/a/").removeprefix(".a.replaced/").removeprefix("a/")
        places = {path, f"a/{below}", f".a.replaced/{below}"}
        if not any(after.get(f"root/{place}") == before[f"root/{path}"] for place in places):
            gone.add(path)
    return gone


@settings(max_examples=300)
@given(
    content=st.one_of(st.none(), folders()),
    left=LEFTOVERS,
    kind=KINDS,
    overwrite=st.booleans(),
    fails=st.booleans(),
)
def test_leftovers_cost_the_user_nothing(
    content: Folder | None, left: Leftover, kind: OutputKind, overwrite: bool, fails: bool
) -> None:
    with world() as made:
        if content is not None:
            made.fill("a", content)
        lay(made, left)
        before = made.seen()
        outside = {p: w for p, w in before.items() if p.startswith("outside/")}

        settle(made.output)
        once = made.seen()
        assert not lost(made, before, left)
        settle(made.output)
        assert made.theirs or made.seen() == once

        with suppress(ConfigError):
            replace(made, kind, overwrite=overwrite, read=[], fails=fails)
        assert not lost(made, before, left)
        assert {p: w for p, w in made.seen().items() if p.startswith("outside/")} == outside


@settings(max_examples=120)
@given(old=folders(), new=folders(), scratch=folders(st.just(MERGED)), is_pending=st.booleans())
def test_what_a_killed_process_left_is_put_right(old: Folder, new: Folder, scratch: Folder, is_pending: bool) -> None:
    """An old folder comes back as long as its successor has no checkpoint, goes afterwards; temporary ones go."""
    with world() as made:
        made.fill("a", Folder(old.kind, old.ours, (), "own"))
        whole = made.seen()
        made.output.rename(made.root / ".a.replaced")
        made.fill("a", Folder(new.kind, new.ours, (), "own", is_pending=is_pending))
        successor = made.seen()
        (made.root / SCRATCH).mkdir()
        write_marker(made.root / SCRATCH, Marker("unfinished", frozenset()))
        made.fill(f"{SCRATCH}/a", Folder(MERGED, scratch.ours, (), scratch.marker))
        settle(made.output)
        kept = {p: w for p, w in successor.items() if not p.startswith("root/.a.replaced")}
        expected = whole if is_pending else kept
        after = made.seen()
        assert {p: w for p, w in after.items() if p.startswith("root/")} == {
            p: w for p, w in expected.items() if p.startswith("root/")
        }


@settings(max_examples=120)
@given(
    content=folders(),
    already=st.lists(st.sampled_from(THEIRS), max_size=2),
    moves=st.booleans(),
)
def test_only_what_is_ours_is_discarded(content: Folder, already: list[str], moves: bool) -> None:
    """The deletion alone, without the check before it: as of old checkpoints and of adapters that are replaced."""
    with world() as made:
        made.fill("a", Folder(content.kind, content.ours, content.theirs, "none"))
        ours = {f"a/{path}" for path in content.ours} & {p.removeprefix("root/") for p in made.seen()} - made.theirs
        for place in already:
            made.put(f"b/{place}", theirs=True)
        before = made.seen()
        discard(made.output, is_ours=lambda below: f"a/{below}" in ours, into=made.root / "b" if moves else None)
        after = made.seen()
        for path in made.theirs:
            what = before[f"root/{path}"]
            places = {path, f"b/{path.removeprefix('a/')}"} if moves else {path}
            assert any(after.get(f"root/{place}") == what for place in places), path
        assert not {f"root/{path}" for path in ours} & after.keys()
        assert {p: w for p, w in after.items() if p.startswith("outside/")} == {
            p: w for p, w in before.items() if p.startswith("outside/")
        }
