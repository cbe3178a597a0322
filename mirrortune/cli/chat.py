# SPDX-License-Identifier: Apache-2.0
"""Define the command ``chat``: a conversation with a language model, in a terminal or through pipes."""

from __future__ import annotations

import re
import shlex
import signal
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mirrortune.cli.flags import (
    FLAGS,
    Debug,
    Json,
    Quiet,
    Verbose,
    given_flags,
    refuse_training_only,
    with_recipe_flags,
)
from mirrortune.errors import ConfigError, DataError, MirrortuneError, counted, did_you_mean
from mirrortune.system.console import Reporter, digits, is_interactive, piped_lines, significant, typed_lines
from mirrortune.system.paths import local_path
from mirrortune.system.signals import StopSignals

if TYPE_CHECKING:
    from mirrortune.config.recipe import Resolved
    from mirrortune.inference.chat import Answer, Chat
    from mirrortune.system.outputs import Input

_READ = ("model.name", "model.revision", "train.precision", "model.trust_remote_code")
_SHAPES_TURNS = ("data.path", "data.label_column", "data.text_columns", "data.system")
"""Settings of data that shape the turns of a model without an adapter."""
_COMMAND = re.compile(r"/([A-Za-z]\w*)(?:\s+(.*))?", flags=re.DOTALL)
_HELP = (
    ("/reset", "forget the conversation; the system prompt stays"),
    ("/undo", "forget the last message and its answer"),
    ("/save FILE.jsonl", "append the conversation to a file that train reads"),
    ("/help", "list these commands"),
    ("/quit", "leave; so does Ctrl-D"),
    ("//...", "send a message that begins with a slash"),
    ("Ctrl-C", "stop an answer, and keep what is there of it"),
)


@with_recipe_flags(*(flag.key for flag in FLAGS if flag.key not in _READ))
def chat(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="Run directory, adapter folder, merged folder or any language model.", show_default=False)],
    words: Annotated[list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Settings, such as task.format=text.", show_default=False)] = None, *,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System prompt; that of the training (data.system) by default.", show_default=False)] = None,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", metavar="N", show_default=False, help="Maximum length of an answer, in tokens; 256 by default.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", metavar="X", show_default=False, help="Sample answers at this temperature; greedy by default.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", metavar="X", show_default=False, help="Nucleus sampling: sample from the most probable tokens whose total probability is this.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Seed of sampling.")] = 0,
    json: Json = False, quiet: Quiet = False, verbose: Verbose = False, debug: Debug = False, **given: Any,
) -> None:  # fmt: skip
    """Chat with a language model; /help lists the commands. Piped input is answered line by line.

    mirrortune chat runs/sft-dolly-smollm2-135m-instruct-mirror-scale
    """
    reporter = Reporter(verbosity=-1 if quiet else int(verbose), as_json=json)
    resolved = _resolved(target, words or [], given, reporter)
    from mirrortune.inference.chat import Chat  # noqa: PLC0415
    from mirrortune.inference.speakers import load_speaker  # noqa: PLC0415
    from mirrortune.merging.bases import inputs_of_targets  # noqa: PLC0415
    from mirrortune.tasks.predicting import GENERATION, PredictOptions  # noqa: PLC0415

    options = PredictOptions(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    options.check("chat", GENERATION)
    _refuse_unread(target, words or [], resolved.origins)
    speaker = load_speaker(target, resolved.recipe, reporter)
    talk = Chat(speaker=speaker, options=options, system=speaker.system if system is None else system)
    _Session(chat=talk, reporter=reporter, inputs=inputs_of_targets(target)).run()


def _refuse_unread(target: str, words: Sequence[str], origins: Mapping[str, str]) -> None:
    """Raise ConfigError for settings of data and evaluation on the command line that a conversation does not use."""
    from mirrortune.adapters.files.find import adapter_to_score  # noqa: PLC0415

    typed = {f"'{word}'" for word in words}
    found = [origin for key, origin in origins.items() if origin in typed and key.startswith(("data.", "eval."))
             and key not in _SHAPES_TURNS]  # fmt: skip
    if not found and adapter_to_score(target) is not None:  # which records how turns are written
        found = [origin for key, origin in origins.items() if origin in typed and key in _SHAPES_TURNS]
    if found:
        fix = "Remove it; a system prompt is given by --system"
        raise ConfigError.several(
            [ConfigError(word, "it has no effect on this conversation", fix=fix) for word in found]
        )


def _resolved(target: str, words: list[str], given: dict[str, Any], reporter: Reporter) -> Resolved:
    """Return the settings of the target's recipe, overridden by those of the command line."""
    from mirrortune.cli.app import _recipe_of  # noqa: PLC0415  (which imports this module)
    from mirrortune.config import recipe  # noqa: PLC0415

    errors = [
        ConfigError("arguments", f"'{word}' is not a setting", allowed="KEY.SUB=VALUE",
                    fix=f"To send one message, pipe it: echo {shlex.quote(word)} | mirrortune chat {target}")
        for word in words if "=" not in word
    ]  # fmt: skip
    own = _recipe_of(target, reporter)
    flags = recipe.flag_layer(given_flags(given, errors))
    over = recipe.override_layer([word for word in words if "=" in word], errors)
    if errors:
        raise ConfigError.several(errors)
    resolved = recipe.resolve([*([own] if own else []), over, flags])
    refuse_training_only(words, resolved.origins)
    return resolved


@dataclass(slots=True, kw_only=True)
class _Session:
    """A session that reads lines, which are commands or messages, and prints the answers.

    Attributes:
        chat: conversation.
        reporter: prints answers and notes.
        inputs: files that are read and that ``/save`` must not write to.
    """

    chat: Chat
    reporter: Reporter
    inputs: Sequence[Input]
    _answers: list[Answer] = field(default_factory=list)

    def run(self) -> None:
        """Process lines until the input ends or a line is ``/quit``."""
        is_typed = is_interactive() and not self.reporter.as_json
        if is_typed:
            self.reporter.note("/help lists the commands; Ctrl-D leaves")
        for line in typed_lines() if is_typed else piped_lines():
            try:
                if line.strip() == "/quit":
                    break
                self._take(line, is_typed=is_typed)
            except MirrortuneError as error:
                if not is_typed:
                    raise
                self.reporter.error(str(error))
        self._close(is_typed=is_typed)

    def _take(self, line: str, *, is_typed: bool) -> None:
        try:
            line.encode()
        except UnicodeEncodeError as error:
            raise DataError("the message", "it is not UTF-8", fix="Set the terminal to UTF-8") from error
        command = _COMMAND.fullmatch(line.strip())
        if command is not None:
            self._obey(command[1], (command[2] or "").strip())
        elif line.strip():
            self._reply(line[1:] if line.startswith("//") else line, is_typed=is_typed)

    def _obey(self, name: str, argument: str) -> None:
        """Execute a command that begins with a slash."""
        known = [usage.split()[0] for usage, _ in _HELP if re.match(r"/\w", usage)]
        if f"/{name}" not in known:
            raise ConfigError(
                f"/{name}", f"there is no such command.{did_you_mean(f'/{name}', known)}", allowed=", ".join(known), fix="To send a message that begins with a slash, write two",
            )  # fmt: skip
        if (name == "save") != bool(argument):
            raise ConfigError(f"/{name}", *(("no file is named",) if name == "save" else (f"got '{argument}'",)),
                              fix="Write /save FILE.jsonl" if name == "save" else f"Write /{name} alone")  # fmt: skip
        note = self.reporter.note
        if name == "help":
            for usage, meaning in _HELP:
                note(f"{usage:<18}{meaning}")
        elif name == "reset":
            note(f"forgot {counted(len(self.chat.turns), 'turn')}")
            self.chat.reset()
        elif name == "undo":
            found = self.chat.undo()
            note("there is no turn to forget" if found is None else f"forgot: {textwrap.shorten(found[0], 60)}")
        elif name == "save":
            self.chat.save(local_path(argument), self.inputs)
            note(f"saved {counted(len(self.chat.turns), 'turn')} in {argument}")

    def _reply(self, text: str, *, is_typed: bool) -> None:
        """Answer a message, and print notes on the answer."""
        reporter = self.reporter
        with StopSignals() as signals:
            answer = self.chat.answer(
                text, (lambda _: None) if reporter.as_json else reporter.piece, lambda: signals.number
            )
        self._answers.append(answer)
        if not reporter.as_json:
            reporter.piece("\n")
        if signals.number == signal.SIGINT and not is_typed:
            raise KeyboardInterrupt  # the signal itself is ignored by background jobs of a shell
        if signals.number not in (0, signal.SIGINT):
            signal.raise_signal(signals.number)
        remarks = []
        if answer.num_left_out:
            remarks.append(
                f"the oldest {counted(answer.num_left_out, 'turn')} did not fit and was not shown to the model"
            )
        if not answer.text:
            remarks.append("the answer is empty: the message is not kept")
        if answer.ended == "stopped":
            remarks.append("stopped")
        elif answer.ended == "length":
            remarks.append(f"cut after {counted(answer.num_tokens, 'token')}")
        speed = f"{counted(answer.num_tokens, 'token')}, {significant(answer.tokens_per_second)} tokens/s"
        if is_typed or remarks:
            reporter.note(f"({'; '.join([speed, *remarks])})")

    def _close(self, *, is_typed: bool) -> None:
        """Print the conversation with ``--json``, and the speed over all answers if messages were piped."""
        tokens, seconds = sum(a.num_tokens for a in self._answers), sum(a.seconds for a in self._answers)
        per_second = tokens / seconds if seconds else 0.0
        if self.reporter.as_json:
            found = {"messages": self.chat.messages(), "tokens": tokens, "tokens_per_second": digits(per_second)}
            self.reporter.result(found, [])
        elif self._answers and not is_typed:
            speed = f"{counted(tokens, 'token')}, {significant(per_second)} tokens/s"
            self.reporter.note(f"{counted(len(self._answers), 'answer')}, {speed}")
