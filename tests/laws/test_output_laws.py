# SPDX-License-Identifier: Apache-2.0
"""Laws of outputs: whatever lies where, a file that no marker lists is never changed, deleted or hidden."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path, PurePosixPath

from hypothesis import given, settings
from hypothesis import strategies as st

from mirrortune.errors import ConfigError, MirrortuneError
from mirrortune.system.outputs import (
    LORA,
    MARKER,
    MERGED,
    RUN,
    Input,
    Kind,
    Marker,
    may_replace,
    output_folder,
    read_marker,
    settle,
    write_marker,
)
from mirrortune.system.run_directory import RunDirectory

# The output is always "a"; what lies in it, beside it, and in what may be left over of it is drawn.
SCRATCH = ".a.ab12cd34.partial"
PLACES = ("a", "a", "a", ".a.replaced", SCRATCH, f"{SCRATCH}/a", "b")
NAMES = ("adapter", "adapter.json", "checkpoints", "step-000001", "state.json", "recipe.yaml", "notes.txt", "a", "b",
         ".recipe.yaml.ab12cd34.partial", ".step-000001.replaced", ".b.claim")  # fmt: skip
INSIDE = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map("/".join)
PATHS = st.tuples(st.sampled_from(PLACES), INSIDE).map("/".join)
KINDS = st.sampled_from([RUN, MERGED, LORA])
MARKED = st.dictionaries(st.sampled_from([*PLACES, "a/b"]), st.tuples(KINDS, st.booleans(), st.booleans()), max_size=5)
INPUTS = st.lists(st.one_of(PATHS, st.just("b")), max_size=2)


def listing(root: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def make(root: Path, files: list[str], marked: dict[str, tuple[Kind, bool, bool]]) -> set[str]:
    """Make files, and markers that list all or half of what is in their folders; returns what is nobody's."""
    for path in files:
        with suppress(OSError):  # a file stands where a folder should be
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(f"content of {path}")
    there, owned = list(listing(root)), set()
    for folder, (kind, is_pending, lists_all) in marked.items():
        inside = sorted(p for p in there if p.startswith(f"{folder}/"))
        if (root / folder).is_dir():
            listed = inside if lists_all else inside[::2]
            below = frozenset(PurePosixPath(p).relative_to(folder).as_posix() for p in listed)
            marker = Marker(kind.name, below, is_pending=is_pending)
            write_marker(root / folder, marker)
            owned |= {p for p in inside if marker.owns(PurePosixPath(p).relative_to(folder).as_posix())}
    return set(there) - owned


@settings(max_examples=300, deadline=None)
@given(
    files=st.lists(PATHS, max_size=14),
    marked=MARKED,
    inputs=INPUTS,
    kind=KINDS,
    overwrite=st.booleans(),
    fails=st.booleans(),
)
def test_nothing_that_is_not_listed_changes(
    files: list[str], marked: dict[str, tuple[Kind, bool, bool]], inputs: list[str], kind: Kind,
    overwrite: bool, fails: bool,
) -> None:  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        theirs = make(root, files, marked)
        before = listing(root)

        def write(folder: Path) -> None:
            (folder / "new.txt").write_text("new")
            if fails:
                raise ConfigError("output", "it was not written")

        read = [Input("model", root / path) for path in inputs]
        with suppress(MirrortuneError):
            if kind is RUN:
                run = RunDirectory(root / "a")
                with run.held(read, overwrite=overwrite, resume=False):
                    run.create()
                    if not fails:
                        run.take_place()
            else:
                with output_folder(root / "a", read, kind, overwrite=overwrite) as put:
                    put(write)
        after = listing(root)
        assert kept(before, after, theirs)


def kept(before: dict[str, bytes], after: dict[str, bytes], theirs: set[str]) -> bool:
    """Whether every one of these files is still there: where it was, or, where a folder that was set aside has come
    back or been replaced, at the same place below the output.
    """

    def places(path: str) -> set[str]:
        parts = PurePosixPath(path).parts
        return (
            {path}
            | ({PurePosixPath("a", *parts[1:]).as_posix()} if parts[0] == ".a.replaced" else set())
            | ({PurePosixPath(".a.replaced", *parts[1:]).as_posix()} if parts[0] == "a" else set())
        )

    return all(any(after.get(place) == before[path] for place in places(path)) for path in theirs)


@settings(max_examples=200, deadline=None)
@given(
    files=st.lists(PATHS, max_size=10),
    marked=MARKED,
    inputs=INPUTS,
    kind=KINDS,
)
def test_what_is_read_is_never_allowed_to_be_replaced(
    files: list[str], marked: dict[str, tuple[Kind, bool, bool]], inputs: list[str], kind: Kind
) -> None:
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        make(root, [*files, *inputs], marked)
        there = [path for path in inputs if (root / path).exists()]
        before = listing(root)
        try:
            may_replace(root / "a", [Input("model", root / path) for path in there], kind, overwrite=True)
        except ConfigError:
            pass
        else:
            for path in there:
                assert not PurePosixPath(path).is_relative_to("a")
                assert not PurePosixPath("a").is_relative_to(path)
            marker = read_marker(root / "a")
            left = {p for p in before if p.startswith("a/") and PurePosixPath(p).name != MARKER}
            assert marker is not None or not left or all(p.endswith(".partial") for p in left)
        assert listing(root) == before


@settings(max_examples=200, deadline=None)
@given(files=st.lists(PATHS, max_size=14), marked=MARKED)
def test_settling_loses_nothing_and_is_done_at_once(
    files: list[str], marked: dict[str, tuple[Kind, bool, bool]]
) -> None:
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        theirs = make(root, files, marked)
        before = listing(root)
        settle(root / "a")
        once = listing(root)
        assert kept(before, once, theirs)
        settle(root / "a")
        assert listing(root) == once
