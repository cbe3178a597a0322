# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can act on, each with the exit code of the command-line contract.

    MirrortuneError              1  (only subclasses are raised; any other exception is a bug)
    +-- ConfigError              2  usage, recipe, flags
    +-- DivergedError            2  the loss became NaN or infinite
    +-- DataError                3  files, columns, labels; NoRowsError is one
    +-- ResourceError            4  will not fit: memory, disk, wrong hardware
    +-- VerificationError        5  a merge or an adapter's basis failed its check
    +-- HubError                 6  network, Hub, authentication
    +-- InterruptedRun     130/143  stopped by a signal after a safe checkpoint
    +-- PeerError        of the peer  another process of the run has failed and reports the error

Every message says where the problem is, what was got, what is allowed and what to do. This module imports no other
module of mirrortune.
"""

from __future__ import annotations

import difflib
import errno
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

_LONGEST = 2000
"""Number of characters after which a part of a message is cut."""


def on_one_line(text: str | None) -> str:
    """Escape line breaks and cut overlong text: names of columns and files are untrusted."""
    plain = (text or "").replace("\n", r"\n")
    return plain if len(plain) <= _LONGEST else f"{plain[: _LONGEST - 200]} ... {plain[-200:]}"


class MirrortuneError(Exception):
    """A failure with a message for the user.

    Args:
        where: location of the problem: ``file:line: key``, a flag, a path or the name of a layer.
        problem: what is wrong, including the value that was given.
        allowed: accepted values.
        fix: what to do next.
    """

    exit_code = 1

    def __init__(self, where: str, problem: str, *, allowed: str | None = None, fix: str | None = None) -> None:
        self.where, self.problem, self.allowed, self.fix = where, problem, allowed, fix
        super().__init__(self.describe())

    def rephrase(self, change: Callable[[str], str]) -> None:
        """Change the wording of the message."""
        self.where, self.problem = change(self.where), change(self.problem)
        self.allowed, self.fix = self.allowed and change(self.allowed), self.fix and change(self.fix)
        self.args = tuple(change(text) if isinstance(text, str) else text for text in self.args)

    def describe(self) -> str:
        """Return the message on one line, in which line breaks are escaped: where, problem, allowed, fix."""
        where, problem, allowed, fix = map(on_one_line, (self.where, self.problem, self.allowed, self.fix))
        problem = problem.rstrip(".")
        parts = [f"{where}: {problem}" + ("" if problem.endswith("?") else ".")]
        parts += [f"Allowed: {allowed.rstrip('.')}."] if allowed else []
        parts += [f"{fix.rstrip('.')}."] if fix else []
        return " ".join(parts)


class ConfigError(MirrortuneError):
    """One or several problems in the recipe or on the command line."""

    exit_code = 2

    @classmethod
    def several(cls, errors: Sequence[ConfigError]) -> ConfigError:
        """Combine one or more errors into one error with a line for each; duplicate lines are dropped."""
        lines = dict.fromkeys(line for error in errors for line in str(error).split("\n"))
        if len(errors) == 1 or len(lines) == 1:
            return errors[0]
        combined = cls("configuration", f"{len(lines)} problems")
        combined.args = ("\n".join(lines),)
        return combined


def all_of(*steps: Callable[[], Any]) -> list[Any]:
    """Call every step and return the results; if steps fail, raise one error for all failures.

    Raises:
        MirrortuneError: steps failed; the error has the class of the first failure and a line for each.
    """
    results, errors = [], []
    for step in steps:
        try:
            results.append(step())
        except MirrortuneError as error:
            errors.append(error)
    if not errors:
        return results
    lines = dict.fromkeys(line for error in errors for line in str(error).split("\n"))
    if len(errors) > 1:
        errors[0].args = ("\n".join(lines),)
    raise errors[0]


class DivergedError(MirrortuneError):
    """A loss or gradient that is not finite, at optimizer step ``step``."""

    exit_code = 2

    def __init__(self, step: int, problem: str, *, fix: str) -> None:
        super().__init__(f"step {step}", problem, fix=fix)
        self.step = step


class DataError(MirrortuneError):
    """A file, column, row or label that cannot be used."""

    exit_code = 3


class NoRowsError(DataError):
    """Data without rows to train on."""


class ResourceError(MirrortuneError):
    """Too little memory or disk, or the wrong hardware."""

    exit_code = 4


class VerificationError(MirrortuneError):
    """A merge or an adapter that fails its verification."""

    exit_code = 5


class HubError(MirrortuneError):
    """A repository, file or connection of the Hub that failed."""

    exit_code = 6


class InterruptedRun(MirrortuneError):  # noqa: N818  (nothing went wrong)
    """A signal stopped the run after its checkpoint was written.

    ``exit_code`` is 128 + the number of the signal, and ``step`` the last optimizer step, or None without steps.
    """

    def __init__(self, where: str, problem: str, *, signal_number: int, fix: str, step: int | None = None) -> None:
        super().__init__(where, problem, fix=fix)
        self.exit_code, self.step = 128 + signal_number, step


class PeerError(MirrortuneError):
    """Another process of the run failed and reports its error; this one ends silently with the same exit code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("processes", "another process of this run has failed")
        self.exit_code = exit_code


def not_as_meant(place: Path, problem: str) -> VerificationError:
    """Return the error for an output that failed verification when it was read back and was therefore discarded."""
    return VerificationError(str(place), problem, fix="It was not written; please report this with the model's name")


def raised_here(error: BaseException) -> bool:
    """Return whether an exception was raised by a line of this package, not in a library that it called."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and Path(trace.tb_frame.f_code.co_filename).parent.is_relative_to(Path(__file__).parent)


def first_line(error: BaseException | str, most: int = 300) -> str:
    """Return the first line of an error's text without its full stop, cut to ``most`` characters.

    Without a text, the name of the error's class is returned.
    """
    return str(error).strip().split("\n")[0].rstrip(".")[:most] or type(error).__name__


def cut_after(text: str, most: int) -> str:
    """Return a text, cut after ``most`` characters."""
    return text if len(text) <= most else f"{text[:most]}..."


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: ``1 row``, ``2,000 rows``."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def first_of(names: Iterable[str], most: int = 40, joint: str = ", ") -> str:
    """Return the first ``most`` names as a list: ``a, b and 3 more``."""
    known = list(names)
    return joint.join(known[:most]) + (f" and {len(known) - most} more" if len(known) > most else "")


def known_error(error: BaseException) -> ResourceError | None:
    """Return the error to report for a known exception of torch or the system, or None for any other exception.

    Known are: a device out of memory, a model that does not compute in 16 bits, flash attention in float32, a GPU that
    torch has no code for or that is busy, a file or folder without permission, such as a folder that may be entered but
    not listed, and a name that is too long.
    """
    if isinstance(error, PermissionError) and isinstance(error.filename, str):
        fix = "Permit it (chmod u+rx for a folder), or choose another path"
        return ResourceError(error.filename, "permission denied", fix=fix)
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG and isinstance(error.filename, str):
        return ResourceError(error.filename, "the name is too long for this file system", fix="Choose a shorter one")
    text = next(iter(str(error).strip().splitlines()), type(error).__name__)
    is_torch = isinstance(error, RuntimeError)
    if isinstance(error, MemoryError) or (is_torch and any(words in text for words in _OUT_OF_MEMORY)):
        return ResourceError(
            "memory", f"not enough memory on the device ({text})",
            fix="Use a smaller --batch-size (in training with more --gradient-accumulation-steps) or --max-length, "
            "train.gradient_checkpointing=true, or model.dtype=bfloat16",
        )  # fmt: skip
    if is_torch and any(words in text for words in _NOT_IN_16_BITS):
        return ResourceError(
            "train.precision", f"the model does not compute in 16 bits ({text})",
            fix="Use --precision fp32, with model.dtype=float32 if the base is stored in 16 bits",
        )  # fmt: skip
    if is_torch and _NO_CODE in text:
        return ResourceError(
            "device", f"this build of torch has no code for this GPU ({text})",
            fix="Install a build that has (torch.cuda.get_arch_list() lists them), or set CUDA_VISIBLE_DEVICES= to use "
            "the CPU",
        )  # fmt: skip
    if is_torch and _BUSY in text:
        return ResourceError(
            "device", f"another process has the GPU for itself ({text})",
            fix="Wait for it, or choose another GPU with CUDA_VISIBLE_DEVICES (none: the CPU)",
        )  # fmt: skip
    if is_torch and _NO_FLOAT32 in text:
        return ResourceError(
            "model.attention", f"flash attention computes in 16 bits only ({text})",
            fix="Use --precision bf16 or fp16, or model.attention=sdpa",
        )  # fmt: skip
    return None


# Of CUDA, MPS and XPU; of CPUs; of CUDA's libraries (CUBLAS_STATUS_ALLOC_FAILED), which get what torch has left them.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "_STATUS_ALLOC_FAILED")
_BUSY = "busy or unavailable"  # as for a GPU in the compute mode EXCLUSIVE_PROCESS
_NO_FLOAT32 = "FlashAttention only support fp16 and bf16"
_NO_CODE = "no kernel image is available"  # GPUs older or newer than those that a build was made for
_NOT_IN_16_BITS = (
    "BFloat16 without overflow",
    "Half without overflow",
    "implemented for 'BFloat16'",
    "implemented for 'Half'",
)


def did_you_mean(name: str, candidates: Iterable[str], cutoff: float = 0.55) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest candidate, or an empty string if none is near."""
    near = difflib.get_close_matches(name, list(candidates), n=1, cutoff=cutoff)
    return f" Did you mean '{near[0]}'?" if near else ""


def unknown_name(where: str, kind: str, name: str, candidates: Iterable[str]) -> ConfigError:
    """Return the error for an unknown name, which suggests the nearest name and lists all names."""
    names = sorted(candidates)
    return ConfigError(where, f"unknown {kind} '{name}'.{did_you_mean(name, names)}", allowed=", ".join(names))


_P = ParamSpec("_P")
_R = TypeVar("_R")
_FLAG = re.compile(r"(?<![\w-])(?:--[a-z]+(?:-[a-z]+)*|-o\b)(?![\w-])")
_ALIASES = {
    "-o": ("output_dir", "directory", "path"),
    "--model": ("base", "model"),
    "--target-modules": ("target_modules",),
}
_OVERWRITE = re.compile(r",? or replace it with --overwrite")
_KEY = re.compile(r"\badapter\.(\w+)( here|)")


def in_python_terms(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make a function of the Python API name its own parameters in errors, instead of flags and keys of the recipe.

    Flags and keys that are no parameter of the function are left as they are.
    """
    parameters = inspect.signature(function).parameters

    def parameter(flag: re.Match[str]) -> str:
        names = _ALIASES.get(flag[0], (flag[0].removeprefix("--").replace("-", "_"),))
        return next((name for name in names if name in parameters), flag[0])

    def key_or_parameter(key: re.Match[str]) -> str:
        if key[1] in parameters:
            return f"{key[1]}{key[2]}"
        return f"adapter.{key[1]}{' in a recipe' if key[2] else ''}"

    def in_terms(text: str) -> str:
        text = _KEY.sub(key_or_parameter, text)
        return _FLAG.sub(parameter, _OVERWRITE.sub("", text))

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        except MirrortuneError as error:
            error.rephrase(in_terms)
            raise

    return call


PREFERENCES = ("dpo", "ipo", "kto", "orpo", "simpo", "cpo", "ppo", "grpo", "rloo", "rlhf", "reward")


def no_preferences(where: str, name: str, *, allowed: str) -> ConfigError:
    """Return the error for the name of a preference method (DPO, PPO, ...), which mirrortune does not have."""
    return ConfigError(
        where, f"'{name}' learns from preferences, which mirrortune does not train on", allowed=allowed,
        fix="Use TRL's trainer around a model that mirrortune.attach() has adapted",
    )  # fmt: skip
