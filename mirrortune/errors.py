# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can act on, each with the exit code of the command-line contract.

    MirrortuneError              1  (never raised itself; anything else that escapes is a bug)
    +-- ConfigError              2  usage, recipe, flags
    +-- DivergedError            2  the loss became NaN or infinite
    +-- DataError                3  files, columns, labels; NoRowsError is one
    +-- ResourceError            4  will not fit: memory, disk, wrong hardware
    +-- VerificationError        5  a merge or an adapter's basis failed its check
    +-- HubError                 6  network, Hub, authentication
    +-- InterruptedRun     130/143  stopped by a signal after a safe checkpoint
    +-- PeerError         another's  another process of the run has failed, and says why

Every message says where, what is wrong (got what), what is allowed and what to do. This module imports nothing of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any


class MirrortuneError(Exception):
    """A failure with a message for the user.

    Args:
        where: the place at fault: ``file:line: key``, a flag, a path or a layer's name.
        problem: what is wrong, with the value that was got.
        allowed: what would have been accepted.
        fix: what to do next.
    """

    exit_code = 1

    def __init__(self, where: str, problem: str, *, allowed: str | None = None, fix: str | None = None) -> None:
        self.where, self.problem, self.allowed, self.fix = where, problem, allowed, fix
        super().__init__(self.describe())

    def describe(self) -> str:
        """The whole message on one line, in the order where, problem, allowed, fix."""
        problem = self.problem.rstrip(".")
        parts = [f"{self.where}: {problem}" + ("" if problem.endswith("?") else ".")]
        if self.allowed:
            parts.append(f"Allowed: {self.allowed.rstrip('.')}.")
        if self.fix:
            parts.append(f"{self.fix.rstrip('.')}.")
        return " ".join(parts)


class ConfigError(MirrortuneError):
    """Something in the recipe or on the command line; may stand for several problems found at once."""

    exit_code = 2

    @classmethod
    def several(cls, errors: Sequence[ConfigError]) -> ConfigError:
        """One error whose message is a line for each of ``errors`` (at least one), so that all are seen at once; what
        was found twice is said once.
        """
        lines = dict.fromkeys(line for error in errors for line in str(error).splitlines())
        if len(errors) == 1 or len(lines) == 1:
            return errors[0]
        combined = cls("configuration", f"{len(lines)} problems")
        combined.args = ("\n".join(lines),)
        return combined


def all_of(*steps: Callable[[], Any]) -> list[Any]:
    """What every step returns; if any fail, one error that says all that is wrong.

    Raises:
        MirrortuneError: of the first failure's kind, a line for each.
    """
    results, errors = [], []
    for step in steps:
        try:
            results.append(step())
        except MirrortuneError as error:
            errors.append(error)
    if not errors:
        return results
    lines = dict.fromkeys(line for error in errors for line in str(error).splitlines())
    if len(errors) > 1:
        errors[0].args = ("\n".join(lines),)
    raise errors[0]


class DivergedError(MirrortuneError):
    """A loss or gradient that is not finite; ``step`` is the optimizer step at which it was found."""

    exit_code = 2

    def __init__(self, step: int, problem: str, *, fix: str) -> None:
        super().__init__(f"step {step}", problem, fix=fix)
        self.step = step


class DataError(MirrortuneError):
    """A file, column, row or label that cannot be used."""

    exit_code = 3


class NoRowsError(DataError):
    """Rows of which none is left to learn from."""


class ResourceError(MirrortuneError):
    """Memory, disk or hardware that does not suffice."""

    exit_code = 4


class VerificationError(MirrortuneError):
    """A merge or an adapter that is not what it claims to be."""

    exit_code = 5


class HubError(MirrortuneError):
    """A repository, file or connection that the Hub did not give us."""

    exit_code = 6


class InterruptedRun(MirrortuneError):  # noqa: N818  (nothing went wrong)
    """A signal stopped the run after its checkpoint was written; ``exit_code`` is 128 + the signal's number, ``step``
    the last optimizer step that was made, where there are steps.
    """

    def __init__(self, where: str, problem: str, *, signal_number: int, fix: str, step: int | None = None) -> None:
        super().__init__(where, problem, fix=fix)
        self.exit_code, self.step = 128 + signal_number, step


class PeerError(MirrortuneError):
    """Another process of the run ended with an error, which it reports; this one ends in silence with its exit code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("processes", "another process of this run has failed")
        self.exit_code = exit_code


def not_as_meant(place: Path, problem: str) -> VerificationError:
    """The error for what was made, read back, found to be wrong, and therefore never put in its place."""
    return VerificationError(str(place), problem, fix="It was not written; please report this with the model's name")


def raised_here(error: BaseException) -> bool:
    """Whether an exception was raised by a line of this package, and not inside another library that it called."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and Path(trace.tb_frame.f_code.co_filename).parent.is_relative_to(Path(__file__).parent)


def counted(number: int, noun: str) -> str:
    """``1 row``, ``2,000 rows``: a number of things, in words."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the nearest candidate, or an empty string when none is near."""
    near = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.55)
    return f" Did you mean '{near[0]}'?" if near else ""


def unknown_name(where: str, kind: str, name: str, candidates: Iterable[str]) -> ConfigError:
    """The error for a name that is in no registry: says the nearest one and lists all."""
    names = sorted(candidates)
    return ConfigError(where, f"unknown {kind} '{name}'.{did_you_mean(name, names)}", allowed=", ".join(names))


PREFERENCES = ("dpo", "ipo", "kto", "orpo", "simpo", "cpo", "ppo", "grpo", "rloo", "rlhf", "reward")


def no_preferences(where: str, name: str, *, allowed: str) -> ConfigError:
    """The error for the name of a way to learn from preferences, which is neither a method nor a kind of task here."""
    return ConfigError(
        where, f"'{name}' learns from preferences, which mirrortune does not train on", allowed=allowed,
        fix="Use TRL's trainer around a model that mirrortune.attach() has adapted",
    )  # fmt: skip
