# SPDX-License-Identifier: Apache-2.0
"""The command chat: piped lines, commands, what a person types, and targets that answer no messages."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from mirrortune.adapters.files.adapter_file import write_adapter
from mirrortune.cli import chat as command
from mirrortune.system.console import Reporter
from mirrortune.tasks.base import task_to_dict
from tests.cli.console import mirrortune, write_lines
from tests.tiny_models import write_tiny_model, write_tiny_seq2seq
from tests.tiny_runs import adapt, classification


def test_piped_lines_are_answered_one_by_one(desk: Path, chatty: Path) -> None:
    lines = "hello\n\n   \nagain\n/undo\n//slash\n/save talks.jsonl\n/quit\nnever read\n"
    outcome = mirrortune("chat", chatty, "--max-new-tokens", 5, "--system", "Be kind.", stdin=lines)

    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.is_plain
    row = json.loads((desk / "talks.jsonl").read_text(encoding="utf-8"))
    assert [m["content"] for m in row["messages"] if m["role"] != "assistant"] == ["Be kind.", "hello", "/slash"]
    assert "saved 2 turns in talks.jsonl" in outcome.stderr
    assert "3 answers, 15 tokens, " in outcome.stderr
    assert "cut after 5 tokens" in outcome.stderr
    assert "hello" not in outcome.stdout, "answers alone"


def test_json_is_the_whole_conversation(chatty: Path) -> None:
    found = mirrortune("chat", chatty, "--max-new-tokens", 5, "--json", stdin="hello\nagain").data

    assert [m["role"] for m in found["messages"]] == ["user", "assistant"] * 2
    assert found["tokens"] == 10


def test_nothing_piped_is_no_error(chatty: Path) -> None:
    assert mirrortune("chat", chatty, stdin="").exit_code == 0


@pytest.mark.parametrize(
    ("stdin", "exit_code", "says"),
    [
        ("/rest\n", 2, "/rest: there is no such command. Did you mean '/reset'? Allowed: /reset, /undo, /save"),
        ("/save\n", 2, "/save: no file is named. Write /save FILE.jsonl"),
        ("/undo twice\n", 2, "/undo: got 'twice'. Write /undo alone"),
        (b"hello\n\xe9t\xe9\n", 3, "standard input: line 2 is not UTF-8"),
        ("x" * 10_000, 3, "the message: it has 10,0"),
    ],
)
def test_piped_lines_that_cannot_be_answered_end_the_command(
    chatty: Path, stdin: str | bytes, exit_code: int, says: str
) -> None:
    outcome = mirrortune("chat", chatty, "--max-new-tokens", 2, stdin=stdin)

    assert outcome.exit_code == exit_code
    assert says in outcome.said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--temperature", "-1"], "--temperature: got -1.0. Allowed: 0 (greedy) or more"),
        (["--top-p", "0"], "--top-p: got 0.0. Allowed: above 0, at most 1"),
        (["--max-new-tokens", "0"], "--max-new-tokens: got 0. Allowed: 1 or more"),
        (["task.format=prose"], "task.format: unknown value 'prose'"),
        (["hello there"], "'hello there' is not a setting. Allowed: KEY.SUB=VALUE. To send one message, pipe it"),
    ],
)
def test_settings_are_checked(chatty: Path, words: list[str], says: str) -> None:
    outcome = mirrortune("chat", chatty, *words, stdin="hello")

    assert outcome.exit_code == 2
    assert says in outcome.said


def test_a_plain_model_says_that_it_continues_text(plain: Path) -> None:
    outcome = mirrortune("chat", plain, "--max-new-tokens", 2, stdin="hello")
    assert outcome.exit_code == 0
    assert "turns are not marked: the model continues your text" in outcome.stderr
    refused = mirrortune("chat", plain, "task.format=chat", stdin="hello")
    assert (refused.exit_code, "the tokenizer has no chat template" in refused.said) == (2, True)


def test_a_run_is_talked_to_as_it_was_trained(desk: Path, chatty: Path) -> None:
    rows = [{"prompt": f"say {word}", "completion": word} for word in ("a", "b", "c", "d") * 4]
    write_lines(desk / "rows.jsonl", rows)
    trained = mirrortune("train", "-m", chatty, "-t", "causal-lm", "-d", "rows.jsonl", "-o", "run", "--max-steps", 1)
    assert trained.exit_code == 0, trained.stderr

    outcome = mirrortune("chat", "run", "--max-new-tokens", 3, stdin="say a")
    assert outcome.exit_code == 0, outcome.stderr
    assert "turns are written as prompts and completions, as in training" in outcome.stderr
    asked = mirrortune("chat", "run/adapter", "task.format=chat", "--max-new-tokens", 3, "-v", stdin="say a")
    assert "turns are written by the model's chat template" in asked.stderr
    refused = mirrortune("chat", "run", stdin="say a\n/save run/results.json\n/save rows.jsonl\n")
    assert refused.exit_code == 2


def test_what_answers_no_messages_is_refused(desk: Path) -> None:
    adapted = adapt()
    (desk / "classifier").mkdir()
    base = {"name": str(write_tiny_model(desk / "bert")), "dtype": "float32"}
    write_adapter(desk / "classifier", adapted.model, adapted.book.entries, base=base,
                  task=task_to_dict(classification()), extra={})  # fmt: skip
    says = "it was trained for text-classification and cannot answer messages. Allowed: causal-lm"
    refused = mirrortune("chat", "classifier", stdin="hello")
    assert (refused.exit_code, says in refused.said) == (2, True), refused.stderr
    refused = mirrortune("chat", "bert", stdin="hello")
    assert (refused.exit_code, "it has no trained head that writes text" in refused.said) == (2, True), refused.stderr
    refused = mirrortune("chat", write_tiny_seq2seq(desk / "t5"), stdin="hello")
    assert refused.exit_code == 2, refused.stderr
    assert mirrortune("chat", "nowhere", stdin="hello").exit_code in (2, 6)


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    """Let a person type lines, and in the end press Ctrl-D."""
    waiting = iter(lines)

    def read(prompt: str = "") -> str:
        line = next(waiting, EOFError)
        if not isinstance(line, str):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(command, "is_interactive", lambda: True)


def test_a_mistake_does_not_end_what_a_person_types(desk: Path, chatty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (desk / "talks.jsonl").mkdir()
    typed(
        monkeypatch, "/nonsense", "", "x" * 10_000, "\udcff", "hello", "/save talks.jsonl", "/help", "/reset", "/undo"
    )
    outcome = mirrortune("chat", chatty, "--max-new-tokens", 2)

    assert outcome.exit_code == 0
    for says in ("there is no such command", "it has 10,0", "it is not UTF-8", "talks.jsonl is a folder",
                 "forgot 1 turn", "there is no turn to forget", "2 tokens, "):  # fmt: skip
        assert says in outcome.said
    assert "/quit leave; so does Ctrl-D" in outcome.said


def test_ctrl_c_at_the_prompt_leaves(chatty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, KeyboardInterrupt)
    assert mirrortune("chat", chatty).exit_code == 0


@pytest.mark.parametrize(("is_typed", "exit_code"), [(True, 0), (False, 130)])
def test_ctrl_c_stops_an_answer(
    desk: Path, chatty: Path, monkeypatch: pytest.MonkeyPatch, *, is_typed: bool, exit_code: int
) -> None:
    said: list[str] = []

    def piece(self: Reporter, text: str) -> None:
        said.append(text)
        if len(said) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Reporter, "piece", piece)
    if is_typed:
        typed(monkeypatch, "hello", "/save talks.jsonl")
    outcome = mirrortune("chat", chatty, "--max-new-tokens", 100, stdin="hello\n/save talks.jsonl\n")

    assert outcome.exit_code == exit_code
    assert (desk / "talks.jsonl").is_file() == is_typed
    if is_typed:
        row = json.loads((desk / "talks.jsonl").read_text(encoding="utf-8"))
        assert row["messages"][1]["content"] == "".join(said).strip()
    else:
        assert "interrupted" in outcome.stderr


def test_control_characters_do_not_reach_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("a\x1b[2J", "\x9b31m", "\r\u202e\tb\n"):
        Reporter().piece(text)
    assert capsys.readouterr().out == "a\\x1b[2J\\x9b31m\\x0d\\u202e\tb\n"
