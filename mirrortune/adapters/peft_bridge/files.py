# SPDX-License-Identifier: Apache-2.0
"""Write and read the two files of a PEFT adapter, as ``PeftModel.from_pretrained`` does, and verify its layers.

PEFT recomputes parts of some tuners when it loads them (a singular value decomposition, random projections), and does
not detect that the result differs on another machine. The stored response of each layer to a fixed input reveals this.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mirrortune.adapters.files.tensors import rounding_of
from mirrortune.adapters.inject import attachment, plain_parameters, trained_buffers
from mirrortune.adapters.peft_bridge.options import import_peft, spelt_out
from mirrortune.adapters.peft_bridge.tuners import ADAPTER_NAME, PeftAttachment, PeftLayer
from mirrortune.adapters.plain import RowRange, held_in, modules_of
from mirrortune.errors import VerificationError
from mirrortune.system.distributed.sharding import is_in_shards, is_whole
from mirrortune.system.paths import ModelPlace

PREFIX = "base_model.model."
"""Prefix of the model's parameter names in PEFT's files."""
CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
# Relative change of a layer's output that is tolerated: it changes no prediction, and is 100 times the rounding error.
RESPONSE_TOLERANCE = 1e-4
_NUM_DIRECTIONS = 4
# Suffixes of the class names of transformers, for Auto classes and model classes.
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
    """Return the tensors of PEFT's own file of an adapted model, with those trained as they are; no copies."""
    found = _attached(model)
    peft = import_peft(found.spec.method)
    state: dict[str, Tensor] = peft.get_peft_model_state_dict(
        _Wrapped(found.tuner), adapter_name=ADAPTER_NAME, save_embedding_layers=False
    )
    return state | {key: parameter.detach() for key, parameter in saved_whole(model).items()}


def saved_whole(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters trained as they are by PEFT's names, with what else their modules hold, because PEFT saves
    modules; a tied one under each of its names.
    """
    targets, parameters = attachment(model).targets, held_in(model)
    found: dict[str, Tensor] = {PREFIX + name: parameters[name] for name in targets.head}
    found |= {PREFIX + name: tensor for name, tensor in trained_buffers(model).items()}
    for path, module in modules_of(model, _without_rows(targets.plain)).items():
        found |= {f"{PREFIX}{path}.{name}": p for name, p in module.named_parameters(recurse=False)}
    return found | {rows_key(name): parameters[name] for name in targets.plain if RowRange.parse(name)}


def rows_key(name: str) -> str:
    """Return PEFT's name for the trained rows of embeddings that are called ``name`` here, or for a whole parameter."""
    rows = RowRange.parse(name)
    if rows is None:
        return PREFIX + name
    return f"{PREFIX}{rows.weight.removesuffix('.weight')}.token_adapter.trainable_tokens_delta"


def _without_rows(names: Iterable[str]) -> list[str]:
    return [name for name in names if RowRange.parse(name) is None]


def token_indices(names: Iterable[str]) -> dict[str, list[int]] | None:
    """Return the ids of new tokens by the module that embeds them, as LoRA's configuration has them; None for none."""
    found = [rows for name in names if (rows := RowRange.parse(name))]
    return {rows.weight.removesuffix(".weight"): list(range(rows.first, rows.stop)) for rows in found} or None


@torch.no_grad()
def restore_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy tensors with the names and shapes of :func:`adapter_tensors` into an adapted model."""
    found = _attached(model)
    trained = {id(tensor) for tensor in (*plain_parameters(model).values(), *trained_buffers(model).values())}
    whole = saved_whole(model)
    plain = {key for key, parameter in whole.items() if id(parameter) in trained}
    # PEFT calls load_state_dict, which would replace parameters that FSDP2 has gathered.
    is_sharded = is_in_shards(model)
    for key, tensor in adapter_tensors(model).items():
        if key in plain or (is_sharded and key not in whole):
            tensor.copy_(tensors[key])
    if not is_sharded:
        import_peft(found.spec.method).set_peft_model_state_dict(
            _Wrapped(found.tuner), {k: t for k, t in tensors.items() if k not in whole}, adapter_name=ADAPTER_NAME
        )


def peft_config(model: nn.Module, base: dict[str, Any]) -> dict[str, Any]:
    """Return PEFT's description of the adapter of a model.

    Args:
        model: model adapted by :func:`attach_tuner`.
        base: identity of the base model; ``auto_class``, ``name`` and ``commit`` are used.
    """
    found = _attached(model)
    configs: Any = found.tuner.peft_config
    described: dict[str, Any] = {
        k: sorted(v) if isinstance(v, set) else v for k, v in configs[ADAPTER_NAME].to_dict().items()
    }
    described = spelt_out(described, attachment(model).layers) | common_fields(model, base)
    if indices := token_indices(attachment(model).targets.plain):
        described["trainable_token_indices"] = indices
    return dict(json.loads(json.dumps(described, sort_keys=True)))


def common_fields(model: nn.Module, base: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of PEFT's description common to all adapters: base model, task, head and inference mode."""
    model_class, name, targets = str(base.get("auto_class")), base.get("name"), attachment(model).targets
    # PEFT does not support models inside packages.
    place = None if not name else ModelPlace.parse(name)
    return {
        "task_type": next((kind for ending, kind in _TASK_TYPES.items() if model_class.endswith(ending)), None),
        "base_model_name_or_path": str(place.path()) if place and place.kind == "package" else name,
        "revision": base.get("commit") or base.get("revision"),
        "modules_to_save": [*_modules_of(model, targets.head), *modules_of(model, _without_rows(targets.plain))]
        or None,
        "inference_mode": True,
    }


def layer_responses(model: nn.Module) -> dict[str, list[float]]:
    """Compute the response of each adapted layer to a fixed random input, projected on a few fixed directions.

    It depends on all parameters of the layer. It is empty for a layer of which this process has only a shard, and for
    one whose weights were rounded since the adapter was attached: the layer will not be loaded with these.
    """
    layers = {name: (model.get_submodule(name), target) for name, target in _attached(model).targets.layers.items()}
    layers_of: Any = attachment(model).layers
    return {
        name: _response(module, target.shape)
        if all(map(is_whole, module.parameters())) and not _is_rounded(layers_of[name])
        else []
        for name, (module, target) in layers.items()
    }


def _is_rounded(layer: PeftLayer) -> bool:
    """Return whether a layer was cast to a narrower dtype since the tuner was attached, and perhaps back."""
    if layer.dtype is None or not layer.dtype.is_floating_point:  # quantised
        return False
    eps, now = torch.finfo(layer.dtype).eps, layer.base_layer.weight.dtype
    if now.is_floating_point and torch.finfo(now).eps > eps:
        return True
    trained = [p for p in layer.adapter_parameters().values() if p.numel() and bool((p != p.reshape(-1)[0]).any())]
    return bool(trained) and all(torch.finfo(rounding_of(p)).eps > eps for p in trained)


def compare_responses(model: nn.Module, stored: dict[str, list[float]]) -> None:
    """Check that each layer responds as it did when the adapter was saved; empty responses are not compared.

    Raises:
        VerificationError: a response differs; the error names the layer.
    """
    for name, expected in stored.items():
        if not expected:
            continue
        now = _response(model.get_submodule(name), _attached(model).targets.layers[name].shape)
        difference = max(abs(a - b) for a, b in zip(now, expected, strict=True))
        if not difference <= RESPONSE_TOLERANCE * max(map(abs, expected)):
            raise VerificationError(
                name,
                f"the loaded layer does not compute what the saved one did (its response differs by {difference:.1e}): "
                "PEFT recomputes a part of this tuner, and this machine or this version of PEFT gets another result",
                fix="Merge on the machine that trained it, or train with one of mirrortune's own methods",
            )


@torch.no_grad()
def _response(module: nn.Module, shape: tuple[int, int]) -> list[float]:
    layer = copy.deepcopy(module).float().eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, shape[1], generator=generator)
    directions = torch.randn(_NUM_DIRECTIONS, shape[0], generator=generator)
    device = next(layer.parameters()).device
    with torch.autocast(device.type, enabled=False):
        y: Tensor = layer(x.to(device))
    return [float(v) for v in directions.double() @ y[0].cpu().double()]


class _Wrapped(nn.Module):
    """Wrapper that gives parameters their names in PEFT's files: a ``PeftModel`` calls its tuner ``base_model``."""

    def __init__(self, tuner: nn.Module) -> None:
        super().__init__()
        self.base_model = tuner
        self.peft_config = tuner.peft_config


def _attached(model: nn.Module) -> PeftAttachment:
    found = attachment(model)
    assert isinstance(found, PeftAttachment)
    return found


def _modules_of(model: nn.Module, head: Iterable[str]) -> list[str]:
    """Return the largest modules that have only parameters of the head, because PEFT saves modules, not parameters."""
    wanted = set(head)
    found: list[str] = []
    for name, module in model.named_modules():
        own = {f"{name}.{key}" for key, _ in module.named_parameters()}
        if name and own and own <= wanted and not any(name.startswith(f"{larger}.") for larger in found):
            found.append(name)
    return found
