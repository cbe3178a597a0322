# SPDX-License-Identifier: Apache-2.0
"""Compare a loaded base model with its checkpoint.

Parameters that the checkpoint lacks, or holds in another shape, start at random. That is right for a task head only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from mirrortune.adapters.kinds import base_prefix
from mirrortune.errors import ConfigError, first_of
from mirrortune.models.load_errors import quiet

Shapes = Mapping[str, tuple[int, ...]]
_NUM_SHOWN = 3


def missing_in_base(model: nn.Module, missing: Iterable[str], auto_class: str) -> tuple[str, ...]:
    """Return those names of ``missing`` parameters that belong to the base model, such as a pooler's.

    In a model with a head that has no part for the base model, none can be told from those of the head.
    """
    prefix = base_prefix(model)
    if not prefix and auto_class != "AutoModel":
        return ()
    return tuple(sorted(name for name in missing if name.startswith(prefix)))


def check_loaded(name: str, model: nn.Module, missing: Collection[str]) -> None:
    """Check that a checkpoint has weights of the base model: of some classes, transformers expects other names.

    Args:
        name: name of the model, for messages.
        model: the loaded model.
        missing: names of the parameters of the base model that the checkpoint lacks.

    Raises:
        ConfigError: it has none.
    """
    prefix = base_prefix(model)
    if missing and {key for key, _ in model.named_parameters() if key.startswith(prefix)} <= set(missing):
        raise ConfigError(
            f"model '{name}'",
            f"none of its weights has a name that {type(model).__name__} expects, so all would start at random",
            fix="Use a model of another architecture for this task",
        )


def check_shapes(name: str, model: nn.Module, stored: Shapes, config: Any) -> None:
    """Check that the weights of a checkpoint have the shapes that its own configuration states.

    A head may have another size than the task needs, also one inside the base model.

    Args:
        name: name of the model, for messages.
        model: the loaded model.
        stored: shapes in the checkpoint of the parameters whose shapes in ``model`` differ.
        config: configuration of the checkpoint, without the fields of a task.

    Raises:
        ConfigError: they have not.
    """
    prefix = base_prefix(model)
    inside = sorted(parameter for parameter in stored if parameter.startswith(prefix))
    if not inside:
        return
    with quiet(), torch.device("meta"):
        stated = {key: tuple(p.shape) for key, p in type(model)(config).named_parameters(remove_duplicate=False)}
    if odd := [key for key in inside if key in stated and stated[key] != stored[key]]:
        differences = (f"{key} is {stored[key]} there, {stated[key]} by config.json" for key in odd)
        raise ConfigError(
            f"model '{name}'", f"its weights do not fit its config.json: {first_of(differences, _NUM_SHOWN, '; ')}",
            fix="Download or copy both again; they must be of one model",
        )  # fmt: skip


def describe_missing(names: tuple[str, ...]) -> str:
    """Return a note that parameters of the base model start at random."""
    what = "the checkpoint lacks weights of the base model, which start at random and are trained as a head"
    return f"{what}: {first_of(names, _NUM_SHOWN)}"
