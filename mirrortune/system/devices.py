# SPDX-License-Identifier: Apache-2.0
"""Choose the device and precision of a run and measure its memory."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from mirrortune.errors import ResourceError, first_line


def default_device() -> torch.device:
    """Return the device that accelerate will choose."""
    if is_set("ACCELERATE_USE_CPU"):
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def float64_device(device: torch.device) -> torch.device:
    """Return ``device``, or the CPU if it is an Apple GPU, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def to_float64(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` in float64 on its device, or on the CPU if its device has no float64."""
    return tensor.to(float64_device(tensor.device)).double()


def resolve_precision(asked: str) -> str:
    """Return ``fp32``, ``bf16`` or ``fp16`` for ``train.precision``.

    ``auto`` is bf16 on GPUs that compute in it, fp16 on other GPUs (V100, T4), and fp32 elsewhere.

    Raises:
        ResourceError: the device does not support the precision, or fp16 was requested for a sharded model.
    """
    has_gpu = default_device().type == "cuda"
    if asked == "auto":
        if not has_gpu:
            return "fp32"
        if has_bf16():
            return "bf16"
        return "fp32" if _is_sharded() else "fp16"
    if asked == "bf16" and has_gpu and not torch.cuda.is_bf16_supported():
        raise ResourceError("train.precision", "this GPU has no bf16", fix="Use --precision fp16 or fp32")
    if asked == "fp16" and default_device().type == "mps":
        raise ResourceError("train.precision", "fp16 is untested on MPS", fix="Use --precision fp32")
    if asked == "fp16" and _is_sharded():
        raise ResourceError(
            "train.precision", "gradients are not scaled under FSDP and DeepSpeed, which fp16 needs",
            allowed="auto, bf16 or fp32", fix="Use --precision bf16, or ddp on GPUs without it",
        )  # fmt: skip
    return asked


def check_attention(asked: str | None, device: torch.device) -> None:
    """Check that ``device`` can run the requested attention implementation.

    Args:
        asked: transformers' ``attn_implementation``, or None for the model's default.
        device: device to train on.

    Raises:
        ResourceError: flash attention without a CUDA device, without the package ``flash_attn``, or on a GPU that is
            older than its kernels.
    """
    if asked != "flash_attention_2":
        return
    if device.type != "cuda":
        raise ResourceError("model.attention", f"{asked} runs only on CUDA GPUs, got {device.type}", fix="Use sdpa")
    if importlib.util.find_spec("flash_attn") is None:
        raise ResourceError("model.attention", f"{asked} needs the package flash-attn", fix="Install it, or use sdpa")
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < (8, 0):
        problem = f"{asked} needs a GPU from Ampere on, got compute capability {'.'.join(map(str, capability))}"
        raise ResourceError("model.attention", problem, allowed="8.0 or newer", fix="Use sdpa")


def num_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_bf16() -> bool:
    """Return whether the GPU computes in bfloat16 natively; torch emulates it slowly on GPUs before Ampere."""
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _is_sharded() -> bool:
    return is_set("ACCELERATE_USE_FSDP") or is_set("ACCELERATE_USE_DEEPSPEED")


# Compute capabilities of NVIDIA's data-centre GPUs (P100, V100, A100, H100, B200), whose float64 rate is half of the
# float32 rate. On other GPUs it is a 32nd or 64th, which is slower than a few CPU cores.
_FLOAT64_CAPABILITIES = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}


def factorising_device(device: torch.device) -> torch.device | None:
    """Return ``device`` if it factorises large matrices in float64 faster than the CPU, else None."""
    is_fast = device.type == "cuda" and torch.cuda.get_device_capability(device) in _FLOAT64_CAPABILITIES
    return device if is_fast else None


_SLOW = 1.5
"""Time in bfloat16 relative to float32 above which a CPU counts as slow: we measured 3 to 45 on CPUs without bfloat16
instructions, and 0.4 to 0.8 on CPUs with them.
"""


def is_slow(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether ``device`` is much slower in a 16-bit ``dtype`` than in float32."""
    if device.type != "cpu":
        return False
    return dtype == torch.float16 or (dtype == torch.bfloat16 and bfloat16_slowdown() > _SLOW)


@functools.cache
def bfloat16_slowdown() -> float:
    """Measure the time of a linear layer, forward and backward, in bfloat16 on this CPU relative to float32.

    The ratio is measured (once per process) because it cannot be looked up: the relevant instructions differ between
    vendors, and the libraries that torch calls can be configured not to use them.
    """
    return _linear_seconds(torch.bfloat16) / _linear_seconds(torch.float32)


def _linear_seconds(dtype: torch.dtype) -> float:
    """Return the best of six timings; the first includes library initialisation, and others may be disturbed."""
    x, weight = (torch.ones(64, 512, dtype=dtype, requires_grad=True), torch.ones(512, 512, dtype=dtype))
    found = []
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        for _ in range(6):
            started = time.perf_counter()
            torch.autograd.grad(torch.nn.functional.linear(x, weight).sum(), x)
            found.append(time.perf_counter() - started)
    return min(found)


def is_set(variable: str) -> bool:
    """Return whether accelerate would read an environment variable as true."""
    return os.environ.get(variable, "").lower() in ("y", "yes", "t", "true", "on", "1")


def peak_resident_bytes() -> int:
    """Return the largest resident set size of this process so far."""
    try:
        import resource  # noqa: PLC0415  (Windows has none)
    except ImportError:
        import psutil  # noqa: PLC0415

        memory: Any = psutil.Process().memory_info()
        return int(memory.peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB on Linux


def uses_cuda() -> bool:
    """Return whether this process computes on a CUDA GPU; False for a run on the CPU of a machine that has one.

    A GPU must not be asked anything in such a run: the first question takes hundreds of megabytes of its memory, or
    fails if it is busy.
    """
    return default_device().type == "cuda"


def why_unused() -> str | None:
    """Return why torch uses no GPU though this machine has NVIDIA's driver; None if it uses one, or is told not to."""
    is_hidden = is_set("ACCELERATE_USE_CPU") or os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    if is_hidden or shutil.which("nvidia-smi") is None or torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build for CPUs"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except RuntimeError as error:  # such as a driver that is older than the build
        return f"torch {torch.__version__}: {first_line(error)}"
    return None


def memory_bytes() -> dict[str, int]:
    """Return the bytes allocated to tensors and reserved by the allocator on the GPU; empty without a GPU."""
    if not uses_cuda():
        return {}
    return {
        "memory_allocated_bytes": int(torch.cuda.memory_allocated()),
        "memory_reserved_bytes": int(torch.cuda.memory_reserved()),
    }


_HALF = (torch.bfloat16, torch.float16)
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)  # noqa: SLF001


def widen(model: nn.Module, names: Iterable[str]) -> None:
    """Convert the named 16-bit parameters to float32, in place, and the 16-bit vectors and buffers beside them.

    Parameters in bfloat16 stop learning early: AdamW's small updates are lost to rounding with 8 bits of precision.
    Normalisation layers on a CPU refuse a weight and a bias of different dtypes, under autocast too.
    """
    wanted, widened = set(names), set[int]()
    for name, parameter in model.named_parameters():
        if name in wanted and parameter.dtype in _HALF:
            parameter.data = parameter.data.float()
            widened.add(id(parameter))
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if any(id(parameter) in widened for parameter in own):
            for tensor in (*(parameter for parameter in own if parameter.ndim == 1), *module.buffers(recurse=False)):
                tensor.data = tensor.data.float() if tensor.dtype in _HALF else tensor.data
    if widened and not holds_half(model):  # nothing computes in 16 bits any more, modules without parameters included
        for buffer in model.buffers():
            buffer.data = buffer.data.float() if buffer.dtype in _HALF else buffer.data


def autocast(model: nn.Module, dtype: torch.dtype | None = None) -> AbstractContextManager[object]:
    """Return bfloat16 autocast if any weight of ``model`` is in 16 bits and no autocast is on, else a null context.

    On a CPU it is to float16 if all such weights are in float16 and there are normalisation layers, which have no
    kernels for float16 weights with bfloat16 activations. Elsewhere, float16 would overflow and lose small gradients,
    which nothing scales; CPUs are also many times slower in it.

    Args:
        model: model that is called.
        dtype: weight dtype of a model that loads its weights when it is called, on the CPU; None for other models.
    """
    found = _autocast_dtype(model, dtype)
    device = next(model.parameters()).device.type if found and dtype is None else "cpu"
    if found is None or torch.is_autocast_enabled(device):  # an outer autocast, such as float16, takes precedence
        return contextlib.nullcontext()
    return torch.autocast(device, found)


def _autocast_dtype(model: nn.Module, dtype: torch.dtype | None) -> torch.dtype | None:
    half = ({p.dtype for p in model.parameters()} if dtype is None else {dtype}) & set(_HALF)
    if not half:
        return None
    is_on_cpu = dtype is not None or next(model.parameters()).device.type == "cpu"
    is_float16 = half == {torch.float16} and is_on_cpu and any(isinstance(m, _NORMS) for m in model.modules())
    return torch.float16 if is_float16 else torch.bfloat16


def rounding_unit(model: nn.Module, dtype: torch.dtype | None = None) -> float:
    """Return the rounding unit of the coarsest dtype that ``model`` holds weights in, or that :func:`autocast`, which
    describes the arguments, computes in: bfloat16 for most models in float16.
    """
    held = {p.dtype for p in model.parameters()} if dtype is None else {dtype}
    found = (*held, _autocast_dtype(model, dtype))
    return max(torch.finfo(each).eps for each in found if each is not None and each.is_floating_point)


def holds_half(model: nn.Module) -> bool:
    """Return whether any weight of ``model`` is in 16 bits."""
    return any(p.dtype in _HALF for p in model.parameters())


def wrap_calls(module: nn.Module, around: Callable[..., Any]) -> None:
    """Call ``around(module, call, *args, **kwargs)`` from now on where ``module`` is called; ``call`` is the plain one.

    Unlike a forward hook with ``always_call``, which torch omits after Ctrl-C, ``around`` can clean up in all cases.

    Args:
        module: module, changed in place; copies of it call ``around`` as well.
        around: function of a module's top level, so that the module can be pickled.
    """
    plain = type(module)

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        return around(self, functools.partial(plain.__call__, self), *args, **kwargs)

    change_class(module, functools.partial(wrap_calls, around=around), {"__call__": __call__})


def change_class(module: nn.Module, change: Callable[[nn.Module], None], members: dict[str, Any]) -> None:
    """Give ``module`` a subclass of its class that has other members, and the same name.

    Args:
        module: module, changed in place.
        change: makes the same change, for copies of the module.
        members: members of the subclass by name.
    """
    plain = type(module)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> tuple[Any, ...]:  # noqa: N807
        return _changed, (plain, change), *plain.__reduce_ex__(self, protocol)[2:]

    same = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    module.__class__ = type(plain.__name__, (plain,), {**same, "__reduce_ex__": __reduce_ex__, **members})


def _changed(plain: type[nn.Module], change: Callable[[nn.Module], None]) -> nn.Module:
    module = plain.__new__(plain)
    change(module)
    return module


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into evaluation mode while the context is open."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def as_computed(model: nn.Module) -> Iterator[None]:
    """Make ``model`` return its outputs in the dtype of its computation while the block runs.

    With mixed precision, accelerate converts all outputs of a prepared model to float32. A compiled model is not
    changed.
    """
    own = vars(model)
    if "_original_forward" not in own or own.get("_compiled_call_impl") is not None:
        yield
        return
    wrapped, own["forward"] = own["forward"], own["_original_forward"]
    try:
        yield
    finally:
        own["forward"] = wrapped
