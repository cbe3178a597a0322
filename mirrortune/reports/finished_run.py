# SPDX-License-Identifier: Apache-2.0
"""Read the directory of a finished run, the only source of its page, its curves and its model card.

Pages and cards are meant to be shared, so only regular files are read: a symbolic link could expose any file of the
user.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from mirrortune.config.recipe import flatten, read_saved_recipe
from mirrortune.errors import ConfigError, VerificationError
from mirrortune.system.console import describe_metrics, kilobytes, significant
from mirrortune.system.paths import read_json_object
from mirrortune.system.run_directory import RunDirectory
from mirrortune.system.run_status import describe_status

MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)
"""Errors of code that reads malformed content: a run's files have no schema."""


class FinishedRun:
    """The files of a finished run, each read when it is first used.

    Args:
        run: run directory.

    Attributes:
        name: name of the directory.
        results: content of ``results.json``.
        environment: content of ``environment.json``; empty if the file is missing.

    Raises:
        ConfigError: the directory holds no finished run, or a file is damaged.
        VerificationError: a file is a symbolic link.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.directory, self.name = run, run.path.name
        if not run.recipe.is_file() or not run.results.is_file():
            problem = "this run has not finished" if run.recipe.is_file() else "it is not a run directory"
            if how := describe_status(run):
                problem = f"{problem}: {how}"
            raise ConfigError(str(run.path), problem, fix="Give a folder that train has finished")
        self.results = read_json(run.results)
        self.environment = read_json(run.path / "environment.json")

    @cached_property
    def validation(self) -> dict[str, Any]:
        """Content of ``validation.json``: predictions, row lengths, class counts and plane angles."""
        return read_json(self.directory.validation)

    @cached_property
    def merge(self) -> dict[str, Any]:
        """Report of the run's last merge; empty if it was never merged."""
        return read_json(self.directory.path / "reports" / "merge.json")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Every setting of the recipe by its dotted key, such as ``train.epochs``."""
        return flatten(read_saved_recipe(regular_file(self.directory.path, self.directory.recipe.name)))

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """Lines of ``metrics.jsonl``."""
        return self.directory.events()

    @cached_property
    def progress(self) -> list[dict[str, Any]]:
        """Lines of ``progress.jsonl``."""
        return self.directory.progress()

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """Lines of ``samples.jsonl``."""
        return self.directory.sampled()

    @property
    def metric(self) -> str:
        """Name of the metric that chose the checkpoint."""
        return str(self.results["selection_metric"])

    def series(self, event: str, key: str) -> tuple[list[float], list[float]]:
        """Return the steps and the values at which ``event`` logged ``key``."""
        found = [(e["step"], e[key]) for e in self.events if e["event"] == event and key in e]
        return [s for s, _ in found], [v for _, v in found]

    def summary(self) -> dict[str, str]:
        """Return the results as formatted text, by name."""
        r = self.results
        per_second = r.get("tokens_per_second")
        tokens = "" if per_second is None else f", {significant(per_second)} tokens per second"
        if r.get("padding_share") is not None:
            tokens += f", {r['padding_share']:.0%} padding"
        is_image = self.settings.get("task.kind") == "image-classification"
        reserved = r.get("peak_reserved_bytes")
        kept = "" if reserved is None else f" allocated, {reserved / 2**20:,.0f} MiB reserved"
        return {
            "method": str(self.settings["adapter.method"]),
            "validation": describe_metrics(r["metrics"]),
            **({"before training": describe_metrics(r["metrics_before"])} if r.get("metrics_before") else {}),
            **{f"{split} (reported)": describe_metrics(m) for split, m in (r.get("reported") or {}).items()},
            "kept after step": f"{r['best_step']:,}",
            "trainable parameters": f"{r['trainable_parameters']:,}"
            + (f", plus {r['head_parameters']:,} in the task head" if r["head_parameters"] else ""),
            "adapter": kilobytes(r["adapter_bytes"]),
            "training": f"{r['train_seconds']:,.0f} s, {significant(r['samples_per_second'])} "
            f"{'images' if is_image else 'rows'} per second{tokens}",
            "peak memory": f"{r['peak_memory_bytes'] / 2**20:,.0f} MiB{kept}",
        }


def regular_file(folder: Path, name: str) -> Path:
    """Return the path of ``name`` in ``folder`` after checking that it is a regular file.

    Symbolic links are followed only within the Hub's cache, which is built from them.

    Raises:
        VerificationError: the path is missing, a symbolic link, or not a regular file.
    """
    from huggingface_hub import constants  # noqa: PLC0415

    path, inside = folder / name, Path(os.path.realpath(folder))
    real, cache = Path(os.path.realpath(path)), Path(os.path.realpath(constants.HF_HUB_CACHE))
    if inside != cache and inside.is_relative_to(cache):
        is_plain = real.is_relative_to(cache / inside.relative_to(cache).parts[0])
    else:
        is_plain = real == inside / name
    if not is_plain or not real.is_file():
        problem = "it is missing" if not is_there(path) else "it is a link or not a regular file, and is not sent"
        raise VerificationError(str(path), problem, fix="Put the file itself there, or write the folder again")
    return path


def is_there(path: Path) -> bool:
    """Return whether ``path`` exists, be it only as a broken symbolic link."""
    return path.is_symlink() or path.exists()


@contextmanager
def damage(where: str) -> Iterator[None]:
    """Report errors of the block that come from malformed content as a damaged file.

    Raises:
        VerificationError: the block raised such an error.
    """
    try:
        yield
    except MALFORMED as error:
        problem = f"a file of the run is damaged ({type(error).__name__}: {str(error)[:200]})"
        raise VerificationError(where, problem, fix="Copy the run again; --debug says more") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in ``path``, or return an empty dict if the file is missing.

    Raises:
        ConfigError: the file is damaged.
        VerificationError: it holds something else than an object, or is a symbolic link or not a regular file.
    """
    if not is_there(path):
        return {}
    try:
        return read_json_object(regular_file(path.parent, path.name))
    except ValueError as error:
        raise ConfigError(str(path), f"damaged ({error})", fix="Restore the run directory") from error
    except TypeError as error:
        raise VerificationError(str(path), f"damaged ({error})", fix="Restore the run directory") from error
