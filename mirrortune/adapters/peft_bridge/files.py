# SPDX-License-Identifier: Apache-2.0
"""PEFT's own two files: what ``PeftModel.from_pretrained`` reads, and what we must know besides to trust them.

PEFT computes some of what a tuner needs anew when it loads (a singular value decomposition, random projections), and
does not notice when another machine computes something else. A probe of each layer, stored beside its files, does.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mirrortune.adapters.inject import attachment
from mirrortune.adapters.peft_bridge.options import import_peft, spelt_out
from mirrortune.adapters.peft_bridge.tuners import ADAPTER_NAME, PeftAttachment
from mirrortune.errors import VerificationError
from mirrortune.system.distributed.sharding import is_in_shards, is_whole
from mirrortune.system.paths import PACKAGE_SCHEME, package_folder

PREFIX = "base_model.model."
"""Before the model's names in PEFT's files."""
CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
# An adapter that changes what a layer computes by less than this changes no prediction; rounding is a hundredth of it.
PROBE_TOLERANCE = 1e-4
_NUM_PROBES = 4
# How the names of transformers' classes end, Auto classes and a family's own.
_TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What PEFT's own file of an adapted model holds, head included; the tensors are the model's own, not copies."""
    found = _attached(model)
    peft = import_peft(found.spec.method)
    state: dict[str, Tensor] = peft.get_peft_model_state_dict(
        _Wrapped(found.tuner), adapter_name=ADAPTER_NAME, save_embedding_layers=False
    )
    parameters = dict(model.named_parameters())
    return state | {PREFIX + name: parameters[name].detach() for name in found.targets.head}


@torch.no_grad()
def restore_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put the tensors of :func:`adapter_tensors`, by the same names and shapes, back into an adapted model."""
    found = _attached(model)
    head = {PREFIX + name for name in found.targets.head}
    # PEFT's own way is load_state_dict, after which FSDP2 looks for its shares in what is whole just now.
    is_cut = is_in_shards(model)
    for key, tensor in adapter_tensors(model).items():
        if is_cut or key in head:
            tensor.copy_(tensors[key])
    if not is_cut:
        import_peft(found.spec.method).set_peft_model_state_dict(
            _Wrapped(found.tuner), {k: t for k, t in tensors.items() if k not in head}, adapter_name=ADAPTER_NAME
        )


def peft_config(model: nn.Module, base: dict[str, Any]) -> dict[str, Any]:
    """PEFT's own description of an adapted model's adapter.

    Args:
        model: adapted by :func:`attach_tuner`.
        base: the base model's identity; ``auto_class``, ``name`` and ``commit`` are read.
    """
    found = _attached(model)
    configs: Any = found.tuner.peft_config
    described: dict[str, Any] = {
        k: sorted(v) if isinstance(v, set) else v for k, v in configs[ADAPTER_NAME].to_dict().items()
    }
    described = spelt_out(described, attachment(model).layers) | common_fields(model, base)
    return dict(json.loads(json.dumps(described, sort_keys=True)))


def common_fields(model: nn.Module, base: dict[str, Any]) -> dict[str, Any]:
    """What PEFT's description says of any adapter: base model, task and head, and that it is for inference."""
    model_class, name = str(base.get("auto_class")), base.get("name")
    # PEFT does not know models inside packages.
    is_packaged = name is not None and name.startswith(PACKAGE_SCHEME)
    return {
        "task_type": next((kind for ending, kind in _TASK_TYPES.items() if model_class.endswith(ending)), None),
        "base_model_name_or_path": str(package_folder(name)) if name and is_packaged else name,
        "revision": base.get("commit") or base.get("revision"),
        "modules_to_save": _modules_of(model, attachment(model).targets.head) or None,
        "inference_mode": True,
    }


def layer_probes(model: nn.Module) -> dict[str, list[float]]:
    """A few numbers for each adapted layer that depend on all that it computes with: its response to a fixed input,
    seen along fixed directions; none where this process has only a share of the layer, and cannot say.
    """
    layers = {name: (model.get_submodule(name), target) for name, target in _attached(model).targets.layers.items()}
    return {
        name: _probe(module, target.shape) if all(map(is_whole, module.parameters())) else []
        for name, (module, target) in layers.items()
    }


def check_probes(model: nn.Module, stored: dict[str, list[float]]) -> None:
    """Refuse an adapter whose layers do not compute what they computed when it was saved, where it says what they did.

    Raises:
        VerificationError: with the layer's name.
    """
    for name, expected in stored.items():
        if not expected:
            continue
        now = _probe(model.get_submodule(name), _attached(model).targets.layers[name].shape)
        difference = max(abs(a - b) for a, b in zip(now, expected, strict=True))
        if not difference <= PROBE_TOLERANCE * max(map(abs, expected)):
            raise VerificationError(
                name,
                f"the loaded layer does not compute what the saved one did (its probe moved by {difference:.1e}): PEFT "
                "computes a part of this tuner anew, and this machine or this version of PEFT gets another",
                fix="Merge on the machine that trained it, or train with one of our own methods",
            )


@torch.no_grad()
def _probe(module: nn.Module, shape: tuple[int, int]) -> list[float]:
    layer = copy.deepcopy(module).float().eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, shape[1], generator=generator)
    directions = torch.randn(_NUM_PROBES, shape[0], generator=generator)
    device = next(layer.parameters()).device
    with torch.autocast(device.type, enabled=False):
        y: Tensor = layer(x.to(device))
    return [float(v) for v in directions.double() @ y[0].cpu().double()]


class _Wrapped(nn.Module):
    """The names that PEFT's files have: a ``PeftModel`` calls its tuner ``base_model``."""

    def __init__(self, tuner: nn.Module) -> None:
        super().__init__()
        self.base_model = tuner
        self.peft_config = tuner.peft_config


def _attached(model: nn.Module) -> PeftAttachment:
    found = attachment(model)
    assert isinstance(found, PeftAttachment)
    return found


def _modules_of(model: nn.Module, head: Iterable[str]) -> list[str]:
    """The largest modules whose parameters are all the head's: PEFT saves modules, not parameters."""
    wanted = set(head)
    found: list[str] = []
    for name, module in model.named_modules():
        own = {f"{name}.{key}" for key, _ in module.named_parameters()}
        if name and own and own <= wanted and not any(name.startswith(f"{larger}.") for larger in found):
            found.append(name)
    return found
