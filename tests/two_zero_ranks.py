# SPDX-License-Identifier: Apache-2.0
"""What two processes do under DeepSpeed: a program that torchrun starts.
``tests/unit/system/test_deepspeed.py`` reads what came of it.

DeepSpeed has an accelerator for the CPU; accelerate has not, so it is told that the CPU is one.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from mirrortune.adapters.spec import AdapterSpec
from mirrortune.errors import DivergedError, InterruptedRun, PeerError
from mirrortune.system.devices import widen
from mirrortune.system.distributed import deepspeed
from mirrortune.training.evaluate import evaluate_split
from mirrortune.training.snapshots import optimizer_tensors
from tests import tiny_runs
from tests.tiny_models import tiny_bert
from tests.two_ranks import STEPS, command, is_main, report

RUNS: dict[str, tuple[AdapterSpec, dict[str, Any]]] = {
    "plain": (AdapterSpec(), {}),
    "parts": (AdapterSpec(), {"batch_size": 2, "gradient_accumulation_steps": 2}),
    "clipped": (AdapterSpec(), {"max_grad_norm": 0.01}),
    "low": (AdapterSpec(rank=4), {}),
    "dense": (AdapterSpec(strategy="dense"), {}),
    "full": (AdapterSpec(method="full"), {"lr": 1e-3}),
    "half": (AdapterSpec(), {"half": True}),
}
"""Runs that one process could do too."""
# As it would be with large layers: gathered when they are used, released afterwards.
SMALL = {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}


def zero_accelerator() -> Any:
    """accelerate's object for DeepSpeed on the CPU; the stage is in the environment."""
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    plugin = deepspeed.make_plugin(is_bf16=False)
    plugin.deepspeed_config["zero_optimization"] |= SMALL
    accelerator = accelerate.Accelerator(deepspeed_plugin=plugin)
    deepspeed.load_whole()
    return accelerator


def fit(folder: Path, spec: AdapterSpec | None = None, *, half: bool = False, **settings: Any) -> dict[str, Any]:
    """A whole run: its losses, the first of them before any step."""
    adapted = tiny_runs.adapt(spec or AdapterSpec(), model=tiny_bert().bfloat16() if half else None, trained=None)
    if half:
        widen(adapted.model, tiny_runs.HEAD)
    trainer = tiny_runs.make_trainer(folder, adapted=adapted, fresh=is_main(), **{**STEPS, **settings})
    first = evaluate_split(
        trainer.bare_model, trainer.task, trainer.validation, trainer.accelerator, batch_size=16, source="validation"
    )
    last = trainer.fit()
    return {
        "losses": [first.metrics["loss"], *trainer.progress.losses, last.metrics["loss"]],
        "held": held(trainer.bare_model),
        "trained in": sorted({str(p.dtype) for p in trainer.bare_model.parameters() if p.requires_grad}),
    }


def held(model: torch.nn.Module) -> int:
    """How many numbers of the model's parameters this process holds between steps."""
    return sum(getattr(p, "ds_tensor", p).numel() for p in model.parameters())


def stopped(folder: Path) -> dict[str, Any]:
    """A whole run, and one that is stopped and continued; with dropout."""

    def trainer(name: str, *, fresh: bool, trained: int | None = None, **more: Any) -> Any:
        adapted = tiny_runs.adapt(model=tiny_bert(dropout=0.2), trained=trained)
        return tiny_runs.make_trainer(folder / name, adapted=adapted, fresh=fresh and is_main(), **STEPS, **more)

    torch.manual_seed(100 + int(os.environ["RANK"]))
    start = torch.get_rng_state()
    trainer("whole", fresh=True).fit()
    torch.set_rng_state(start)
    said = ""
    try:
        trainer("cut", fresh=True, progress=tiny_runs.terminate_after(5)).fit()
    except InterruptedRun as error:
        said = str(error)
    except PeerError as error:
        said = f"peer {error.exit_code}"
    torch.manual_seed(999)
    second = trainer("cut", fresh=False, trained=7)
    second.resume()
    second.fit()
    return {"said": said}


def diverged(folder: Path) -> dict[str, Any]:
    """A run whose gradient is not finite in step 5, though its loss is; it would be noticed after step 6."""
    trainer = tiny_runs.make_trainer(folder, fresh=is_main(), **STEPS, log_every_steps=6, eval_every_steps=6)
    add = trainer.stepper.update.backward

    def backward(loss: torch.Tensor, **options: Any) -> None:
        add(loss * (torch.inf if trainer.state.global_step == 4 else 1), **options)

    trainer.stepper.update.backward = backward
    try:
        trainer.fit()
    except (DivergedError, PeerError) as error:
        found = optimizer_tensors(trainer.snapshots.optimizer, {"head": trainer.bare_model.classifier.weight})
        return {"said": str(error), "step": float(found["optimizer.head.step"])}
    return {}


def main(folder: Path) -> None:
    """What ZeRO is tested by."""
    report(folder, zero_accelerator(), {
        "runs": lambda: {name: fit(folder / name, spec, **settings) for name, (spec, settings) in RUNS.items()},
        "stopped": lambda: stopped(folder),
        "diverged": lambda: diverged(folder / "diverged"),
    })  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1])) if len(sys.argv) == 2 else command(sys.argv[2:], zero_accelerator)
