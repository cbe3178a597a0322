# SPDX-License-Identifier: Apache-2.0
"""Translate exceptions that transformers raises while loading into mirrortune's errors."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shlex
import struct
import sys
from collections.abc import Iterator

import torch
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from safetensors import SafetensorError

from mirrortune.errors import ConfigError, ResourceError, known_error
from mirrortune.system.paths import ModelPlace

# Exceptions caused by missing keys and by sizes that are negative, not divisible or of the wrong type.
_DAMAGE = (ArithmeticError, AttributeError, LookupError, RuntimeError, StrictDataclassError, TypeError, ValueError)


@contextlib.contextmanager
def load_errors(name: str) -> Iterator[None]:
    """Silence transformers, and translate its exceptions about the model ``name``.

    Raises:
        ConfigError: the checkpoint cannot be read, or needs a package that is not installed.
        ResourceError: the model does not fit into memory.
    """
    try:
        with quiet():
            yield
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        raise ResourceError(f"model '{name}'", "does not fit into memory", fix="Set model.dtype=bfloat16") from error
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"model '{name}'", "its weights are a pickle that holds more than tensors, and would run code when loaded",
            allowed="safetensors, or a pickle of only tensors",
            fix="Take a revision with safetensors (--revision), or open it where you trust it and save_pretrained it",
        ) from error  # fmt: skip
    except (SafetensorError, json.JSONDecodeError, RecursionError, UnicodeDecodeError, struct.error, EOFError) as error:
        raise ConfigError(f"model '{name}'", f"a file is damaged ({error})", fix="Download or copy it again") from error
    except (ValueError, KeyError) as error:
        text = str(error).strip().split("\n")[0]
        if "Unrecognized configuration class" in text:
            raise ConfigError(
                f"model '{name}'", "its architecture has no head for this task in transformers"
            ) from error
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"model '{name}'", "it needs code from its own repository",
                fix="Read that code, then pass --trust-remote-code (it runs with your permissions)",
            ) from error  # fmt: skip
        if "attn_implementation" in str(error):
            raise ConfigError("model.attention", text[:300], fix="Set another, or none") from error
        if "model type" in text or "model_type" in text:
            raise ConfigError(f"model '{name}'", text[:300]) from error
        raise
    except ImportError as error:  # a package that reads a quantised format is missing
        raise ConfigError(f"model '{name}'", str(error).strip().split("\n")[0][:300], fix="Install it") from error
    except OSError as error:
        if ModelPlace.parse(name).is_local:  # causes on the Hub are explained by hub_errors
            _refuse_folder(name, error)
        raise


def _refuse_folder(name: str, error: OSError) -> None:
    """Raise ConfigError for a local model that is incomplete, or of which this user may not read a file.

    Transformers names a missing file; safetensors reports one that may not be read as missing, too.
    """
    folder = ModelPlace.parse(name).path()
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    if closed := [str(file) for file in files if file.is_file() and not os.access(file, os.R_OK)]:
        fix = f"Permit it: chmod u+r {shlex.join(closed)}"
        raise ConfigError(f"model '{name}'", "its files may not be read (permission denied)", fix=fix) from error
    if error.__cause__ is None:
        raise ConfigError(f"model '{name}'", str(error).strip().split("\n")[0][:300]) from error


@contextlib.contextmanager
def damage_errors(
    name: str, what: str = "its configuration cannot be used", *, trust_remote_code: bool
) -> Iterator[None]:
    """Report exceptions about impossible values in a model's files as ConfigError.

    Exceptions that the model's remote code may have raised are passed on, and those of the device, onto which quantised
    weights are loaded.

    Raises:
        ConfigError: the block raised such an exception; the error names the model.
        ResourceError: Python runs with -OO, under which transformers cannot import models.
    """
    try:
        yield
    except _DAMAGE as error:
        if trust_remote_code or known_error(error) is not None:
            raise
        if sys.flags.optimize > 1:
            problem, fix = "transformers needs the docstrings of models", "Start it without -OO and PYTHONOPTIMIZE=2"
            raise ResourceError("python -OO", problem, fix=fix) from error
        said = str(error).strip().split("\n")[0][:200]
        raise ConfigError(
            f"model '{name}'", f"{what} ({type(error).__name__}: {said})", fix="Download or copy it again"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Disable progress bars of transformers and the Hub, and transformers' warnings, while the context is open.

    mirrortune reports their content, such as a new head.
    """
    from transformers.utils import logging  # noqa: PLC0415

    level, has_bars, has_hub_bars = logging.get_verbosity(), logging.is_progress_bar_enabled(), _has_hub_bars()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        if has_hub_bars != _has_hub_bars():
            (enable_progress_bars if has_hub_bars else disable_progress_bars)()


def _has_hub_bars() -> bool:
    return not are_progress_bars_disabled()
