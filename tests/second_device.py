# SPDX-License-Identifier: Apache-2.0
"""A second device, ``sim``, which computes on the CPU: its tensors do not mix with those of the CPU, as on a GPU.

    python -m tests.second_device [--no-float64] train ... [--then eval ...]

Runs the commands of ``mirrortune`` one after the other in this process, with models on that device. With
``--no-float64``, it has no float64, like an Apple GPU. What it cannot show: memory, streams, speed, and kernels of a
real device that compute otherwise; branches for devices called ``cuda`` or ``mps`` are not taken.

Tensors of the device are wrappers around tensors of the CPU (``raw``). Operators of torch arrive in ``_run``, either
from the wrappers (``__torch_dispatch__``) or, for those that make a tensor, from the device's fallback kernel.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _device, backend_registration
from torch.utils._pytree import tree_leaves, tree_map

NAME = "sim"
# Operators that move tensors between devices, and those that take indices of the CPU on any device.
_MOVES = {"_to_copy", "copy_", "_copy_from", "_local_scalar_dense"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_LOWERED = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "conv1d", "conv2d")
_RAISED = ("layer_norm", "softmax.int", "log_softmax.int", "cross_entropy_loss", "mse_loss")
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
_KEPT: list[Any] = []  # libraries of kernels, which are removed when they are collected


class Sim(torch.Tensor):
    """A tensor of the device."""

    has_float64 = True
    has_tf32 = False
    raw: torch.Tensor

    @staticmethod
    def __new__(cls: type[Sim], raw: torch.Tensor) -> Sim:
        """Wrap a tensor of the CPU."""
        _check_dtype(raw.dtype)
        made = torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype,
            layout=raw.layout, device=torch.device(NAME, 0),
        )  # fmt: skip
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator that has a tensor of the device among its arguments."""
        return _run(func, *args, **(kwargs or {}))

    def tolist(self) -> Any:
        """Return the values; torch's own refuses subclasses."""
        return self.raw.tolist()

    def numpy(self, **_: Any) -> Any:
        """Refuse, as tensors of a GPU do."""
        raise TypeError(f"can't convert {NAME} device type tensor to numpy. Use Tensor.cpu()")

    __array__ = numpy


class _Module(backend_registration._DummyBackendModule):
    """What torch asks of a device beside its kernels."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, *_: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, *_: Any) -> None:
        torch.set_rng_state(state)

    def set_device(self, *_: Any) -> None:
        pass

    synchronize = empty_cache = manual_seed = set_device

    def device(self, *_: Any) -> Any:
        return contextlib.nullcontext()


def _check_dtype(dtype: Any) -> None:
    if not Sim.has_float64 and dtype in (torch.float64, torch.complex128):
        raise TypeError(f"Cannot convert a tensor to {dtype}: this device has no float64")


def _run(func: Any, *args: Any, **kwargs: Any) -> Any:
    name = func._schema.name.split("::")[1]
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    own = [t for t in tensors if isinstance(t, Sim)]
    if own and name not in _MOVES | _INDEXING and any(t.dim() and not isinstance(t, Sim) for t in tensors):
        raise RuntimeError(f"Expected all tensors to be on the same device ({func})")
    if own:
        _check_dtype(kwargs.get("dtype"))
    is_own = bool(own)
    if kwargs.get("device") is not None:
        is_own = torch.device(kwargs["device"]).type == NAME
        kwargs["device"] = torch.device("cpu")
    kwargs |= {"pin_memory": False} if "pin_memory" in kwargs else {}
    raw_args, raw_kwargs = tree_map(lambda t: t.raw if isinstance(t, Sim) else t, (args, kwargs))
    if Sim.has_tf32 and own and name in _PRODUCTS:
        raw_args = tree_map(_rounded, raw_args)
    if name == "_copy_from":
        raw_args[1].copy_(raw_args[0])
        return args[1]
    found = func(*raw_args, **raw_kwargs)
    if name == "copy_":
        return args[0]
    if not is_own:
        return found
    wrappers = {id(t.raw): t for t in own}  # operators in place return one of their arguments

    def wrapped(t: Any) -> Any:
        return wrappers[id(t)] if id(t) in wrappers else Sim(t) if isinstance(t, torch.Tensor) else t

    return tree_map(wrapped, found)


def _rounded(value: Any) -> Any:
    """Round numbers in float32 to the 10 bits of TF32."""
    if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
        return value
    return ((value.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def _cast(name: str, dtype: Callable[[], torch.dtype]) -> Callable[..., Any]:
    """Return a kernel of autocast for an operator."""
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.aten, packet), overload or "default")

    def to_dtype(t: Any) -> Any:
        is_ours = isinstance(t, torch.Tensor) and t.is_floating_point() and t.device.type == NAME
        return t.to(dtype()) if is_ours else t

    def kernel(*args: Any, **kwargs: Any) -> Any:
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operator(*tree_map(to_dtype, args), **tree_map(to_dtype, kwargs))

    return kernel


def register() -> None:
    """Register the device with torch, for the rest of the process."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    everything, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(_run, "PrivateUse1")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in _LOWERED:
        aten.impl(name, _cast(name, lambda: torch.get_autocast_dtype(NAME)), "AutocastPrivateUse1")
    for name in _RAISED:
        aten.impl(name, _cast(name, lambda: torch.float32), "AutocastPrivateUse1")
    _KEPT.extend((everything, aten))
    torch.__future__.set_swap_module_params_on_conversion(True)  # parameters stay the same objects when they move
    # These two do not reach the fallback. First, torch looks up the functions that ``with torch.device`` changes.
    _device._device_constructors()
    torch.tensor, torch.as_tensor = _through_cpu(torch.tensor), _through_cpu(torch.as_tensor)


def _through_cpu(make: Callable[..., Any]) -> Callable[..., Any]:
    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        if isinstance(data, Sim):
            return data.to(device=device or data.device, dtype=kwargs.get("dtype") or data.dtype)
        is_own = device is not None and torch.device(device).type == NAME
        found = make(data, *args, device=None if is_own else device, **kwargs)
        return found.to(device) if is_own else found

    return made


def start(*, has_float64: bool = True, has_tf32: bool = False) -> None:
    """Make the device that of models in this process.

    Functions are changed in place, since other modules have imported them.

    Args:
        has_float64: whether tensors can be in float64.
        has_tf32: whether factors in float32 are rounded to TF32, as by ``torch.set_float32_matmul_precision("high")``.
    """
    from mirrortune.system import devices
    from mirrortune.system.distributed import sharding

    os.environ["ACCELERATE_TORCH_DEVICE"] = NAME
    register()
    devices.default_device.__code__ = (lambda: torch.device("sim")).__code__
    sharding.is_whole.__code__ = (lambda tensor: True).__code__  # wrappers are whole tensors, unlike those of shards
    Sim.has_tf32 = has_tf32
    if not has_float64:
        Sim.has_float64 = False
        devices.float64_device.__code__ = (lambda device: torch.device("cpu")).__code__


def main(words: Sequence[str]) -> None:
    """Run the commands; the first that fails ends the process."""
    from mirrortune.cli.app import app

    has_float64 = words[0] != "--no-float64"
    start(has_float64=has_float64)
    words = words if has_float64 else words[1:]
    commands: list[list[str]] = [[]]
    for word in words:
        if word == "--then":
            commands.append([])
        else:
            commands[-1].append(word)
    for command in commands:
        app(command, standalone_mode=False)


if __name__ == "__main__":
    main(sys.argv[1:])
