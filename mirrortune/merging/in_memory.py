# SPDX-License-Identifier: Apache-2.0
"""Writes base + adapter as a plain transformers checkpoint, and believes nothing until it has reopened what it wrote.

Weights are added in float64 and rounded once to the base's stored dtype. The result is written under a temporary name,
opened with transformers alone, compared tensor by tensor with a float64 reference and by its outputs with base +
adapter, and only then renamed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mirrortune.adapters.files.adapter_file import AdapterFile
from mirrortune.adapters.files.load import load_into
from mirrortune.adapters.inject import FactorSource, attachment, plain_parameters
from mirrortune.data.examples import Batch
from mirrortune.errors import ConfigError
from mirrortune.merging.bases import load_plain, trained_on
from mirrortune.merging.contents import check_ties, tensor_entry
from mirrortune.models.load import DTYPES, ModelSource, find_model, load_model, pad_token_id, resolve_dtype
from mirrortune.system.devices import widen
from mirrortune.tasks.base import Task, task_from_dict
from mirrortune.tasks.drawn_inputs import first_that_runs
from mirrortune.tasks.model_outputs import compared_outputs, largest_difference
from mirrortune.tasks.probes import find_processors, probes

Probes = Batch | Iterable[Batch]
"""Inputs of a model's forward, or candidates for them, the likeliest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """The verdict on a merged checkpoint.

    Attributes:
        max_abs_logit_error: largest difference of an output between the reopened model and
            base + adapter, on the probes; None if no inputs are known that the model computes.
        max_rel_weight_error: largest ||W - reference|| / ||reference|| over the adapted tensors, reference in float64.
        tolerance: allowed error of an output: 1e-4 of the largest output (at least of 1) in float32; 8 roundings where
            the base was trained on, or is stored, in 16 bits.
        weight_tolerance: allowed weight error: one rounding of the stored dtype.
        changed_tensors: tensors that are not adapted and yet differ from the base.
        passed: everything within tolerance and nothing else changed.
        not_compared: why no outputs could be compared; empty if they were.
    """

    max_abs_logit_error: float | None
    max_rel_weight_error: float
    tolerance: float
    weight_tolerance: float
    changed_tensors: int
    passed: bool
    not_compared: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseWithAdapter:
    """An adapter opened for merging.

    Attributes:
        source: of the base.
        plain: the base without the adapter.
        adapted: the base with the adapter, in the dtype it was trained on; in evaluation mode.
        probes: inputs of the model's forward on which results are compared, or candidates for them.
    """

    source: ModelSource
    plain: nn.Module
    adapted: nn.Module
    probes: Probes


def open_adapter(
    adapter: AdapterFile,
    factor_source: FactorSource,
    *,
    base: str | None,
    trust_remote_code: bool,
    remarks: list[str] | None = None,
    is_as_trained: bool = False,
) -> BaseWithAdapter:
    """Load an adapter's base, with the adapter and without it.

    Args:
        adapter: from :func:`read_adapter`.
        factor_source: computes or remembers factors.
        base: another place of the same base model.
        trust_remote_code: run code from the base's repository.
        remarks: see :func:`load_adapted`.
        is_as_trained: load the plain base in the dtype that the adapter was trained on, and not in the stored one.

    Raises:
        ConfigError: the base cannot be found.
        VerificationError: another base or basis.
    """
    source = find_base(adapter, base, trust_remote_code=trust_remote_code)
    packed = trained_on(adapter, source, base)
    if packed is not None:
        source = replace(source, load_in=None)
    task = task_from_dict(adapter.task) if adapter.task else None
    auto_class = str(adapter.base["auto_class"])
    processors, _ = find_processors(task, source, auto_class)
    pad = padding_id(processors)
    adapted = load_adapted(adapter, source, task, pad, factor_source, remarks=remarks, is_plain=True, turned=packed)
    # The stored dtype may be float16 too, which no CPU trains in.
    stored = resolve_dtype("auto", source.config, torch.device("meta"))
    dtype = DTYPES[adapter.base["dtype"]] if is_as_trained else stored
    plain = load_plain(source, auto_class, config_fields(adapter, task), dtype, pad)
    found = probes(task, processors, source, auto_class)
    return BaseWithAdapter(source=source, plain=plain, adapted=adapted, probes=found)


def padding_id(processors: Sequence[Any]) -> int | None:
    """The id that pads texts, of the first processor that has one."""
    return next((found for one in processors if (found := pad_token_id(one)) is not None), None)


def load_adapted(
    adapter: AdapterFile,
    source: ModelSource,
    task: Task | None,
    pad_token_id: int | None,
    factor_source: FactorSource,
    *,
    remarks: list[str] | None = None,
    is_plain: bool = False,
    turned: ModelSource | None = None,
) -> nn.Module:
    """The base model that the adapter names, in the dtype it was trained on, with the adapter attached; in evaluation
    mode.

    What does not fit is refused, or noted in ``remarks`` if there is such a list. A quantised base is dequantised if
    ``is_plain``; ``turned`` is of the quantised one whose weights the adapter turns, if ``source`` is the full one.
    """
    check_class(adapter)
    dtype = DTYPES[adapter.base["dtype"]]
    arguments = adapter.base["auto_class"], config_fields(adapter, task), dtype, pad_token_id
    model = load_plain(source, *arguments) if is_plain else load_model(source, *arguments).model
    widen(model, adapter.head)
    original = None if turned is None else load_plain(turned, *arguments)
    book = load_into(model, adapter, factor_source, force_base=remarks is not None, trained_on=original)
    if remarks is not None:
        remarks += book.remarks
    return model.eval()


@torch.no_grad()
def merged_state(plain: nn.Module, adapted: nn.Module) -> dict[str, Tensor]:
    """The state of ``plain`` with every adapted weight and trained parameter of ``adapted`` merged into it.

    Sums are made in float64 and rounded once to the dtype of ``plain``'s tensor.
    """
    state = dict(plain.state_dict())
    for name, parameter in _trained_tensors(adapted, plain).items():
        state[name] = parameter.detach().cpu().to(state[name].dtype)
    for names, merged in adapted_tensors(adapted, plain.state_dict()):
        # One tensor under all of its names: what is tied stays tied.
        state |= dict.fromkeys(names, merged.to(state[names[0]].dtype))
    return state


def _trained_tensors(adapted: nn.Module, plain: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that were trained as they are, by every name that ``plain`` has for them: tied ones have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in plain.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {
        other: parameter
        for name, parameter in plain_parameters(adapted).items()
        for other in names[id(plain.get_parameter(name))]
    }


def adapted_tensors(adapted: nn.Module, before: Mapping[str, Tensor]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Every tensor of the base model that the adapter changes: its names there, and its merged value in float64.

    Args:
        adapted: the base model with an adapter.
        before: tensors of the base model; read layer by layer, as the result is asked for.
    """
    attached = attachment(adapted)
    targets = attached.targets.layers
    for weights, parts in itertools.groupby(attached.layers.items(), key=lambda item: targets[item[0]].tensors):
        biases = tuple(n.removesuffix("weight") + "bias" for n in weights if n.endswith("weight"))
        names = {"weight": weights, "bias": biases}
        own = {key: before[found[0]] for key, found in names.items() if found and found[0] in before}
        changed: dict[str, Tensor] = {}
        for _, layer in parts:  # several where a fused weight is split
            changed |= layer.merged(own | changed)
        for key, merged in changed.items():
            yield names[key], merged


@torch.no_grad()
def verify(
    folder: Path,
    plain: nn.Module,
    adapted: nn.Module,
    auto_class: str,
    probes: Probes,
    *,
    entries: dict[str, dict[str, float]] | None = None,
    trust_remote_code: bool = False,
) -> Verification:
    """Reopen ``folder`` with transformers alone and compare it with float64 references, and on ``probes`` (inputs of
    the model's forward, or candidates for them) with base + adapter; the errors of each tensor are put into
    ``entries``.
    """
    import transformers  # noqa: PLC0415

    load: Any = getattr(transformers, auto_class).from_pretrained
    reopened = load(folder, dtype="auto", trust_remote_code=trust_remote_code).eval()
    check_ties(reopened, plain)
    written, before = dict(reopened.state_dict()), dict(plain.state_dict())
    trained = _trained_tensors(adapted, plain)
    found = {} if entries is None else entries
    for names, reference in adapted_tensors(adapted, plain.state_dict()):
        for name in names:
            stored = before.pop(name)
            found[name] = tensor_entry(written[name], reference, functools.partial(Tensor.cpu, stored))
    weight_error = max((entry["rel_weight_error"] for entry in found.values()), default=0.0)
    changed = 0
    for name, tensor in before.items():
        expected = trained[name].detach().cpu().to(tensor.dtype) if name in trained else tensor
        changed += name not in written or not torch.equal(written[name], expected)
    dtype = next(iter(reopened.parameters())).dtype
    outputs = compare_models(reopened, adapted, probes)
    return judge(outputs, weight_error=weight_error, weight_tolerance=torch.finfo(dtype).eps, changed_tensors=changed)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputError:
    """How far two models' outputs are from each other.

    Attributes:
        error: the largest difference; None if they could not be compared.
        tolerance: the largest that is allowed.
        reason: why they could not be compared.
    """

    error: float | None
    tolerance: float
    reason: str = ""


def compare_models(reopened: nn.Module, adapted: nn.Module, probes: Probes) -> OutputError:
    """Compare a reopened merged model with base + adapter on ``probes``; each rounds as it stores, or as it was
    trained.
    """
    coarsest = max(torch.finfo(p.dtype).eps for p in (*adapted.parameters(), *reopened.parameters()))
    computed_in, stored_in = (next(iter(model.parameters())).dtype for model in (adapted, reopened))
    if stored_in == torch.float16 or computed_in == torch.float32:
        reopened.float()  # no CPU computes all in float16; 16-bit arithmetic is no error of the weights
    return compare_outputs(
        lambda probe: compared_outputs(reopened, probe), lambda probe: compared_outputs(adapted, probe), probes,
        tolerance=max(1e-4, 8 * coarsest),
    )  # fmt: skip


def compare_outputs(
    merged: Callable[[Batch], Tensor], adapted: Callable[[Batch], Tensor], probes: Probes, *, tolerance: float
) -> OutputError:
    """Compare two models on the same inputs.

    Args:
        merged: inputs of the forward -> outputs (N,) of a model that needs nothing of ours, which therefore decides
            which of several candidates for its inputs are right.
        adapted: the same of base + adapter.
        probes: inputs, or candidates for them.
        tolerance: allowed error, relative to the largest output (at least to 1).
    """
    found = (probes, merged(probes)) if isinstance(probes, dict) else first_that_runs(probes, merged)
    if isinstance(found, str):
        return OutputError(error=None, tolerance=tolerance, reason=found)
    probe, outputs = found
    expected = adapted(probe)
    finite = expected[torch.isfinite(expected)]
    largest = max(1.0, float(finite.abs().max())) if len(finite) else 1.0
    return OutputError(error=largest_difference(outputs, expected), tolerance=tolerance * largest)


def judge(outputs: OutputError, *, weight_error: float, weight_tolerance: float, changed_tensors: int) -> Verification:
    """The verdict on everything that was measured."""
    is_same = outputs.error is None or outputs.error <= outputs.tolerance
    return Verification(
        max_abs_logit_error=outputs.error,
        max_rel_weight_error=weight_error,
        tolerance=outputs.tolerance,
        weight_tolerance=weight_tolerance,
        changed_tensors=changed_tensors,
        passed=is_same and weight_error <= weight_tolerance and not changed_tensors,
        not_compared=outputs.reason,
    )


def describe(verdict: Verification) -> str:
    """The verdict in one line."""
    outputs = f"outputs were not compared, the model takes no inputs that are known here ({verdict.not_compared})"
    if verdict.max_abs_logit_error is not None:
        outputs = f"outputs differ by at most {verdict.max_abs_logit_error:.1e} (allowed {verdict.tolerance:.1e})"
    return (
        f"{outputs}, weights by {verdict.max_rel_weight_error:.1e} (allowed {verdict.weight_tolerance:.1e}), "
        f"{verdict.changed_tensors} other tensors changed"
    )


def config_fields(adapter: AdapterFile, task: Task | None) -> dict[str, Any]:
    """Fields of the model's configuration that follow from the adapter's task, or from the labels that it recorded."""
    if task is not None:
        return task.config_fields()
    labels = {int(index): name for index, name in (adapter.base.get("id2label") or {}).items()}
    return {"id2label": labels, "label2id": {name: index for index, name in labels.items()}} if labels else {}


def check_class(adapter: AdapterFile) -> None:
    """Refuse an adapter of what is no model of transformers, or was not loaded as their models are."""
    name, dtype = str(adapter.base.get("auto_class")), adapter.base.get("dtype")
    if not is_model_class(name) or dtype not in DTYPES:
        problem = f"its base is a '{name}' in {dtype}, which is no model that transformers loads here"
        raise ConfigError(str(adapter.folder), problem, fix="Use it in Python, with load_adapter")


def is_model_class(name: str) -> bool:
    """Whether transformers has a model, or an Auto class of models, of that name."""
    import transformers  # noqa: PLC0415

    found = getattr(transformers, name, None)
    return isinstance(found, type) and (name.startswith("AutoModel") or issubclass(found, transformers.PreTrainedModel))


def find_base(adapter: AdapterFile, base: str | None, *, trust_remote_code: bool) -> ModelSource:
    """The base that an adapter names, or ``base``."""
    if adapter.base.get("name") is None and base is None:
        raise ConfigError("merge", "the adapter does not say what its base model is", fix="Name it with --model")
    check_class(adapter)
    return find_model(
        base or adapter.base["name"],
        revision=None if base else adapter.base.get("commit") or adapter.base.get("revision"),
        trust_remote_code=trust_remote_code,
        load_in=adapter.base.get("load_in"),
    )
