# SPDX-License-Identifier: Apache-2.0
"""Train under DeepSpeed's ZeRO-2 and ZeRO-3: configuration, engine, and optimizer state by parameter.

ZeRO-2 shards gradients and optimizer moments over the processes; ZeRO-3 also shards weights and factors. The training
loop decides how many micro-batches are accumulated: DeepSpeed's own accumulation is 1, and its boundary is set by hand.
The number of items in the global batch is passed to DeepSpeed as a loss scale, so that gradients are divided by it
before their norm is computed and clipped. Parameters that are float32 without DeepSpeed stay float32; bfloat16 means
autocast, as elsewhere, not a bfloat16 copy of the model.

DeepSpeed is imported only in a run that uses it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mirrortune.errors import ConfigError
from mirrortune.system.devices import holds_half

_STAGES = (2, 3)
# Keys that a DeepSpeed config may set: keys that the recipe overrides, and bucket sizes.
_DECIDED = {
    "bf16", "fp16", "gradient_accumulation_steps", "gradient_clipping", "steps_per_print", "train_batch_size",
    "train_micro_batch_size_per_gpu", "wall_clock_breakdown", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "zero_optimization",
}  # fmt: skip
_DECIDED_OF_ZERO = {
    "allgather_bucket_size", "allgather_partitions", "contiguous_gradients", "offload_optimizer", "offload_param",
    "overlap_comm", "reduce_bucket_size", "reduce_scatter", "stage", "stage3_gather_16bit_weights_on_model_save",
    "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size", "sub_group_size",
}  # fmt: skip
_MOMENTS = ("exp_avg", "exp_avg_sq")


def check_installed() -> None:
    """Raise ConfigError if DeepSpeed is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("DeepSpeed", "it is not installed", fix="pip install 'mirrortune[deepspeed]'")


def make_plugin(*, is_bf16: bool) -> Any:
    """Make accelerate's DeepSpeed plugin from the settings of its launcher, adapted to the training loop.

    Args:
        is_bf16: compute under bfloat16 autocast.

    Raises:
        ConfigError: DeepSpeed is not installed, or its config has settings that are not supported here.
    """
    check_installed()
    from accelerate.utils import DeepSpeedPlugin  # noqa: PLC0415

    # Set by the recipe; the launcher passes "none" for keys that are missing in the config.
    plugin = DeepSpeedPlugin(zero3_init_flag=False, gradient_accumulation_steps=1, gradient_clipping=1.0)
    config = plugin.deepspeed_config
    _check(config)
    # Precision is left to autocast: DeepSpeed's bf16 mode would round trained parameters and gradients to 16 bits.
    config["bf16"], config["fp16"] = {"enabled": False}, {"enabled": False}
    config["torch_autocast"] = {"enabled": is_bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    config["gradient_accumulation_steps"] = 1  # the loop accumulates
    config["zero_allow_untested_optimizer"] = True
    return plugin


def _check(config: Mapping[str, Any]) -> None:
    zero = config.get("zero_optimization", {})
    errors = []
    if zero.get("stage") not in _STAGES:
        errors.append(ConfigError("zero_stage", f"got {zero.get('stage')}", allowed="2 or 3"))
    for name in ("offload_optimizer", "offload_param"):
        device = (zero.get(name) or {}).get("device", "none")
        if device not in (None, "none"):
            errors.append(ConfigError(f"{name}_device", f"got {device}", allowed="none"))
    if (config.get("fp16") or {}).get("enabled") is True:
        errors.append(ConfigError("fp16", "it is not supported", allowed="train.precision: bf16 or fp32"))
    unknown = [*(set(config) - _DECIDED), *(f"zero_optimization.{k}" for k in set(zero) - _DECIDED_OF_ZERO)]
    errors += [
        ConfigError(f"DeepSpeed config, {key}", "it is not known to preserve results", fix="Remove it")
        for key in sorted(unknown)
    ]
    if errors:
        raise ConfigError.several(errors)


def load_whole() -> None:
    """Make transformers load unsharded weights: every process needs them to compute their singular basis."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config  # noqa: PLC0415

    unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]


def stage_of(accelerator: Any) -> int:
    """Return the ZeRO stage, 2 or 3, or 0 without DeepSpeed."""
    plugin = getattr(getattr(accelerator, "state", None), "deepspeed_plugin", None)
    return 0 if plugin is None else int(plugin.deepspeed_config["zero_optimization"]["stage"])


def make_engine(model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Any, *, max_grad_norm: float) -> Any:
    """Wrap ``model`` in DeepSpeed's engine and ``optimizer`` in DeepSpeed's and accelerate's wrappers.

    ZeRO-3 moves parameters to the device one by one and keeps only a shard of each, so the unsharded model must fit
    into host memory but not on the device.
    """
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    config["gradient_clipping"] = max_grad_norm
    # DeepSpeed requires these keys; batches come from the training loop.
    config["train_micro_batch_size_per_gpu"], config["train_batch_size"] = 1, accelerator.num_processes
    config["torch_autocast"]["enabled"] |= holds_half(model)
    trained = [p.numel() for group in optimizer.param_groups for p in group["params"]]
    # Buckets of the default size would take 2 GB for gradients of often only kilobytes.
    config["zero_optimization"].setdefault("reduce_bucket_size", max(*trained, min(sum(trained), 50_000_000), 1))
    with _without_prints():
        if stage_of(accelerator) == 3:
            import deepspeed  # noqa: PLC0415

            deepspeed.init_distributed()
            _set_empty_aside(model)
            deepspeed.zero.Init(module=model, config_dict_or_path=config)
            for buffer in model.buffers():
                buffer.data = buffer.data.to(accelerator.device)
        return accelerator.prepare(model, optimizer)


def _set_empty_aside(model: nn.Module) -> None:
    """Turn empty parameters, such as the scales of a core without scales, into buffers: ZeRO-3 cannot gather them."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.numel():
                delattr(module, name)
                module.register_buffer(name, parameter.detach(), persistent=False)


@contextmanager
def _without_prints() -> Iterator[None]:
    """Keep DeepSpeed from printing to stdout while the block runs.

    The permanent effects: DeepSpeed logs to stderr, and torch's deprecation warnings about its calls are ignored.
    """
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    with contextlib.redirect_stdout(io.StringIO()):
        from deepspeed.utils import logger  # noqa: PLC0415

        logger.handlers.clear()
        logger.propagate = True
        yield


@contextmanager
def gathered_parameters(model: nn.Module, *, write_back: bool) -> Iterator[None]:
    """Gather trained parameters that ZeRO-3 has sharded on the device while the block runs. Collective.

    Args:
        model: model; its frozen parameters stay sharded.
        write_back: at the end of the block, shard the values that the main process has written into the parameters.
    """
    cut = [p for p in model.parameters() if p.requires_grad and hasattr(p, "ds_id")]
    if not cut:
        yield
        return
    import deepspeed  # noqa: PLC0415

    with deepspeed.zero.GatheredParameters(cut, modifier_rank=0 if write_back else None):
        yield


def is_gathered(tensor: Any) -> bool:
    """Return whether this process holds all of the tensor, because it is gathered or was never sharded."""
    return not hasattr(tensor, "ds_id") or bool(tensor.numel() == tensor.ds_numel)


def is_zero_optimizer(optimizer: Any) -> bool:
    """Return whether an optimizer is DeepSpeed's, whose moments belong to flat shards instead of parameters."""
    return hasattr(optimizer, "override_loss_scale")


def zero_states(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Tensor]]:
    """Return the unsharded moments and step count of each parameter by name; empty before the first step.

    Collective.
    """
    from deepspeed.utils import safe_get_full_optimizer_state  # noqa: PLC0415

    states = [state for state in optimizer.optimizer.state.values() if state]
    if not states:
        return {}
    _link_states(optimizer)
    return {
        name: {"step": states[0]["step"].float().clone()}
        | {key: safe_get_full_optimizer_state(parameter, key) for key in _MOMENTS}
        for name, parameter in parameters.items()
    }


def restore_zero_states(
    optimizer: Any, parameters: Mapping[str, nn.Parameter], states: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Restore states from :func:`zero_states`, and DeepSpeed's master copy from the parameters, already restored."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state  # noqa: PLC0415

    optimizer.refresh_fp32_params()
    if not states:
        return
    step = next(iter(states.values()))["step"]
    is_cut = _cuts_weights(optimizer)
    shares = optimizer.fp32_partitioned_groups_flat if is_cut else optimizer.single_partition_of_fp32_groups
    for share in shares:
        moments = {key: torch.zeros_like(share, requires_grad=False) for key in _MOMENTS}
        optimizer.optimizer.state[share] = {"step": step.to(share.device, copy=True), **moments}
    _link_states(optimizer)
    for name, parameter in parameters.items():
        for key in _MOMENTS:
            value = states[name][key]
            if is_cut:  # DeepSpeed's setter for unsharded states cannot handle padding
                safe_set_local_optimizer_state(parameter, _share(value, parameter), key)
            else:
                safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)


def _cuts_weights(optimizer: Any) -> bool:
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


def _link_states(optimizer: Any) -> None:
    """Link ZeRO-2's parameters to their moments.

    DeepSpeed links them after the first parameter group has stepped, when the other groups have no moments yet.
    """
    if _cuts_weights(optimizer):
        return
    from deepspeed.utils import lazy_init_hp_params_optimizer_state  # noqa: PLC0415

    shares = optimizer.single_partition_of_fp32_groups
    for parameters, share in zip(optimizer.bit16_groups, shares, strict=True):
        lazy_init_hp_params_optimizer_state(parameters, share, optimizer.optimizer.state)


def _share(value: Tensor, parameter: Any) -> Tensor:
    """Return this process's shard of an unsharded tensor, flattened and padded as DeepSpeed pads ``parameter``."""
    size, rank = parameter.ds_tensor.ds_numel, torch.distributed.get_rank(parameter.ds_process_group)
    share = value.flatten()[size * rank : size * (rank + 1)]
    return torch.nn.functional.pad(share, (0, size - share.numel())).to(parameter.ds_tensor.device)
