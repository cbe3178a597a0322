# SPDX-License-Identifier: Apache-2.0
"""Hold a conversation with a language model, and save it as a row to train on."""

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

from mirrortune.adapters.inject import weights_kept
from mirrortune.errors import ConfigError, DataError
from mirrortune.system.atomic import write_atomically
from mirrortune.system.claims import claimed
from mirrortune.system.outputs import Input, check_file, read_marker
from mirrortune.tasks.chat import encode_continuation, encode_prompt, turn_end_ids, writes_system
from mirrortune.tasks.conversations import Conversation, Message
from mirrortune.tasks.predicting import PredictOptions
from mirrortune.tasks.prompts import RowSampler, alpaca_prompt

Form = Literal["chat", "prompt", "alpaca", "text"]
"""How turns are formatted: with the tokenizer's chat template; as prompts and completions; as prompts in the format of
Stanford Alpaca; or as one text that the model continues."""
LONGEST_ANSWER = 256
"""Default maximum length of an answer in tokens."""
_CONTROL = re.compile("[\x7f-\x9f\u2028-\u202e\u2066-\u2069]")  # besides those that JSON escapes
_UNFINISHED = "\ufffd"  # the decoder's output for an incomplete character


@dataclass(frozen=True, slots=True, kw_only=True)
class Speaker:
    """A language model for conversations.

    Attributes:
        model: model on its device, in evaluation mode.
        tokenizer: tokenizer of transformers.
        form: how turns are formatted.
        context: creates the context in which the model runs, such as autocast.
        system: system prompt that it was trained with; "" for none.
    """

    model: nn.Module
    tokenizer: Any
    form: Form
    context: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
    system: str = ""

    def positions(self) -> int | None:
        """Return the maximum number of tokens of prompt and answer together, or None if no limit is known."""
        stated: Any = getattr(self.tokenizer, "model_max_length", None)
        config: Any = self.model.config
        limits = (getattr(config.get_text_config(), "max_position_embeddings", None), stated)
        return min((n for n in limits if isinstance(n, int) and 0 < n < 1_000_000_000), default=None)

    def stops(self) -> list[int]:
        """Return the ids of the tokens that end an answer."""
        own = turn_end_ids(self.tokenizer) if self.form == "chat" else [self.tokenizer.eos_token_id]
        generation: Any = getattr(self.model, "generation_config", None)
        named = getattr(generation, "eos_token_id", None)
        named = named if isinstance(named, list) else [named]
        return list(dict.fromkeys(i for i in (*own, *named) if isinstance(i, int)))

    def encode(self, system: str, turns: Sequence[tuple[str, str]], text: str) -> list[int]:
        """Tokenise the earlier turns and a message, up to the point where the answer begins.

        Args:
            system: system prompt, or "" for none.
            turns: earlier messages and their answers.
            text: message.

        Raises:
            DataError: the chat template rejects the turns.
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
        # As in training, an answer starts on a new line.
        prompt = asked[-1] if asked[-1][-1:].isspace() else f"{asked[-1]}\n"
        return encode_continuation(self.tokenizer, prompt, "", before)[0][:-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer of the model.

    Attributes:
        text: text without surrounding white space.
        num_tokens: number of generated tokens, including the token that ends the answer.
        seconds: time from the message to the end of the answer.
        ended: ``end`` if the model ended it, ``length`` if it reached the maximum length, ``stopped`` if the user
            stopped it.
        num_left_out: number of earlier turns that were left out of the prompt because they did not fit.
    """

    text: str
    num_tokens: int
    seconds: float
    ended: Literal["end", "length", "stopped"]
    num_left_out: int

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second, including the time to process the prompt."""
        return self.num_tokens / (self.seconds or 1e-9)


@dataclass(slots=True, kw_only=True)
class Chat:
    """A conversation.

    Attributes:
        speaker: language model.
        options: options of generation; greedy by default.
        system: system prompt, or "" for none.
        turns: messages and their answers so far.
    """

    speaker: Speaker
    options: PredictOptions = field(default_factory=PredictOptions)
    system: str = ""
    turns: list[tuple[str, str]] = field(default_factory=list)
    _num_answers: int = 0
    _num_left_out: int = 0  # turns that once did not fit will not fit into a longer conversation either
    _saved: dict[Path, bytes] = field(default_factory=dict)

    def reset(self) -> None:
        """Remove all turns; the system prompt stays."""
        self.turns.clear()
        self._saved.clear()
        self._num_left_out = 0

    def undo(self) -> tuple[str, str] | None:
        """Remove the last message and its answer; return them, or None if there are none."""
        self._num_left_out = 0
        return self.turns.pop() if self.turns else None

    @torch.no_grad()
    def answer(
        self, text: str, say: Callable[[str], object], should_stop: Callable[[], object] = lambda: False
    ) -> Answer:
        """Answer a message. Message and answer become a turn of the conversation, unless the answer is empty.

        Args:
            text: message.
            say: called with each piece of the answer as it is generated; the pieces add up to its text.
            should_stop: called before each token; a true result ends the answer.

        Raises:
            DataError: the message does not fit into the model, or the chat template rejects the turns.
        """
        started = time.perf_counter()
        ids, num_left_out, room = self._prompt(text)
        speaker, stops = self.speaker, self.speaker.stops()
        stream = _Stream(speaker.tokenizer, say, stops)
        given = torch.tensor([ids], device=next(speaker.model.parameters()).device)
        # Each answer is sampled with new random numbers, so that asking again can give another answer.
        sampler = RowSampler(self.options, np.array([self._num_answers])) if self.options.is_sampled else None
        self._num_answers += 1
        model: Any = speaker.model
        with speaker.context(), weights_kept(speaker.model):
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
        """Build the prompt of a message, with as many of the latest turns as fit.

        Returns:
            The token ids, the number of turns left out, and the maximum length of the answer in tokens.
        """
        limit, wanted = self.speaker.positions(), self.options.max_new_tokens or LONGEST_ANSWER
        for num_left_out in range(self._num_left_out, len(self.turns) + 1):
            ids = self.speaker.encode(self.system, self.turns[num_left_out:], text)
            if limit is None or len(ids) + min(wanted, limit // 2) <= limit:
                room = wanted if limit is None else min(wanted, limit - len(ids))
                return ids, num_left_out, room
        assert limit is not None
        if len(ids) >= limit:
            with_system = " with the system prompt" if self.system else ""
            raise DataError(
                "the message", f"it has {len(ids):,} tokens{with_system}, and the model takes {limit:,}, the answer"
                " included", fix="Shorten it",
            )  # fmt: skip
        return ids, num_left_out, min(wanted, limit - len(ids))

    def messages(self) -> list[Message]:
        """Return the conversation in the form of a ``messages`` column."""
        return messages_of(self.system, self.turns)

    def save(self, path: Path, inputs: Sequence[Input] = ()) -> None:
        """Append the conversation to a JSON Lines file, as a row ``{"messages": [...]}`` that ``train`` can read.

        Saving the conversation again with more turns replaces its earlier row if that is the last one of the file.

        Raises:
            ConfigError: there is nothing to save, or the file has another suffix, lies in a folder that mirrortune
                wrote or holds anything but such rows.
            ResourceError: the file cannot be written.
        """
        if not self.turns:
            raise ConfigError("/save", "the conversation has no answer yet", fix="Save it after one")
        if path.suffix != ".jsonl":
            raise ConfigError("/save", f"got {path}", allowed="a file that ends in .jsonl, which train reads")
        check_file(path, inputs, "/save")
        # A file of the user in a run would keep `train --overwrite` from replacing that run.
        for above in path.resolve().parents:
            if (marker := read_marker(above)) is not None:
                raise ConfigError("/save", f"{path} lies in the {marker.kind} {above}", fix="Give a name elsewhere")
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
    """Return the content of a file of ``messages`` rows, ending in a newline; empty if the file is missing."""
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
    """Stops generation when a function returns a true value."""

    def __init__(self, should_stop: Callable[[], object]) -> None:
        self._should_stop = should_stop

    @override
    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), bool(self._should_stop()), device=input_ids.device)


class _Stream(BaseStreamer):
    """Decodes the tokens of one answer as they are generated.

    All tokens are decoded each time, because the text of a token may depend on earlier ones. Trailing white space and
    incomplete characters are held back until more text follows.

    Attributes:
        ids: token ids so far.
        shown: text passed to ``say`` so far.
    """

    def __init__(self, tokenizer: Any, say: Callable[[str], object], stops: Sequence[int]) -> None:
        self.ids: list[int] = []
        self.shown = ""
        self._tokenizer, self._say, self._stops = tokenizer, say, stops
        self._is_prompt = True

    @override
    def put(self, value: Tensor) -> None:
        if self._is_prompt:  # generate passes the prompt first
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
