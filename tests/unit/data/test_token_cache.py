# SPDX-License-Identifier: Apache-2.0
"""The cache of tokens: it says why it missed, it is made by one of several processes, and it never holds all rows."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirrortune.data import token_cache
from mirrortune.data.token_cache import Chunk, TokenKey, cached_tokens, data_digest, ragged, uncached
from mirrortune.errors import ResourceError
from mirrortune.system.paths import cache_folder
from tests.tiny_models import tiny_tokenizer

KEY = TokenKey(
    rows="rows.csv (training rows)", kind="text", parts={"data": "a" * 64, "length": "128", "task code": "1.2"}
)


def chunks(rows: list[list[int]], size: int) -> Iterator[Chunk]:
    """Rows of tokens in chunks of a few, each with a count."""
    for start in range(0, len(rows), size):
        flat, offsets = ragged(rows[start : start + size])
        yield len(offsets) - 1, {"input_ids": flat, "offsets": offsets}, {"seen": len(offsets) - 1}


@given(
    rows=st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=5), min_size=1, max_size=9), size=st.integers(1, 10),
    is_writable=st.booleans(), mapped_from=st.sampled_from([0, 1 << 20]),
)  # fmt: skip
def test_rows_come_back_whatever_their_chunks(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[int]], size: int, is_writable: bool, mapped_from: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("MIRRORTUNE_CACHE", str(folder))
        if not is_writable:
            (folder / "tokens").write_text("in the way")

        for _ in range(2):
            arrays, counts = cached_tokens(
                KEY, lambda: chunks(rows, size), str, num_rows=len(rows), mapped_from=mapped_from
            )

            flat, offsets = ragged(rows)
            np.testing.assert_array_equal(arrays["input_ids"], flat)
            np.testing.assert_array_equal(arrays["offsets"], offsets)
            assert counts == {"seen": len(rows)}
            assert isinstance(arrays["input_ids"].base, np.memmap) == bool(
                is_writable and not mapped_from and len(flat)
            )
        assert not list(folder.rglob("*.partial"))


def test_it_says_what_is_new(tmp_path: Path) -> None:
    said: list[str] = []

    def ask(**parts: str) -> str:
        key = replace(KEY, parts=KEY.parts | parts)
        cached_tokens(key, lambda: chunks([[1, 2], [3]], 1), said.append, num_rows=2)
        return said[-1].removeprefix("tokens of rows.csv (training rows): ")

    assert ask() == "created for the first time"
    assert ask() == "from the cache"
    assert ask(length="64") == "recreated: length (128 before, 64 now) changed"
    assert ask(length="64", data="b" * 64) == "recreated: data changed"
    assert ask(data="c" * 64) == "recreated: data, length (64 before, 128 now) changed"
    assert ask() == "from the cache"
    assert ask(**{"task code": "2.2"}) == "recreated: task code (1.2 before, 2.2 now) changed"
    assert ask() == "from the cache"
    for entry in (cache_folder() / "tokens").rglob("*.safetensors"):
        entry.unlink()
    assert ask() == "recreated: not in the cache"


def test_every_part_has_a_name_that_a_user_knows() -> None:
    tokenizer = tiny_tokenizer()
    key = TokenKey.of("rows", "digest", tokenizer, columns=["text"], task=("kind", 1), chat_template=None, length=9)

    assert list(key.parts) == ["data", "tokenizer", "columns", "chat template", "length", "task code"]
    tokenizer.add_tokens(["movies"])
    other = TokenKey.of("rows", "digest", tokenizer, columns=["text"], task=("kind", 1), chat_template=None, length=9)
    assert [name for name in key.parts if key.parts[name] != other.parts[name]] == ["tokenizer"]


@given(st.lists(st.tuples(st.text(max_size=4), st.text(max_size=4)), min_size=1, max_size=8), st.integers(1, 9))
def test_the_digest_is_of_the_texts_and_their_borders_alone(rows: list[tuple[str, str]], size: int) -> None:
    first, second = map(list, zip(*rows, strict=True))
    parts = [[first[i : i + size], second[i : i + size]] for i in range(0, len(rows), size)]

    whole = data_digest([[first, second]])

    assert data_digest(parts) == whole
    assert data_digest([[[*first[:-1], first[-1] + "x"], second]]) != whole
    assert data_digest([[[*first, ""], [*second, ""]]]) != whole
    if first != second:
        assert data_digest([[second, first]]) != whole


def test_null_is_no_text_and_a_list_is_no_writing_of_it() -> None:
    cells: list[list[Any]] = [[None], [""], ["null"], ["[]"], [[]], [{"a": None}]]
    types = ["string"] * 4 + ["list<item: null>", "struct<a: null>"]
    assert len({data_digest([[column]], [kind]) for column, kind in zip(cells, types, strict=True)}) == 6


def test_a_disk_without_room_is_said_before_more_is_made() -> None:
    made: list[int] = []

    def make() -> Iterator[Chunk]:
        for number, chunk in enumerate(chunks([[1, 2], [3]], 1)):
            made.append(number)
            yield chunk

    with pytest.raises(ResourceError, match=r"MiB are needed \(tokens of rows.csv \(training rows\) .* MiB are free"):
        cached_tokens(KEY, make, str, num_rows=2**60)
    assert made == [0]
    assert not list(cache_folder().rglob("*.partial"))
    with uncached():
        cached_tokens(KEY, make, str, num_rows=2**60)


def _prepare(started: Any, waits: Any, said: Any, makes: Any) -> None:
    """Make the tokens once another process has looked for them, or be that process."""
    alone_with = token_cache.alone_with

    def noted(path: Path) -> AbstractContextManager[bool]:
        if started.is_set():
            waits.set()
        return alone_with(path)

    def make() -> Iterator[Chunk]:
        with makes.get_lock():
            makes.value += 1
        started.set()
        assert waits.wait(120)
        yield from chunks([[1, 2], [3]], 1)

    token_cache.alone_with = noted  # of this forked process alone
    arrays, _ = cached_tokens(KEY, make, said.put, num_rows=2)
    assert arrays["input_ids"].tolist() == [1, 2, 3]


def test_one_of_two_processes_makes_them_and_the_other_waits(
    pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pytestconfig.rootpath)  # where coverage, which measures forked processes too, was started
    context = multiprocessing.get_context("fork")
    started, waits, said, makes = context.Event(), context.Event(), context.Queue(), context.Value("i", 0)
    one, other = (context.Process(target=_prepare, args=(started, waits, said, makes)) for _ in range(2))

    one.start()
    assert started.wait(120)
    other.start()
    told = sorted(said.get(timeout=120).rpartition(": ")[2] for _ in range(2))
    one.join(120)
    other.join(120)

    assert (one.exitcode, other.exitcode, makes.value) == (0, 0, 1)
    assert told == ["created for the first time", "from the cache, where another process has just put them"]


@pytest.mark.parametrize("how", ["a bit", "of another key", "without digest", "another user"])
@pytest.mark.parametrize("mapped_from", [0, 1 << 20])
def test_tokens_that_are_not_those_of_the_key_are_made_again(
    monkeypatch: pytest.MonkeyPatch, how: str, mapped_from: int
) -> None:
    said: list[str] = []

    def ask(key: TokenKey) -> Any:
        return cached_tokens(key, lambda: chunks([[1, 2], [3]], 1), said.append, num_rows=2, mapped_from=mapped_from)[0]

    ask(KEY)
    (path,) = (cache_folder() / "tokens").rglob("*.safetensors")
    data = path.read_bytes()
    if how == "a bit":
        place = data.rindex(np.array([1, 2, 3], np.int32).tobytes())
        path.write_bytes(data[:place] + b"\x09" + data[place + 1 :])
    elif how == "of another key":
        cached_tokens(replace(KEY, rows="others", parts={}), lambda: chunks([[9, 9], [9]], 1), str, num_rows=2)
        (other,) = {*(cache_folder() / "tokens").rglob("*.safetensors")} - {path}
        path.write_bytes(other.read_bytes())
    elif how == "without digest":
        path.write_bytes(data.replace(b'"sha256"', b'"sha255"'))
    else:
        path.chmod(0o666)
        monkeypatch.setattr(os, "geteuid", lambda: 4242)
    assert ask(KEY)["input_ids"].tolist() == [1, 2, 3]
    assert ": recreated: " in said[-1]
    assert ("another user" in said[-1]) == (how == "another user")


def test_a_tokenizer_written_in_python_is_known_by_its_settings_and_not_by_its_folder(tmp_path: Path) -> None:
    from transformers import BertJapaneseTokenizer

    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nA\nb\n##b\nab\n", encoding="utf-8")

    def digest(**settings: Any) -> tuple[str, list[list[int]]]:
        made = BertJapaneseTokenizer(str(vocabulary), word_tokenizer_type="basic", **settings)
        folders = [tmp_path / f"{name}{len(list(tmp_path.iterdir()))}" for name in "xy"]
        for folder in folders:
            made.save_pretrained(folder)
        read = [BertJapaneseTokenizer.from_pretrained(folder) for folder in folders]
        parts = [TokenKey.of("rows", "", own, task=("text", 1)).parts["tokenizer"] for own in read]
        assert parts[0] == parts[1]
        return parts[0], [own("A ab")["input_ids"] for own in read]

    found = [
        digest(do_lower_case=True, subword_tokenizer_type="wordpiece"),
        digest(do_lower_case=False, subword_tokenizer_type="wordpiece"),
        digest(do_lower_case=False, subword_tokenizer_type="character"),
    ]
    assert len({part for part, _ in found}) == len({str(ids) for _, ids in found}) == len(found)
