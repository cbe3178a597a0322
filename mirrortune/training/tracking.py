# SPDX-License-Identifier: Apache-2.0
"""Send metrics to experiment trackers through accelerate's classes, without login prompt and telemetry.

Trackers are off by default.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mirrortune.errors import ConfigError
from mirrortune.system.console import chatter_to_stderr

PROJECT = "mirrortune"
# The package of each tracker, and environment variables that disable its telemetry.
_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
_QUIET = {
    "wandb": {"WANDB_SILENT": "true", "WANDB_CONSOLE": "off", "WANDB_ERROR_REPORTING": "false"},
    "mlflow": {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"},
    "trackio": {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"},
}

Track = Callable[[dict[str, float], int], None]
"""Function (values, step) that sends values to a tracker."""


def check_tracker(name: str | None) -> None:
    """Raise an error for a tracker whose package is not installed."""
    if name is not None and importlib.util.find_spec(_PACKAGES[name]) is None:
        raise ConfigError(
            "--track",
            f"the package of '{name}' is not installed",
            fix=f"pip install {_PACKAGES[name]}, or leave it out",
        )


@contextmanager
def tracker(name: str | None, folder: Path, settings: dict[str, Any], *, is_main: bool) -> Iterator[Track | None]:
    """Run a tracker on the main process while the block runs; yield None without a tracker.

    Args:
        name: name of the tracker, or None.
        folder: run directory, to which local trackers write.
        settings: settings by dotted key, shown by the tracker as the configuration of the run.
        is_main: this is the main process.

    Raises:
        ConfigError: the tracker does not start; the error quotes its message.
    """
    if name is None or not is_main:
        yield None
        return
    for key, value in {**_QUIET.get(name, {}), **_local(name, folder)}.items():
        os.environ.setdefault(key, value)
    from accelerate import tracking  # noqa: PLC0415

    made = {
        "tensorboard": lambda: tracking.TensorBoardTracker(PROJECT, folder / "tensorboard"),
        "wandb": lambda: tracking.WandBTracker(PROJECT, name=folder.name, dir=str(folder)),
        "mlflow": lambda: tracking.MLflowTracker(PROJECT, run_name=folder.name),
        "trackio": lambda: tracking.TrackioTracker(PROJECT, name=folder.name),
    }[name]()
    shown = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in settings.items()}
    try:
        with chatter_to_stderr():
            made.start()
            made.store_init_configuration(shown)
    except Exception as error:
        raise ConfigError(
            "--track",
            f"{name} does not start: {str(error).strip() or type(error).__name__}",
            fix=f"Install all of {name} (a slim package may lack what it stores in), or leave the option out",
        ) from error

    def track(values: dict[str, float], step: int) -> None:
        with chatter_to_stderr():
            made.log(values, step=step)

    try:
        yield track
    finally:
        with chatter_to_stderr():
            _finish(name, made)


def _finish(name: str, made: Any) -> None:
    if name == "trackio":  # the method that accelerate calls would leave the run to be finished again at exit
        importlib.import_module("trackio").finish()
    else:
        made.finish()


def _local(name: str, folder: Path) -> dict[str, str]:
    """Return environment variables that keep a tracker local unless the user has configured a server."""
    if name == "mlflow":
        return {"MLFLOW_TRACKING_URI": f"sqlite:///{(folder / 'mlflow.db').resolve()}"}
    if name == "wandb" and not _has_wandb_login():
        return {"WANDB_MODE": "offline"}  # online mode would prompt for a login; `wandb sync` can upload later
    return {}


def _has_wandb_login() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    host = os.environ.get("WANDB_BASE_URL", "api.wandb.ai").removeprefix("https://").rstrip("/")
    return netrc.is_file() and host in netrc.read_text(encoding="utf-8", errors="replace")
