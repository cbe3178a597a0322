# SPDX-License-Identifier: Apache-2.0
"""A conversation with a language model: what it is sent, what it answers, and the conversation as a row to train on."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer
from typing_extensions import override

from mirrortune.errors import ConfigError, DataError
from mirrortune.system.atomic import write_atomically
from mirrortune.system.claims import claimed
from mirrortune.system.outputs import Input, check_file
from mirrortune.tasks.chat import alpaca_prompt, encode_continuation, encode_prompt, turn_end_ids, writes_system
from mirrortune.tasks.conversations import Conversation, Message
from mirrortune.tasks.predicting import PredictOptions
from mirrortune.tasks.prompts import RowSampler

Form = Literal["chat", "prompt", "alpaca", "text"]
"""How turns are written: by the tokenizer's chat template; as prompts and completions; as prompts in the format of
Stanford Alpaca; or as one text that the model continues."""
LONGEST_ANSWER = 256
"""Longest answer in tokens, unless it is set."""
_CONTROL = re.compile("[\x7f-\x9f\u2028-\u202e\u2066-\u2069]")  # besides those that JSON escapes
_UNFINISHED = "\ufffd"  # what a decoder writes for the first bytes of a character


@dataclass(frozen=True, slots=True, kw_only=True)
class Speaker:
    """A language model that can be talked to.

    Attributes:
        model: on its device, in evaluation mode.
        tokenizer: of transformers.
        form: how turns are written.
        context: makes the context that the model runs in.
    """

    model: nn.Module
    tokenizer: Any
    form: Form
    context: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext

    def positions(self) -> int | None:
        """Return how many tokens the model takes, question and answer together; None without a known limit."""
        stated: Any = getattr(self.tokenizer, "model_max_length", None)
        config: Any = self.model.config
        limits = (getattr(config.get_text_config(), "max_position_embeddings", None), stated)
        return min((n for n in limits if isinstance(n, int) and 0 < n < 1_000_000_000), default=None)

    def stops(self) -> list[int]:
        """Return the tokens that end an answer."""
        own = turn_end_ids(self.tokenizer) if self.form == "chat" else [self.tokenizer.eos_token_id]
        generation: Any = getattr(self.model, "generation_config", None)
        named = getattr(generation, "eos_token_id", None)
        named = named if isinstance(named, list) else [named]
        return list(dict.fromkeys(i for i in (*own, *named) if isinstance(i, int)))

    def encode(self, system: str, turns: Sequence[tuple[str, str]], text: str) -> list[int]:
        """Tokenise a message after the turns before it, up to where its answer begins.

        Args:
            system: system prompt; "" for none.
            turns: earlier messages with their answers.
            text: the message.

        Raises:
            DataError: if the chat template refuses the turns.
        """
        if self.form == "text":
            whole = "\n".join(filter(None, [system, *(part for turn in turns for part in turn), text]))
            return encode_continuation(self.tokenizer, "", whole)[0][:-1]
        asked = [*(question for question, _ in turns), text]
        if system and self.form == "chat" and not writes_system(self.tokenizer, system):
            asked[0], system = f"{system}\n\n{asked[0]}", ""
        if self.form == "alpaca":
            asked = [alpaca_prompt(question, "") for question in asked]
        before = messages_of(system, [(q, a) for q, (_, a) in zip(asked, turns, strict=False)])
        if self.form == "chat":
            talk = Conversation(messages=[*before, {"role": "user", "content": asked[-1]}])
            return encode_prompt(self.tokenizer, talk, "the conversation")
        # As in training, an answer begins on a line of its own.
        prompt = asked[-1] if asked[-1][-1:].isspace() else f"{asked[-1]}\n"
        return encode_continuation(self.tokenizer, prompt, "", before)[0][:-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer.

    Attributes:
        text: without white space around it.
        num_tokens: that the model generated, the one that ends the answer included.
        seconds: from the message to the end of the answer.
        ended: ``end``, the model ended it; ``length``, it is as long as allowed; ``stopped``, the user stopped it.
        num_left_out: earlier turns that the model was not shown, because they did not fit.
    """

    text: str
    num_tokens: int
    seconds: float
    ended: Literal["end", "length", "stopped"]
    num_left_out: int

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second, the time to read the prompt included."""
        return self.num_tokens / (self.seconds or 1e-9)


@dataclass(slots=True, kw_only=True)
class Chat:
    """A conversation.

    Attributes:
        speaker: the model.
        options: of generation; greedy by default.
        system: system prompt; "" for none.
        turns: messages with their answers, so far.
    """

    speaker: Speaker
    options: PredictOptions = field(default_factory=PredictOptions)
    system: str = ""
    turns: list[tuple[str, str]] = field(default_factory=list)
    _num_answers: int = 0
    _num_left_out: int = 0  # what has not fitted before the turns there are will not fit before more
    _saved: dict[Path, bytes] = field(default_factory=dict)

    def reset(self) -> None:
        """Forget all turns; the system prompt stays."""
        self.turns.clear()
        self._saved.clear()
        self._num_left_out = 0

    def undo(self) -> tuple[str, str] | None:
        """Forget the last message and its answer; returns them, or None if there are none."""
        self._num_left_out = 0
        return self.turns.pop() if self.turns else None

    @torch.no_grad()
    def answer(
        self, text: str, say: Callable[[str], object], should_stop: Callable[[], object] = lambda: False
    ) -> Answer:
        """Answer a message. It becomes a turn of the conversation, unless the answer is empty.

        Args:
            text: the message.
            say: called with each piece of the answer; together they are its text.
            should_stop: called before each token; a true value ends the answer.

        Raises:
            DataError: if the message does not fit into the model, or the chat template refuses the turns.
        """
        started = time.perf_counter()
        ids, num_left_out, room = self._prompt(text)
        speaker, stops = self.speaker, self.speaker.stops()
        stream = _Stream(speaker.tokenizer, say, stops)
        given = torch.tensor([ids], device=next(speaker.model.parameters()).device)
        # Every answer has random numbers of its own, so that the same message can be asked again.
        sampler = RowSampler(self.options, np.array([self._num_answers])) if self.options.is_sampled else None
        self._num_answers += 1
        model: Any = speaker.model
        with speaker.context():
            model.generate(
                input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=room, num_beams=1,
                do_sample=False, use_cache=True, eos_token_id=stops or None,
                pad_token_id=speaker.tokenizer.pad_token_id, logits_processor=[sampler] if sampler else None,
                stopping_criteria=[_Stop(should_stop)], streamer=stream,
            )  # fmt: skip
        if stream.shown:
            self.turns.append((text, stream.shown))
            self._num_left_out = num_left_out
        ended: Literal["end", "length"] = "end" if stream.ids and stream.ids[-1] in stops else "length"
        return Answer(
            text=stream.shown, num_tokens=len(stream.ids), seconds=time.perf_counter() - started,
            ended="stopped" if ended == "length" and len(stream.ids) < room else ended, num_left_out=num_left_out,
        )  # fmt: skip

    def _prompt(self, text: str) -> tuple[list[int], int, int]:
        """Return the tokens of a message and as many of the last turns before it as fit, the number of turns left out,
        and the longest answer in tokens.
        """
        limit, wanted = self.speaker.positions(), self.options.max_new_tokens or LONGEST_ANSWER
        for num_left_out in range(self._num_left_out, len(self.turns) + 1):
            ids = self.speaker.encode(self.system, self.turns[num_left_out:], text)
            if limit is None or len(ids) + min(wanted, limit // 2) <= limit:
                return ids, num_left_out, wanted
        assert limit is not None
        if len(ids) >= limit:
            with_system = " with the system prompt" if self.system else ""
            raise DataError(
                "the message", f"it has {len(ids):,} tokens{with_system}, and the model takes {limit:,}, the answer"
                " included", fix="Shorten it",
            )  # fmt: skip
        return ids, num_left_out, min(wanted, limit - len(ids))

    def messages(self) -> list[Message]:
        """Return the conversation as a row of ``messages`` has it."""
        return messages_of(self.system, self.turns)

    def save(self, path: Path, inputs: Sequence[Input] = ()) -> None:
        """Append the conversation to a file of JSON lines, as a row ``{"messages": [...]}`` that ``train`` reads.

        A conversation that is saved again, with more turns, takes the place of its own row if that is the last one.

        Raises:
            ConfigError: there is nothing to save; the file has another suffix, or holds anything but such rows.
            ResourceError: it cannot be written.
        """
        if not self.turns:
            raise ConfigError("/save", "the conversation has no answer yet", fix="Save it after one")
        if path.suffix != ".jsonl":
            raise ConfigError("/save", f"got {path}", allowed="a file that ends in .jsonl, which train reads")
        check_file(path, inputs, "/save")
        with claimed(path):
            before = _rows(path)
            text = json.dumps({"messages": self.messages()}, ensure_ascii=False)
            row = _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text).encode() + b"\n"
            own = self._saved.get(path.absolute())
            if own is not None and before.endswith(own):
                before = before.removesuffix(own)
            write_atomically(path, lambda file: file.write_bytes(before + row))
        self._saved[path.absolute()] = row


def messages_of(system: str, turns: Sequence[tuple[str, str]]) -> list[Message]:
    """Return turns as messages with ``role`` and ``content``."""
    found: list[Message] = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        found += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return found


def _rows(path: Path) -> bytes:
    """Return the content of a file of ``messages`` rows, ended by a line break; empty if there is none."""
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise ConfigError("/save", f"{path} cannot be read ({error.strerror})", fix="Give another name") from error
    first: Any = None
    if content.strip():
        with contextlib.suppress(ValueError, RecursionError):
            first = json.loads(content.lstrip().splitlines()[0].decode("utf-8-sig"))
        if not (isinstance(first, dict) and isinstance(first.get("messages"), list)):
            raise ConfigError("/save", f"{path} is there, and holds no rows of messages", fix="Give another name")
    return content if content.endswith(b"\n") or not content else content + b"\n"


class _Stop(StoppingCriteria):
    """Ends generation as soon as a function says so."""

    def __init__(self, should_stop: Callable[[], object]) -> None:
        self._should_stop = should_stop

    @override
    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), bool(self._should_stop()), device=input_ids.device)


class _Stream(BaseStreamer):
    """Decodes the tokens of one answer as they come.

    All tokens are decoded each time: the text of a token may depend on those before it. White space at the end waits
    for what follows, as do the first bytes of a character.

    Attributes:
        ids: tokens so far.
        shown: text so far.
    """

    def __init__(self, tokenizer: Any, say: Callable[[str], object], stops: Sequence[int]) -> None:
        self.ids: list[int] = []
        self.shown = ""
        self._tokenizer, self._say, self._stops = tokenizer, say, stops
        self._is_prompt = True

    @override
    def put(self, value: Tensor) -> None:
        if self._is_prompt:  # generate sends the prompt first
            self._is_prompt = False
            return
        self.ids += value.flatten().tolist()
        self._show(self._text().rstrip(_UNFINISHED))

    @override
    def end(self) -> None:
        self._show(self._text())

    def _text(self) -> str:
        ids = self.ids[:-1] if self.ids and self.ids[-1] in self._stops else self.ids
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _show(self, text: str) -> None:
        text = text.strip()
        if len(text) > len(self.shown):
            more = text[len(self.shown) :]
            self.shown += more
            self._say(more)
