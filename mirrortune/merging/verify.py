# SPDX-License-Identifier: Apache-2.0
"""Verify a merged checkpoint.

Tensors are compared with float64 references, outputs with those of base + adapter, and the files beside the weights
with those of the base. Both merging tensor by tensor (``plan.py``) and merging in memory (``in_memory.py``) use this
module. When a tensor is rounded, and its reference is in memory, its error is measured and its change compared with the
effect that the adapter recorded in training; reading the file back then only has to confirm that it holds that tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from mirrortune.adapters.effect import EFFECT_TOLERANCE, change_error
from mirrortune.adapters.files.adapter_file import AdapterFile
from mirrortune.adapters.files.load import stored_core
from mirrortune.adapters.fingerprint import weight_digest
from mirrortune.data.examples import Batch
from mirrortune.errors import VerificationError
from mirrortune.merging.plan import MergePlan
from mirrortune.models.load import find_model, resolve_dtype
from mirrortune.models.parts import LoadedTensor, value_of
from mirrortune.models.skeleton import read_lazily
from mirrortune.models.tensors import aliases, part_loader
from mirrortune.system.devices import rounding_unit
from mirrortune.system.tensor_files import StoredTensor, read_headers, same_bytes
from mirrortune.tasks.drawn_inputs import first_that_runs
from mirrortune.tasks.model_outputs import compared_outputs, largest_difference

Probes = Batch | Iterable[Batch]
"""Inputs of a model's forward pass, or candidates for them, the most likely first."""

Compared = Callable[[Batch, Any], Any] | None
"""Function of inputs and outputs that returns what is compared, for :func:`compared_outputs`; None for the outputs."""

FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Floating-point dtypes by their codes in safetensors files."""

_FIX = "The merged folder was not written; please report this with the model's name"
_HELD = ("tokenizer", "processor", "extractor")  # attributes in which mirrortune's wrappers hold a processor


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """The result of verifying a merged checkpoint.

    Attributes:
        max_abs_logit_error: largest absolute difference of an output between the reopened model and base + adapter on
            the probes; None if no inputs are known that the model accepts.
        max_rel_weight_error: largest ||W - reference|| / ||reference|| over the adapted tensors, with the reference in
            float64.
        tolerance: allowed output error: 1e-4 times the larger of 1 and the largest absolute output in float32; 8
            rounding units instead of 1e-4 if the base was trained or is stored in 16 bits. Not applied where outputs
            were also compared before rounding.
        weight_tolerance: allowed weight error: one rounding unit of the stored dtype.
        changed_tensors: number of tensors that differ from the base without being adapted.
        passed: every error is within its tolerance and ``changed_tensors`` is 0.
        not_compared: reason why no outputs were compared; empty if they were.
        max_abs_logit_error_unrounded: as ``max_abs_logit_error``, but with the adapted weights before they were rounded
            to 16 bits; None for other bases, and where such outputs were not compared.
        tolerance_unrounded: allowed ``max_abs_logit_error_unrounded``, that of float32.
    """

    max_abs_logit_error: float | None
    max_rel_weight_error: float
    tolerance: float
    weight_tolerance: float
    changed_tensors: int
    passed: bool
    not_compared: str = ""
    max_abs_logit_error_unrounded: float | None = None
    tolerance_unrounded: float | None = None

    def describe(self) -> str:
        """Return the result as one line."""
        outputs = f"outputs were not compared, no valid inputs are known for the model ({self.not_compared})"
        if self.max_abs_logit_error_unrounded is not None:
            error, allowed = self.max_abs_logit_error_unrounded, self.tolerance_unrounded
            outputs = f"outputs differ by at most {error:.1e} before rounding to 16 bits (allowed {allowed:.1e}), "
            outputs += f"by {self.max_abs_logit_error:.1e} after it"
        elif self.max_abs_logit_error is not None:
            outputs = f"outputs differ by at most {self.max_abs_logit_error:.1e} (allowed {self.tolerance:.1e})"
        return (
            f"{outputs}, weights by {self.max_rel_weight_error:.1e} (allowed {self.weight_tolerance:.1e}), "
            f"{self.changed_tensors} other tensors changed"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputError:
    """The difference between the outputs of two models.

    Attributes:
        error: largest absolute difference; None if the outputs could not be compared.
        tolerance: largest allowed difference.
        reason: reason why the outputs could not be compared; empty if they were.
        probe: inputs on which they were compared.
        unrounded: difference with the merged weights before rounding to 16 bits, or None.
    """

    error: float | None
    tolerance: float
    reason: str = ""
    probe: Batch | None = None
    unrounded: OutputError | None = None

    @property
    def is_within(self) -> bool:
        """Whether the difference is within its tolerance: that before rounding, where it is known.

        Rounding alone may move outputs by any amount, such as those of experts that a router then chooses otherwise.
        """
        if self.unrounded is not None:
            return self.unrounded.is_within
        return self.error is None or self.error <= self.tolerance


@dataclass(slots=True)
class TensorLedger:
    """A record of the tensors of a merged checkpoint, made when they are rounded and compared when they are read back.

    Attributes:
        errors: entry of ``merge.json`` for each adapted tensor.
        changed: number of other tensors that differ from their expected value.
        adapters: adapters whose recorded effects the changes of the tensors must have; none if they need not.
    """

    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    changed: int = 0
    adapters: Sequence[AdapterFile] = ()
    _digests: dict[str, str] = field(default_factory=dict)

    def round(
        self, names: Sequence[str], value: Tensor, dtype: torch.dtype, stored: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """Round a tensor to ``dtype`` and record it.

        Args:
            names: names of the tensor in the model; tied tensors have several.
            value: tensor, in float64 if it is adapted.
            dtype: dtype of the checkpoint.
            stored: reads the base's tensor; None if no adapter changes it.

        Raises:
            VerificationError: the change is not that of the adapter; the error names the layer.
        """
        rounded = value.to(dtype)
        digest = weight_digest(rounded)
        before = None if stored is None else stored()
        for name in names:
            self._digests[name] = digest
            if before is not None:
                self.errors[name] = _tensor_error(rounded, value, before)
        if before is not None:
            self._check_effects(names, before, value)
        return rounded

    def _check_effects(self, names: Sequence[str], before: Tensor, after: Tensor) -> None:
        changed = [(a, layer) for a in self.adapters for layer, own in a.weights.items() if {*own} & {*names}]
        if any(adapter is not changed[0][0] for adapter, _ in changed):
            return  # each adapter but the last is rounded, so that their effects do not add up
        for adapter, layer in changed:
            expected, matrix = adapter.effects.get(layer), adapter.layouts[layer].matrix
            if expected is None:  # trained in shards, or PEFT's
                continue
            error = change_error(matrix(before), matrix(after), expected)
            if not error <= EFFECT_TOLERANCE:
                problem = f"the change in its merged weight is not the adapter's (it differs by {error:.1e} of it)"
                raise VerificationError(layer, problem, allowed=f"at most {EFFECT_TOLERANCE:.0e}", fix=_FIX)

    def check(
        self, name: str, written: Tensor, value: Callable[[], Tensor], stored: Callable[[], Tensor] | None = None
    ) -> None:
        """Compare a tensor that was read back with the recorded one or, if it was not recorded, with ``value``.

        Args:
            name: name of the tensor in the model.
            written: tensor as read back.
            value: computes the tensor; see :meth:`round`.
            stored: see :meth:`round`.
        """
        if self._digests.get(name) == weight_digest(written):
            return
        if stored is None:
            self.changed += not torch.equal(written, value().to(written.dtype))
        else:
            self.errors[name] = _tensor_error(written, value(), stored())

    def verification(self, outputs: OutputError, dtype: torch.dtype = torch.float32) -> Verification:
        """Combine the errors of tensors and outputs; ``dtype`` sets the weight tolerance if no tensor is adapted."""
        weights = [item for adapter in self.adapters for item in adapter.weights.items()]
        if left_out := [layer for layer, own in weights if self.errors.keys().isdisjoint(own)]:
            raise VerificationError(left_out[0], "the merged model lacks the adapter's change of its weight", fix=_FIX)
        errors, unrounded = self.errors.values(), outputs.unrounded
        return Verification(
            max_abs_logit_error=outputs.error,
            max_rel_weight_error=max((e["rel_weight_error"] for e in errors), default=0.0),
            tolerance=outputs.tolerance,
            weight_tolerance=max((e["weight_tolerance"] for e in errors), default=torch.finfo(dtype).eps),
            changed_tensors=self.changed,
            passed=outputs.is_within
            and all(e["rel_weight_error"] <= e["weight_tolerance"] for e in errors)
            and not self.changed,
            not_compared=outputs.reason,
            max_abs_logit_error_unrounded=unrounded.error if unrounded else None,
            tolerance_unrounded=unrounded.tolerance if unrounded else None,
        )


def _tensor_error(written: Tensor, reference: Tensor, stored: Tensor) -> dict[str, float]:
    error = float((written.double() - reference).norm())
    found = {"rel_weight_error": error / (float(reference.norm()) or 1.0)}
    found["weight_tolerance"] = torch.finfo(written.dtype).eps
    if written.dtype in (torch.bfloat16, torch.float16):
        change = float((reference - stored).norm())
        found["rounding_loss"] = error / change if change else 0.0  # share of the change that is lost to rounding
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenTensors:
    """The tensors of a written checkpoint, located by the headers of its files.

    Attributes:
        headers: tensors by name in the files.
        tensors: tensors by name in the model.
    """

    headers: dict[str, StoredTensor]
    tensors: Mapping[str, StoredTensor | LoadedTensor]

    @classmethod
    def in_folder(cls, folder: Path, plan: MergePlan) -> WrittenTensors:
        """Open the files of ``folder``, with transformers' weight conversions if the base needs them."""
        files = sorted(folder.glob("*.safetensors"))
        headers = read_headers(files)
        if plan.loader is None or not plan.loader.parts:
            return cls(headers=headers, tensors=headers)
        source = find_model(str(folder))
        dtype = resolve_dtype("auto", source.config, torch.device("meta"))
        loader = part_loader(source, plan.auto_class, {}, dtype, files)
        return cls(headers=headers, tensors=headers if loader is None else loader.tensors())


@torch.no_grad()
def check_written(plan: MergePlan, written: WrittenTensors, ledger: TensorLedger) -> None:
    """Read back every tensor of a checkpoint that was merged tensor by tensor, and record the result in ``ledger``.

    Raises:
        VerificationError: the files do not hold exactly the planned tensors.
    """
    if odd := written.headers.keys() ^ {tensor.name for tensor in plan.planned}:
        problem = f"'{min(odd)}' and {len(odd) - 1} other tensors are missing, or unexpected, in the written files"
        raise VerificationError("merge", problem)
    checked: dict[str, None] = {}  # a tensor of the model may stand for several in the files
    for planned in plan.planned:
        if planned.source is not None:
            ledger.changed += not same_bytes(written.headers[planned.name], planned.source)
            continue
        for name in planned.stands_for or (planned.name,):
            if name not in checked:
                checked[name] = None
                ledger.check(name, value_of(written.tensors[name]), partial(plan.value, name), plan.stored_value(name))
    ledger.errors = {name: ledger.errors[name] for name in checked if name in ledger.errors}  # in file order


@torch.no_grad()
def compare_models(
    reopened: nn.Module,
    adapted: nn.Module,
    probes: Probes,
    compared: Compared,
    exact: Callable[[], Iterable[tuple[str, Tensor]]] | None = None,
) -> OutputError:
    """Compare the outputs of a reopened merged model with those of base + adapter, both in memory.

    What rounding to 16 bits does to the outputs is larger than the effect of an adapter in one layer. With ``exact``,
    which yields the changed weights by name before rounding, a base in 16 bits whose adapter was trained in float32 is
    also compared with these. (One trained in 16 bits holds its own parameters and factors in them.)
    """
    coarsest = max(rounding_unit(adapted), *(torch.finfo(p.dtype).eps for p in reopened.parameters()))
    computed_in, stored_in = (next(iter(model.parameters())).dtype for model in (adapted, reopened))
    if stored_in == torch.float16 or computed_in == torch.float32:
        reopened.float()  # CPUs lack float16 kernels, and rounding of 16-bit arithmetic is not an error of the weights

    def difference(probes: Probes, epsilon: float) -> OutputError:
        return compare_outputs(
            lambda probe: compared_outputs(reopened, probe, compared=compared),
            lambda probe: compared_outputs(adapted, probe, compared=compared), probes, tolerance=max(1e-4, 8 * epsilon),
        )  # fmt: skip

    found = difference(probes, coarsest)
    if exact is None or found.probe is None or computed_in != torch.float32 or stored_in == torch.float32:
        return found
    held, made = reopened.float().state_dict(), dict(adapted.named_buffers())
    for name, buffer in reopened.named_buffers():
        # What is not in the files is made when a model is built, and rounded if that is in 16 bits, as Gemma's scale.
        if name not in held and name in made and made[name].shape == buffer.shape:
            buffer.copy_(made[name])
    for name, value in exact():
        if name in held:
            held[name].copy_(value)
    return replace(found, unrounded=difference(found.probe, 0.0))


def compare_outputs(
    merged: Callable[[Batch], Tensor], adapted: Callable[[Batch], Tensor], probes: Probes, *, tolerance: float
) -> OutputError:
    """Compare the outputs of two models on the same inputs.

    Args:
        merged: computes the outputs (N,) of the merged model. As a plain transformers model, it decides which of
            several candidates are valid inputs.
        adapted: computes the outputs (N,) of base + adapter.
        probes: inputs, or candidates for them.
        tolerance: allowed error, relative to the larger of 1 and the largest absolute output.
    """
    found = (probes, merged(probes)) if isinstance(probes, dict) else first_that_runs(probes, merged)
    if isinstance(found, str):
        return OutputError(error=None, tolerance=tolerance, reason=found)
    probe, outputs = found
    expected = adapted(probe)
    finite = expected[torch.isfinite(expected)]
    largest = max(1.0, float(finite.abs().max())) if len(finite) else 1.0
    return OutputError(error=largest_difference(outputs, expected), tolerance=tolerance * largest, probe=probe)


def compare_lazily(
    make: Callable[[], nn.Module], probes: Probes, plan: MergePlan, written: WrittenTensors, compared: Compared = None
) -> OutputError:
    """Compare the outputs of the merged model and of base + adapter, holding the weights of one module at a time.

    Args:
        make: builds the model without weights.
        probes: inputs, or candidates for them.
        plan: plan of the merge; in base + adapter, the adapter's branch runs beside its layers, as in training.
        written: tensors of the merged model.
        compared: selects which outputs are compared.
    """
    model = make()
    names = aliases(model)
    held = written.tensors.values()
    stored_in = max((FLOATS[t.code] for t in held if t.code in FLOATS), key=lambda d: torch.finfo(d).eps)
    trained_in = plan.trained_in
    # CPUs lack float16 kernels for some layers, and rounding of 16-bit arithmetic is not an error of the weights.
    computed_in = (
        torch.float32 if torch.float16 in (stored_in, trained_in) or trained_in == torch.float32 else stored_in
    )

    def read_merged(name: str) -> Tensor:
        found = value_of(next(written.tensors[twin] for twin in names[name] if twin in written.tensors))
        return found.to(computed_in) if found.is_floating_point() else found

    merged = read_lazily(model, read_merged)
    adapted = _base_with_adapters(make(), plan, trained_in)
    epsilon = max(torch.finfo(stored_in).eps, rounding_unit(model, trained_in))
    return compare_outputs(
        lambda probe: compared_outputs(merged, probe, dtype=computed_in, compared=compared),
        lambda probe: compared_outputs(adapted, probe, dtype=trained_in, compared=compared), probes,
        tolerance=max(1e-4, 8 * epsilon),
    )  # fmt: skip


def _base_with_adapters(model: nn.Module, plan: MergePlan, dtype: torch.dtype) -> nn.Module:
    names = aliases(model)
    beside: set[str] = set()
    for name, changes in plan.adapted.items():
        module = model.get_submodule(name.rpartition(".")[0])
        (adapter, layers), *others = changes
        if adapter.peft_config is not None:
            beside.add(name)
            if name.endswith("weight"):
                module.register_forward_hook(_peft_hook(plan, name, adapter, layers[0]))
            continue
        if others or len(layers) > 1 or type(module) is not nn.Linear or adapter.layouts[layers[0]].rows:
            continue  # no branch: `read` returns the merged weight
        beside.add(name)
        module.register_forward_hook(_branch_hook(plan, name, adapter, layers[0]))

    def read(name: str) -> Tensor:
        if name in plan.trained:
            return plan.trained[name].to(dtype if name in plan.stored else torch.float32)
        own = next(twin for twin in names[name] if twin in plan.stored)
        is_adapted = own in plan.adapted and own not in beside
        found = plan.reference(own) if is_adapted else value_of(plan.stored[own], dtype)
        return found.to(dtype) if found.is_floating_point() else found

    return read_lazily(model, read)


def _peft_hook(plan: MergePlan, name: str, adapter: AdapterFile, layer: str) -> Any:
    """Return a forward hook that replaces the output of a linear layer by that of PEFT's layer."""

    def answer(_: nn.Module, given: tuple[Tensor, ...], __: Tensor) -> Any:
        return plan.tuned_layer(name, adapter, layer)[0].module(*given)

    return answer


def _branch_hook(plan: MergePlan, name: str, adapter: AdapterFile, layer: str) -> Any:
    """Return a forward hook that adds U (K - diag(S)) Vh x to a linear layer's output, in float32."""

    def add(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            factors = plan.factors(plan.turned_weight(name, adapter), adapter, layer)
            core, x = stored_core(adapter, layer, factors.S), given[0].float()
            z = F.linear(x, factors.Vh.float())
            product = F.linear(core.mix(z, *core.coefficients(delta=True)), factors.U.float())
            beside = core.beside(lambda matrix: F.linear(x, matrix.float()))
            return output + (product if beside is None else product + beside).to(output.dtype)

    return add


def check_ties(reopened: nn.Module, model: nn.Module) -> None:
    """Check that the same names share tensors in a reopened model as in ``model``.

    Raises:
        VerificationError: they do not; the error names the first that differs.
    """
    found, expected = aliases(reopened), aliases(model)
    for name, own in expected.items():
        if sorted(found.get(name, ())) != sorted(own):
            raise VerificationError(
                name, f"it is tied to {found.get(name, ())} as reopened", allowed=str(own), fix=_FIX
            )


def check_contents(
    folder: Path, model: nn.Module, processors: Sequence[Any], *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Reopen the files beside the weights in ``folder`` with transformers and compare them with those of the base.

    Args:
        folder: folder of the merged checkpoint.
        model: merged model, or one with the same configuration.
        processors: tokenizer, image processor or feature extractor of the base, or mirrortune's wrappers of them.
        trust_remote_code: run code that the configuration names, as allowed for the base.

    Returns:
        The entry ``contents`` of ``merge.json``.

    Raises:
        VerificationError: a file is missing or differs.
    """
    from transformers import AutoConfig, GenerationConfig  # noqa: PLC0415

    wanted: Any = model.config
    report: dict[str, Any] = {}
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    _require(_labels(config), _labels(wanted), "id2label in config.json")
    _require(
        getattr(config, "problem_type", None), getattr(wanted, "problem_type", None), "problem_type in config.json"
    )
    report["labels"] = len(getattr(config, "id2label", None) or ())
    can_generate: Any = getattr(model, "can_generate", lambda: False)
    if can_generate():
        _require((folder / "generation_config.json").is_file(), True, "generation_config.json")  # noqa: FBT003
        report["generation_config"] = GenerationConfig.from_pretrained(folder).to_diff_dict()
    report |= {"processor": None, "chat_template": False}
    for processor in processors:
        inner = next((getattr(processor, key) for key in _HELD if hasattr(processor, key)), processor)
        again, name = type(inner).from_pretrained(folder), type(inner).__name__
        for key, own in _processor_state(inner).items():
            _require(_processor_state(again)[key], own, f"the {name}'s {key}")
        report["processor"] = f"{report['processor']}, {name}" if report["processor"] else name
        report["chat_template"] |= bool(getattr(again, "chat_template", None))
    return report


def _labels(config: Any) -> dict[int, str] | None:
    """Return the labels of a configuration, or None for default names, whose number some model classes change."""
    labels = getattr(config, "id2label", None) or {}
    is_default = all(name == f"LABEL_{index}" for index, name in labels.items())
    return None if is_default else labels


def _processor_state(processor: Any) -> dict[str, Any]:
    if hasattr(processor, "get_vocab"):
        text = "It was a GREAT film,  wasn't it? 2.5/5"
        return {
            "vocabulary": processor.get_vocab(),
            "chat template": getattr(processor, "chat_template", None),
            "special tokens": dict(processor.special_tokens_map),
            "tokens": processor(text)["input_ids"],
        }
    return dict(processor.to_dict())


def _require(found: object, expected: object, what: str) -> None:
    if found != expected:
        raise VerificationError(what, f"got {str(found)[:200]} as reopened", allowed=str(expected)[:200], fix=_FIX)
