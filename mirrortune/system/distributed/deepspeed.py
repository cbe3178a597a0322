# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's ZeRO-2 and ZeRO-3 as the engine of a run: what is asked of it, its step, and its moments by parameter.

ZeRO-2 cuts gradients and moments into shares, one for each process, ZeRO-3 the weights and factors as well. The engine
sums micro-batches as the loop does (its own accumulation is 1, its boundary is set), and divides by the items of the
global batch when it steps, as it would by a loss scale: before it measures and clips the gradient. Everything stays in
float32 that is so without DeepSpeed; bfloat16 is autocast, as everywhere here, and not a copy of the model.

DeepSpeed is imported only where one of its runs goes on.
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
# What a config of DeepSpeed may set: what the recipe decides anyway, and how large its buckets are.
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
    """ConfigError if DeepSpeed is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("DeepSpeed", "it is not installed", fix="pip install 'mirrortune[deepspeed]'")


def make_plugin(*, is_bf16: bool) -> Any:
    """Accelerate's plugin for DeepSpeed, from what its launcher has set, made to do what this loop does.

    Args:
        is_bf16: whether to compute under bfloat16 autocast.

    Raises:
        ConfigError: DeepSpeed is not installed, or is asked for something that was not shown to be exact here.
    """
    check_installed()
    from accelerate.utils import DeepSpeedPlugin  # noqa: PLC0415

    # Numbers that the recipe decides; where its config names none, the launcher says that they are "none".
    plugin = DeepSpeedPlugin(zero3_init_flag=False, gradient_accumulation_steps=1, gradient_clipping=1.0)
    config = plugin.deepspeed_config
    _check(config)
    # Autocast as without DeepSpeed: its bf16 mode would round what is trained to 16 bits, its modules' gradients too.
    config["bf16"], config["fp16"] = {"enabled": False}, {"enabled": False}
    config["torch_autocast"] = {"enabled": is_bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    config["gradient_accumulation_steps"] = 1  # ours is counted by the loop
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
        ConfigError(f"DeepSpeed config, {key}", "it is not known to leave results as they are", fix="Remove it")
        for key in sorted(unknown)
    ]
    if errors:
        raise ConfigError.several(errors)


def load_whole() -> None:
    """Let transformers load weights as without DeepSpeed, which accelerate has told it of: to know their singular basis
    every process must read them whole.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config  # noqa: PLC0415

    unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]


def stage_of(accelerator: Any) -> int:
    """2 or 3; 0 without DeepSpeed."""
    plugin = getattr(getattr(accelerator, "state", None), "deepspeed_plugin", None)
    return 0 if plugin is None else int(plugin.deepspeed_config["zero_optimization"]["stage"])


def prepare(model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Any, *, max_grad_norm: float) -> Any:
    """DeepSpeed's engine around ``model``, and accelerate's optimizer around DeepSpeed's.

    ZeRO-3 takes the parameters to the device one by one and leaves a share of each there, so that a device need not
    hold the model; the memory of the processes does, until then.
    """
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    config["gradient_clipping"] = max_grad_norm
    # Only counted, never cut: batches come from the loop.
    config["train_micro_batch_size_per_gpu"], config["train_batch_size"] = 1, accelerator.num_processes
    config["torch_autocast"]["enabled"] |= holds_half(model)
    trained = [p.numel() for group in optimizer.param_groups for p in group["params"]]
    # Buckets of its default size would take 2 GB for what is often kilobytes.
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
    """Make buffers of parameters without numbers (scales of a core that has none), which ZeRO-3 cannot gather."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.numel():
                delattr(module, name)
                module.register_buffer(name, parameter.detach(), persistent=False)


@contextmanager
def _without_prints() -> Iterator[None]:
    """Within: DeepSpeed prints nothing to stdout, where results go; from now on its warnings go to stderr, and those of
    torch about names that it calls nowhere.
    """
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    with contextlib.redirect_stdout(io.StringIO()):
        from deepspeed.utils import logger  # noqa: PLC0415

        logger.handlers.clear()
        logger.propagate = True
        yield


@contextmanager
def whole_parameters(model: nn.Module, *, write_back: bool) -> Iterator[None]:
    """Within: trained parameters that ZeRO-3 has cut are whole, on the device; a meeting. Others stay as they are.

    Args:
        model: whose frozen parameters stay cut.
        write_back: take over what the main process wrote into them.
    """
    cut = [p for p in model.parameters() if p.requires_grad and hasattr(p, "ds_id")]
    if not cut:
        yield
        return
    import deepspeed  # noqa: PLC0415

    with deepspeed.zero.GatheredParameters(cut, modifier_rank=0 if write_back else None):
        yield


def is_whole(tensor: Any) -> bool:
    """Whether this process has all numbers of a tensor: it is not cut, or gathered."""
    return not hasattr(tensor, "ds_id") or bool(tensor.numel() == tensor.ds_numel)


def is_zero_optimizer(optimizer: Any) -> bool:
    """Whether it is DeepSpeed's, which holds moments of flat shares and not of parameters."""
    return hasattr(optimizer, "override_loss_scale")


def optimizer_states(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Tensor]]:
    """Whole moments and number of steps of every parameter, by its name; a meeting. Empty before the first step."""
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


def restore_states(
    optimizer: Any, parameters: Mapping[str, nn.Parameter], states: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Inverse of :func:`optimizer_states`; the parameters have been written before, whole, and are taken over too."""
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
            if is_cut:  # its setter of whole states cannot cut what has to be padded
                safe_set_local_optimizer_state(parameter, _share(value, parameter), key)
            else:
                safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)


def _cuts_weights(optimizer: Any) -> bool:
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


def _link_states(optimizer: Any) -> None:
    """Tell ZeRO-2's parameters where their moments are. It does so itself when the first group has stepped, and the
    others have none yet.
    """
    if _cuts_weights(optimizer):
        return
    from deepspeed.utils import lazy_init_hp_params_optimizer_state  # noqa: PLC0415

    shares = optimizer.single_partition_of_fp32_groups
    for parameters, share in zip(optimizer.bit16_groups, shares, strict=True):
        lazy_init_hp_params_optimizer_state(parameters, share, optimizer.optimizer.state)


def _share(value: Tensor, parameter: Any) -> Tensor:
    """This process's share of a whole tensor, padded as DeepSpeed pads ``parameter``, flat."""
    size, rank = parameter.ds_tensor.ds_numel, torch.distributed.get_rank(parameter.ds_process_group)
    share = value.flatten()[size * rank : size * (rank + 1)]
    return torch.nn.functional.pad(share, (0, size - share.numel())).to(parameter.ds_tensor.device)
