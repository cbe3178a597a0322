# SPDX-License-Identifier: Apache-2.0
"""Load base models in 8 or 4 bits, and dequantise them to merge an adapter."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import logging
from typing import Any

import torch
from torch import nn

from mirrortune.adapters.kinds import QuantisedLinear, plain_dtype
from mirrortune.errors import ConfigError
from mirrortune.system.devices import has_bf16, uses_cuda

# On CPUs with AVX512-BF16, importing bitsandbytes, which PEFT does as well, warns that an optional kernel is missing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_QUANTISED = QuantisedLinear()
# Attributes that transformers and its quantisers set on a model and that must be removed from a dequantised one. Saving
# reverses the recorded weight conversions or, without a record, only those of the architecture.
_NOTES = ("hf_quantizer", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "quantization_method",
          "_weight_conversions")  # fmt: skip


def loading_config(load_in: str, dtype: torch.dtype) -> Any:
    """Return the configuration for ``from_pretrained`` to load in ``8bit`` or ``4bit`` (NF4), computing in ``dtype``.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("model.load_in", f"{load_in} needs bitsandbytes", fix="pip install 'mirrortune[quantised]'")
    from transformers import BitsAndBytesConfig  # noqa: PLC0415

    # Without it, bitsandbytes logs in every pass of every 8-bit layer that it computes in float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    config: Any = BitsAndBytesConfig
    if load_in == "8bit":
        return config(load_in_8bit=True)
    if dtype == torch.bfloat16 and uses_cuda() and not has_bf16():
        dtype = torch.float16  # as a run computes there; such a GPU emulates bfloat16, at a fraction of the speed
    return config(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def is_quantised(config: Any) -> bool:
    """Return whether the configuration of a checkpoint has a quantisation section."""
    return getattr(config, "quantization_config", None) is not None


def can_be_dequantised(config: Any) -> bool:
    """Return whether transformers can dequantise the weights of a checkpoint while loading.

    It can for float8 with scales, MXFP4 and compressed-tensors. The quantised layers of these formats either propagate
    no gradients or only exist after the first forward pass.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING  # noqa: PLC0415

    packing = getattr(config, "quantization_config", None)
    if not isinstance(packing, dict):
        return False
    reads = AUTO_QUANTIZATION_CONFIG_MAPPING.get(str(packing.get("quant_method")))
    return reads is not None and "dequantize" in inspect.signature(reads).parameters


def keep_trainable(model: nn.Module) -> nn.Module:
    """Make the quantised layers of ``model`` propagate gradients even after a forward pass without gradients."""
    module: Any
    for module in model.modules():
        # On CPUs with AVX512-BF16, the first forward pass without gradients makes bitsandbytes repack a 4-bit weight
        # for a kernel that has no backward pass: after the first evaluation, lower layers would get no gradients.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@torch.no_grad()
def dequantise(model: nn.Module) -> nn.Module:
    """Replace the quantised layers of ``model``, in place, by linear layers with the dequantised weights.

    These are the weights on which adapters are trained.
    """
    dtype = plain_dtype(model)
    quantised = [name for name, module in model.named_modules() if _QUANTISED.layouts(module)]
    for name in quantised:
        old: Any = model.get_submodule(name)
        weight = _QUANTISED.read(old, "weight").to(dtype)
        bias = getattr(old, "bias", None)
        with torch.device("meta"):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        model.set_submodule(name, linear)
    for note in _NOTES:
        with contextlib.suppress(AttributeError):
            delattr(model, note)
    config: Any = getattr(model, "config", None)
    if is_quantised(config):
        del config.quantization_config
    return model
