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

_QUANTISED = QuantisedLinear()
# Attributes that transformers and its quantisers set on a model, to be removed from a dequantised one. Saving reverses
# the weight conversions that are recorded; without the attribute only those of the architecture.
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

    # It logs in every pass of every 8-bit layer that it computes in float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    config: Any = BitsAndBytesConfig
    if load_in == "8bit":
        return config(load_in_8bit=True)
    return config(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def is_quantised(config: Any) -> bool:
    """Whether a checkpoint's configuration has a quantisation section."""
    return getattr(config, "quantization_config", None) is not None


def can_be_dequantised(config: Any) -> bool:
    """Whether transformers can dequantise a checkpoint's weights on loading.

    It can for formats whose layers propagate no gradient, or only exist after the first forward pass: float8 with
    scales, MXFP4, compressed-tensors.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING  # noqa: PLC0415

    packing = getattr(config, "quantization_config", None)
    if not isinstance(packing, dict):
        return False
    reads = AUTO_QUANTIZATION_CONFIG_MAPPING.get(str(packing.get("quant_method")))
    return reads is not None and "dequantize" in inspect.signature(reads).parameters


def keep_trainable(model: nn.Module) -> nn.Module:
    """Return ``model`` with quantised layers that propagate gradients also after a forward pass without them."""
    module: Any
    for module in model.modules():
        # On CPUs with AVX512-BF16 bitsandbytes repacks a 4-bit weight in the first forward without gradients, for a
        # kernel without a backward pass: after the first evaluation, lower layers would get no gradients.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@torch.no_grad()
def dequantise(model: nn.Module) -> nn.Module:
    """Replace quantised layers of ``model``, in place, by linear ones with the weights that adapters are trained on."""
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
