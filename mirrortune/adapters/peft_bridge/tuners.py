# SPDX-License-Identifier: Apache-2.0
"""Attach the tuners of the ``peft`` package (an optional dependency) instead of mirrortune's cores, to the same layers
and with the same head and training loop.

Tuners are attached in place and without a wrapper, so that the model keeps its class and ``forward``. ``options.py``
builds their configurations, and ``files.py`` their files.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mirrortune.adapters.inject import Attachment, attachment, changes, checked_targets, freeze, thaw
from mirrortune.adapters.peft_bridge.options import (
    check_options,
    import_peft,
    make_config,
    recorded_warnings,
    stored_config,
)
from mirrortune.adapters.spec import AdapterSpec
from mirrortune.adapters.svd import check_finite
from mirrortune.adapters.targets import Targets
from mirrortune.errors import ConfigError, first_line

ADAPTER_NAME = "default"  # PEFT supports several adapters in a model; mirrortune attaches one


@dataclass(frozen=True, slots=True)
class PeftLayer:
    """A layer that a tuner has replaced, as a :class:`mirrortune.adapters.inject.AdaptedLayer`.

    Attributes:
        method: method of the adapter, for messages.
        module: layer of PEFT, which holds the base layer.
        trained: names of the trained parameters of ``module``.
        dtype: dtype of the base layer's weight when the tuner was attached, as the model may be cast later; None for
            quantised layers without one.
    """

    method: str
    module: nn.Module
    trained: tuple[str, ...]
    dtype: torch.dtype | None

    @property
    def base_layer(self) -> nn.Linear:
        """The wrapped linear layer. The tuner may have changed its weight (PiSSA leaves the residual there)."""
        found: nn.Linear = self.module.get_base_layer()  # type: ignore[operator]
        return found

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters of this layer."""
        return {name: self.module.get_parameter(name) for name in self.trained}

    @torch.no_grad()
    def merged(self, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Merge weight and bias with PEFT's method, on a copy in float64 on the CPU.

        Raises:
            ConfigError: PEFT cannot merge this tuner; the error gives PEFT's reason.
        """
        layer: Any = copy.deepcopy(self.module).cpu().double()
        base = layer.get_base_layer()
        for key, tensor in before.items():
            now = self.base_layer.get_parameter(key).cpu()
            # The checkpoint may hold in 32 bits what training used in 16. If the tuner has changed the weight (PiSSA),
            # its own value is kept.
            if torch.equal(now, tensor.to(device="cpu", dtype=now.dtype)):
                base.get_parameter(key).copy_(tensor)
        plain = {key: base.get_parameter(key).clone() for key in before}
        try:
            layer.merge(safe_merge=True)
        except (NotImplementedError, ValueError) as error:
            raise ConfigError(
                "merge",
                f"PEFT cannot merge method '{self.method}' ({first_line(error)})",
                fix="Use the adapter as it is: eval reads it, and so does PEFT",
            ) from error
        after = {key: base.get_parameter(key).detach() for key in before}
        return {k: t for k, t in after.items() if k == "weight" or not torch.equal(t, plain[k])}


@dataclass(slots=True, kw_only=True)
class PeftAttachment(Attachment):
    """The adapter of a model whose layers are PEFT's.

    Attributes:
        tuner: PEFT's tuner of the model, which holds the parameters shared by layers.
        remarks: remarks to show before training: PEFT's warnings, and the reason if the tuner cannot be merged.
    """

    tuner: nn.Module
    remarks: tuple[str, ...]


def attach_tuner(
    model: nn.Module,
    spec: AdapterSpec,
    *,
    targets: Targets,
    config: dict[str, Any] | None = None,
    on_layer: Callable[[str, Tensor], None] | None = None,
) -> nn.Module:
    """Attach a PEFT tuner to the target layers of ``model`` in place, and freeze all other parameters except the head.

    Args:
        model: loaded model, or model on the meta device.
        spec: settings of the adapter; its seed also seeds the random numbers of the tuner.
        targets: targets of ``spec`` in ``model``.
        config: PEFT's configuration of an adapter that is loaded; None for a new adapter.
        on_layer: called with (name, weight) of each layer before it is replaced.

    Raises:
        ConfigError: ``peft`` is not installed, an option is invalid, or the tuner does not support a layer.
    """
    peft = import_peft(spec.method)
    targets = checked_targets(model, spec, targets)
    check_options(spec)
    chosen = list(targets.layers)
    with recorded_warnings() as warned:
        built = make_config(spec, chosen) if config is None else stored_config(config, chosen)
    if not spec.options:
        warned.clear()  # these warnings are about defaults
    for name in chosen if on_layer else ():
        weight = targets.layers[name].read(model)
        on_layer(name, weight)  # type: ignore[misc]
        check_finite(name, weight)
    with changes(model):
        freeze(model, targets)
        with _seeded(model, spec.seed), recorded_warnings() as more:
            tuner = _build_tuner(model, spec, built, is_stored=config is not None)
        peft.tuners.tuners_utils.cast_adapter_dtype(model, ADAPTER_NAME)
        # Some tuners create sparse tensors, and torch warns unless this setting is made explicitly.
        if not torch.sparse.check_sparse_tensor_invariants.is_enabled():  # type: ignore[no-untyped-call]
            torch.sparse.check_sparse_tensor_invariants.disable()  # type: ignore[no-untyped-call]
        layers = _tuned_layers(model, spec, targets, peft)
        _check_as_asked(model, spec)
        said = [*(f"PEFT: {first_line(w.message)}" for w in (*warned, *more)), *_merge_remark(layers)]
        model.mirrortune = PeftAttachment(  # type: ignore[assignment]
            spec=spec, targets=targets, layers=layers, tuner=tuner, remarks=tuple(dict.fromkeys(said))
        )
        thaw(model)
    return model


def _build_tuner(model: nn.Module, spec: AdapterSpec, built: Any, *, is_stored: bool) -> nn.Module:
    """Put PEFT's tuner with the configuration ``built`` into ``model``; raise a ConfigError if PEFT cannot."""
    kinds = import_peft(spec.method).PEFT_TYPE_TO_TUNER_MAPPING
    foreseen = (ValueError, TypeError, NotImplementedError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]
    unforeseen = (LookupError, AttributeError, AssertionError) if is_stored else ()  # by values of a file
    try:
        tuner: nn.Module = kinds[built.peft_type](model, built, ADAPTER_NAME)
    except (*foreseen, *unforeseen) as error:
        raise ConfigError("adapter", f"PEFT cannot put '{spec.method}' into this model: {first_line(error)}") from error
    return tuner


def remarks(model: nn.Module) -> tuple[str, ...]:
    """Return the remarks on a PEFT tuner to show before training; empty for other methods."""
    found = attachment(model)
    return found.remarks if isinstance(found, PeftAttachment) else ()


def count_trained(model: nn.Module, spec: AdapterSpec, targets: Targets) -> tuple[int, int]:
    """Return the number of parameters that a tuner trains in ``model``, and the number that it adds.

    Both are counted on a copy of the model without weights.

    Raises:
        ConfigError: see :func:`attach_tuner`.
    """
    config = plain_start(spec)
    adapted = None
    with contextlib.suppress(ConfigError, RuntimeError, NotImplementedError), torch.device("meta"):
        adapted = attach_tuner(hollow_copy(model, "meta"), spec, targets=targets, config=config)
    if adapted is None:  # the tuner reads weights: give it zeros that take no memory
        adapted = attach_tuner(hollow_copy(model, "cpu"), spec, targets=targets, config=config)
    layers = attachment(adapted).layers.values()
    trained = sum(p.numel() for layer in layers for p in layer.adapter_parameters().values())
    own = {id(t): t.numel() for t in (*adapted.parameters(), *adapted.buffers())}
    return trained, sum(own.values()) - sum(t.numel() for t in (*model.parameters(), *model.buffers()))


def plain_start(spec: AdapterSpec) -> dict[str, Any] | None:
    """Return a configuration of the same size without an initialisation that decomposes all weights; None if there is
    no such initialisation.
    """
    assert spec.preset.peft is not None
    start = {**spec.preset.peft.fixed, **spec.options}.get("init_lora_weights")
    return {**make_config(spec, []).to_dict(), "init_lora_weights": True} if start in ("pissa", "olora") else None


def hollow_copy(model: nn.Module, device: str) -> nn.Module:
    """Copy ``model`` with all parameters set to zeros that take no memory."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.zeros((), dtype=p.dtype, device=device).expand(p.shape), requires_grad=False)
        for p in model.parameters()
    }
    return copy.deepcopy(model, memo)


def _check_as_asked(model: nn.Module, spec: AdapterSpec) -> None:
    # If its CUDA extension cannot be built, PEFT uses 1 instead of the requested factor.
    asked = spec.options.get("boft_n_butterfly_factor", 1)
    factors = {len(p) for name, p in model.named_parameters() if f"boft_R.{ADAPTER_NAME}" in name}
    if factors - {asked}:
        raise ConfigError(
            "adapter.options.boft_n_butterfly_factor",
            f"got {asked}; PEFT needs its CUDA extension for more than 1, which cannot be built here",
        )


def _merge_remark(layers: dict[str, PeftLayer]) -> list[str]:
    """Return a remark with the reason if the smallest layer cannot be merged, else an empty list."""
    smallest = min(layers.values(), key=lambda layer: layer.base_layer.weight.numel())
    if smallest.base_layer.weight.device.type != "meta":
        try:
            smallest.merged(dict(smallest.base_layer.named_parameters()))
        except ConfigError as error:
            return [f"it can be trained and scored, but {error.problem}"]
    return []


def _tuned_layers(model: nn.Module, spec: AdapterSpec, targets: Targets, peft: Any) -> dict[str, PeftLayer]:
    kind = peft.tuners.tuners_utils.BaseTunerLayer
    tuned = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
    assert tuned.keys() == targets.layers.keys()
    seen: set[int] = set()
    layers = {}
    for name, module in tuned.items():
        own = [(key, p) for key, p in module.named_parameters() if p.requires_grad and id(p) not in seen]
        seen |= {id(p) for _, p in own}  # shared parameters are counted once
        base: nn.Module = module.get_base_layer()
        dtype = getattr(getattr(base, "weight", None), "dtype", None)
        layers[name] = PeftLayer(spec.method, module, tuple(key for key, _ in own), dtype)
    return layers


@contextlib.contextmanager
def _seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Seed torch's generators, and restore their states on exit."""
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        torch.manual_seed(seed)
        yield
