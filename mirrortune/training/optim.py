# SPDX-License-Identifier: Apache-2.0
"""Build optimizers from their libraries, with separate parameter groups for adapter and head."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from mirrortune.adapters.inject import adapter_parameters, attachment, plain_parameters
from mirrortune.adapters.plain import RowRange
from mirrortune.errors import ConfigError
from mirrortune.system.console import chatter_to_stderr

OptimizerName = Literal["adamw", "sgd", "adafactor", "adamw-8bit", "schedule-free", "muon"]
Betas = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """An optimizer and its hyperparameters; None stands for the optimizer's default.

    Attributes:
        name: name of the optimizer.
        betas: decay rates of the running averages of gradients and of squared gradients.
        eps: term added to the denominator.
        momentum: momentum of ``sgd``, or of the matrices in ``muon``.
    """

    name: OptimizerName = "adamw"
    betas: Betas | None = None
    eps: float | None = None
    momentum: float | None = None


_Groups = list[dict[str, Any]]


def _adamw(groups: _Groups, settings: OptimizerSettings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, betas=settings.betas or (0.9, 0.999), eps=settings.eps or 1e-8, fused=True)


def _sgd(groups: _Groups, settings: OptimizerSettings) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9 if settings.momentum is None else settings.momentum)


def _adafactor(groups: _Groups, settings: OptimizerSettings) -> torch.optim.Optimizer:
    from transformers import Adafactor  # noqa: PLC0415

    # Uses the recipe's learning rates: Adafactor's own are relative to the size of a parameter, and angles start at 0.
    make: Any = Adafactor
    made: torch.optim.Optimizer = make(
        groups, eps=(settings.eps or 1e-30, 1e-3), scale_parameter=False, relative_step=False, warmup_init=False
    )
    return made


def _adamw_8bit(groups: _Groups, settings: OptimizerSettings) -> torch.optim.Optimizer:
    with chatter_to_stderr():
        from bitsandbytes.optim import AdamW8bit  # type: ignore[attr-defined]  # noqa: PLC0415
    make: Any = AdamW8bit
    made: torch.optim.Optimizer = make(groups, betas=settings.betas or (0.9, 0.999), eps=settings.eps or 1e-8)
    return made


def _schedule_free(groups: _Groups, settings: OptimizerSettings) -> torch.optim.Optimizer:
    from schedulefree import AdamWScheduleFree  # noqa: PLC0415

    made: torch.optim.Optimizer = AdamWScheduleFree(
        groups, betas=settings.betas or (0.9, 0.999), eps=settings.eps or 1e-8
    )
    made.train()  # type: ignore[attr-defined]
    return made


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the matrices of the adapter and of hidden layers, and AdamW for everything else.

    Args:
        groups: parameter groups; those with a true ``is_hidden_matrix`` are updated by Muon.
        settings: hyperparameters of both.
    """

    def __init__(self, groups: _Groups, settings: OptimizerSettings) -> None:
        eps, momentum = settings.eps or 1e-8, 0.95 if settings.momentum is None else settings.momentum
        hidden = [group for group in groups if group["is_hidden_matrix"]]
        others = [group for group in groups if not group["is_hidden_matrix"]]
        # Updates are scaled to the size of AdamW's, so that both can use the same learning rates.
        muon = torch.optim.Muon(hidden, lr=1.0, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        self._parts: list[tuple[bool, torch.optim.Optimizer]] = [(True, muon)]
        if others:
            adamw = torch.optim.AdamW(others, lr=1.0, betas=settings.betas or (0.9, 0.999), eps=eps)
            self._parts.append((False, adamw))
        super().__init__([group for _, part in self._parts for group in part.param_groups], {})

    @override
    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for is_hidden_matrix, part in self._parts:
            # Set in every step, because accelerate replaces groups and state when it prepares an optimizer.
            part.param_groups = [g for g in self.param_groups if g["is_hidden_matrix"] is is_hidden_matrix]
            part.state = self.state
            part.step()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """A kind of optimizer.

    Attributes:
        make: creates the optimizer from groups and settings.
        takes: fields of the settings that the optimizer uses.
        needs: required package and the extra that installs it; None for optimizers of torch and transformers.
        moments: maximum number of values that it keeps per trained parameter.
    """

    make: Callable[[_Groups, OptimizerSettings], torch.optim.Optimizer]
    takes: tuple[str, ...]
    needs: tuple[str, str] | None = None
    moments: float = 2


_KINDS: Mapping[str, _Kind] = {
    "adamw": _Kind(make=_adamw, takes=("betas", "eps")),
    "sgd": _Kind(make=_sgd, takes=("momentum",), moments=1),
    "adafactor": _Kind(make=_adafactor, takes=("eps",), moments=1),
    "adamw-8bit": _Kind(
        make=_adamw_8bit, takes=("betas", "eps"), needs=("bitsandbytes", "mirrortune[quantised]"), moments=0.5
    ),
    "schedule-free": _Kind(
        make=_schedule_free, takes=("betas", "eps"), needs=("schedulefree", "mirrortune[schedule-free]"), moments=3
    ),
    "muon": _Kind(make=MuonWithAdamW, takes=("betas", "eps", "momentum")),
}


def optimizer_problems(settings: OptimizerSettings, *, schedule: str, min_lr_ratio: float) -> list[ConfigError]:
    """Return errors for a missing library and for settings without effect, before anything is loaded."""
    name, kind = settings.name, _KINDS[settings.name]
    errors = [
        ConfigError(f"train.{key}", f"{name} has none, got {value}", fix="Remove it")
        for key in ("betas", "eps", "momentum")
        if key not in kind.takes and (value := getattr(settings, key)) is not None
    ]
    if kind.needs is not None and importlib.util.find_spec(kind.needs[0]) is None:
        problem = f"{name} needs the package {kind.needs[0]}, which is not installed"
        errors.append(ConfigError("train.optimizer", problem, fix=f"pip install '{kind.needs[1]}'"))
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        errors.append(
            ConfigError("train.optimizer", f"torch {torch.__version__} has no Muon", fix="pip install 'torch>=2.9'")
        )
    if name == "schedule-free" and schedule != "constant":
        problem = f"the averages of schedule-free stand for a decay, got {schedule}"
        errors.append(ConfigError("train.schedule", problem, allowed="constant", fix="Set train.schedule=constant"))
    elif schedule == "constant" and min_lr_ratio:
        errors.append(ConfigError("train.min_lr_ratio", f"constant has none, got {min_lr_ratio}", fix="Remove it"))
    return errors


def moments_per_number(name: str, *, is_of_matrices: bool) -> float:
    """Return the maximum number of values that an optimizer keeps per trained parameter.

    Args:
        name: name of the optimizer.
        is_of_matrices: nearly all trained parameters are in matrices, for which adafactor keeps only row and column
            sums.
    """
    return 0 if name == "adafactor" and is_of_matrices else _KINDS[name].moments


def hidden_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters that Muon updates: matrices of the adapter and of hidden layers.

    Vectors, embeddings and the output layer are left to AdamW, as Muon's authors recommend.
    """
    head = set(attachment(model).targets.head)
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    tables |= {id(p) for p in output.parameters(recurse=False)} if isinstance(output, nn.Module) else set()
    plain = {n: p for n, p in plain_parameters(model).items() if n not in head and RowRange.parse(n) is None}
    return {n: p for n, p in {**adapter_parameters(model), **plain}.items() if p.ndim == 2 and id(p) not in tables}


def check_matrices(model: nn.Module, name: str) -> None:
    """Check that a model, which may be on the meta device, trains a hidden matrix if the optimizer is muon.

    Raises:
        ConfigError: it trains none; the error names the other optimizers.
    """
    if name == "muon" and not hidden_matrices(model):
        method = attachment(model).spec.method
        raise ConfigError(
            "train.optimizer", f"muon updates matrices, and '{method}' trains none in hidden layers",
            allowed=", ".join(other for other in _KINDS if other != "muon"), fix="Leave it out",
        )  # fmt: skip


def build_optimizer(
    model: nn.Module,
    *,
    lr: float,
    head_lr: float,
    weight_decay: float,
    settings: OptimizerSettings | None = None,
    also_train_lr: float | None = None,
) -> torch.optim.Optimizer:
    """Build the optimizer of the trained parameters of ``model``; fused AdamW by default.

    Each group has a ``peak_lr``: ``lr`` for cores and for what the method trains of the base, ``head_lr`` for the head
    and the rows of new tokens, ``also_train_lr`` (``lr`` if None) for what else is trained beside an adapter. Weight
    decay applies only to matrices of the head and to those that the method trains, since there is no reason to pull
    angles towards zero, nor the embedding of a word that no row has.
    """
    settings = settings or OptimizerSettings()
    head_names = set(attachment(model).targets.head)
    plain, plain_lr, plain_decay = plain_parameters(model), lr, weight_decay
    if attachment(model).spec.preset.plain == "none":  # chosen by the user, not by the method
        plain_lr, plain_decay = lr if also_train_lr is None else also_train_lr, 0.0
    whole = {n: p for n, p in plain.items() if n not in head_names and RowRange.parse(n) is None}
    wanted = [
        (list(adapter_parameters(model).values()), lr, 0.0),
        ([p for n, p in whole.items() if p.ndim < 2], plain_lr, 0.0),
        ([p for n, p in whole.items() if p.ndim >= 2], plain_lr, plain_decay),
        ([p for n, p in plain.items() if RowRange.parse(n)], head_lr, 0.0),
        ([p for n, p in plain.items() if n in head_names and p.ndim < 2], head_lr, 0.0),
        ([p for n, p in plain.items() if n in head_names and p.ndim >= 2], head_lr, weight_decay),
    ]
    groups = [
        {"params": params, "lr": peak, "peak_lr": peak, "weight_decay": decay}
        for params, peak, decay in wanted
        if params
    ]
    if settings.name == "muon":
        check_matrices(model, settings.name)
        groups = _by_shape(groups, {id(p) for p in hidden_matrices(model).values()})
    return _KINDS[settings.name].make(groups, settings)


def _by_shape(groups: _Groups, hidden: set[int]) -> _Groups:
    """Split groups into hidden matrices and everything else."""
    found = []
    for group in groups:
        for is_hidden in (True, False):
            if params := [p for p in group["params"] if (id(p) in hidden) is is_hidden]:
                found.append({**group, "params": params, "is_hidden_matrix": is_hidden})
    return found


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the learning rate of every group to ``factor`` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


@contextmanager
def averaged_weights(optimizer: Any) -> Iterator[dict[int, Tensor]]:
    """Replace the trained parameters by the average that schedule-free evaluates and saves, while the block runs.

    Yields:
        The values with which training continues, by the id of their parameter; empty for other optimizers, for which
        nothing is replaced.
    """
    if not hasattr(optimizer, "eval"):
        yield {}
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    points = {id(p): p.detach().clone() for p in parameters}
    optimizer.eval()
    try:
        yield points
    finally:
        optimizer.train()
        with torch.no_grad():
            for p in parameters:  # restored from copies: computing them from the average would add rounding errors
                p.copy_(points[id(p)])
