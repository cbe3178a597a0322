# SPDX-License-Identifier: Apache-2.0
"""What two processes do together: a program that torchrun starts. ``tests/unit/system/test_sync.py`` reads what
came of it.

FSDP2 runs here on the CPU: accelerate shards on accelerators only, so it is told that the CPU is one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import numpy as np
import pyarrow as pa
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from typing_extensions import override

from mirrortune.adapters.factor_cache import FactorCache
from mirrortune.adapters.spec import AdapterSpec
from mirrortune.adapters.targets import find_targets
from mirrortune.cli import app
from mirrortune.data.dataset import Split
from mirrortune.data.loader import MicroBatch
from mirrortune.data.tokenize import Reading
from mirrortune.errors import InterruptedRun, MirrortuneError, PeerError, ResourceError
from mirrortune.models.pooling import SentenceModules
from mirrortune.runs import train
from mirrortune.system.distributed import sync
from mirrortune.system.distributed.sharding import whole
from mirrortune.system.signals import StopSignals
from mirrortune.tasks.kinds.sentence_similarity import EmbeddingReader, Task
from mirrortune.tasks.objective import Objective
from mirrortune.training.accumulator import Tally
from mirrortune.training.calibration import Calibration, CalibrationSettings
from mirrortune.training.step import Stepper, Update
from tests import tiny_runs
from tests.spectral import Problem
from tests.tiny_models import tiny_bert, tiny_tokenizer

ROOT = Path(__file__).parents[1]
PARTS: list[list[list[int]]] = [[[0, 1, 2], [3, 4]], [[0, 1, 2, 3, 4], []]]
"""Rows of two processes that are compared with each other."""
MEAN = SentenceModules(
    modes=("mean",), is_normalised=False, max_length=None, lowercase=False, prompt="", files={}, notes=()
)
STEPS = {"max_steps": 8, "save_every_steps": 3, "batch_size": 4}  # two processes: batches of 8, as of one


def sharding_accelerator() -> Any:
    """accelerate's object for FSDP2 on the CPU."""
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return accelerate.Accelerator()


def meetings(accelerator: Any) -> dict[str, Any]:
    """What the processes tell each other."""
    index = accelerator.process_index
    found: dict[str, Any] = {
        "made": sync.from_main(accelerator, lambda: f"by {index}"),
        "gathered": sync.gather_lists(accelerator, [index] * (index + 1)),
    }
    copied = torch.full((2,), index + 1)
    sync.copy_from_main(accelerator, [copied])
    found["copied"] = copied.tolist()

    def fail() -> None:
        raise ResourceError("disk", "it is full")

    try:
        sync.from_main(accelerator, fail)
    except MirrortuneError as error:
        found["failed"] = [type(error).__name__, error.exit_code]

    def fail_after_meeting() -> int:
        sync.gather_lists(accelerator, [index])
        if accelerator.is_main_process:
            raise ResourceError("disk", "it is full")
        return index

    try:
        sync.from_all(accelerator, fail_after_meeting)
    except MirrortuneError as error:
        found["failed together"] = [type(error).__name__, error.exit_code]
    told = sync.told_once(accelerator, ResourceError("disk", "it is full"))
    found["told"] = [isinstance(told, PeerError), told.exit_code]
    return found


def votes(accelerator: Any) -> list[int]:
    """What five polls answer; the second process is asked to stop before its second."""
    found = []
    with StopSignals() as signals:
        vote = sync.StopVote(accelerator, signals)
        for poll in range(5):
            if poll == 1 and accelerator.process_index == 1:
                signal.raise_signal(signal.SIGTERM)
            found.append(vote.poll())
        vote.close()
    return found


class SlowCache(FactorCache):
    """A process on a busy machine."""

    def _make(self, *given: Any) -> Any:
        time.sleep(0.3)
        return super()._make(*given)


def factors(accelerator: Any, folder: Path) -> dict[str, Any]:
    """How many matrices each process factorised; those of the second process take longer, so the first one helps."""
    layers = [(f"layer{i}", Problem(12, 8, 8, seed=i).weight, 8) for i in range(12)]
    cache = (SlowCache if accelerator.process_index else FactorCache)(folder=folder)
    sync.gather_lists(accelerator, [0])  # begin together
    cache.share(layers, accelerator.process_index, accelerator.num_processes)
    made = cache.misses
    for name, weight, rank in layers:
        cache(name, weight(), rank)
    return {"shared": made, "misses": cache.misses, "hits": cache.hits}


def bases(accelerator: Any) -> list[float]:
    """The first update of a weight by bases measured on four batches; nothing on the second process, which helps."""
    model = tiny_bert().double()
    spec, rows = AdapterSpec(method="lora-sb", rank=3), tiny_runs.sentences(12)
    settings = CalibrationSettings(
        saliency="mean", num_batches=4, warmup_steps=2, batch_size=3, head_lr=1e-2, side=None, unit=None, seed=0
    )
    targets = find_targets(model, spec, tiny_runs.HEAD)
    objective = Objective(tiny_runs.classification())
    found = Calibration(
        model=model, targets=targets, objective=objective, examples=rows, settings=settings, accelerator=accelerator
    ).measure_bases()
    return [float(value) for f in found.values() for value in (f.U * f.S @ f.Vh).flatten()]


def sharded_runs(folder: Path) -> dict[str, Any]:
    """FSDP2: a whole run, and one that a signal to the second process stops and that is continued."""

    def adapted(trained: int | None = None) -> tiny_runs.Adapted:
        return tiny_runs.adapt(model=tiny_bert(dropout=0.2), trained=trained)

    torch.manual_seed(100 + int(os.environ["RANK"]))
    start = torch.get_rng_state()
    first = tiny_runs.make_trainer(folder / "whole", adapted=adapted(), fresh=is_main(), **STEPS)
    kinds = {n: isinstance(p, DTensor) for n, p in first.bare_model.named_parameters()}
    first.fit()
    torch.set_rng_state(start)
    cut = tiny_runs.make_trainer(folder / "cut", adapted=adapted(), fresh=is_main(), **STEPS)
    if not is_main():  # only the main process has a progress to act in
        step = cut.stepper.step
        cut.stepper.step = lambda number, *rest: (step(number, *rest), warn(number))[0]
    stopped = ""
    try:
        cut.fit()
    except InterruptedRun as error:
        stopped = str(error)
    except PeerError as error:
        stopped = f"peer {error.exit_code}"
    torch.manual_seed(999)
    second = tiny_runs.make_trainer(folder / "cut", adapted=adapted(7), fresh=False, **STEPS)
    second.resume()
    second.fit()
    trained = {n: whole(p.detach()) for n, p in second.bare_model.named_parameters() if p.requires_grad}
    expected = {n: whole(p.detach()) for n, p in first.bare_model.named_parameters() if p.requires_grad}
    return {
        "sharded": sorted(n for n, is_sharded in kinds.items() if is_sharded),
        "replicated": sorted(n for n, is_sharded in kinds.items() if not is_sharded),
        "stopped": stopped,
        "differing": [n for n in expected if not torch.equal(trained[n], expected[n])],
        "plain": run_without_dropout(folder / "plain"),
        "low": run_of_low_rank(folder / "low"),
    }


class Recorder(Update):
    """Adds gradients up, and keeps them and the totals of every step instead of making it."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.steps = model, list[list[float]]()

    @override
    def backward(self, loss: torch.Tensor, items: int | torch.Tensor, *, is_last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    @override
    def step(self, totals: torch.Tensor, number: int) -> bool:
        gradients = [value for p in self.model.parameters() if p.grad is not None for value in p.grad.flatten()]
        self.steps.append([*totals.tolist(), *map(float, gradients)])
        self.model.zero_grad()
        return True


class Vectors(torch.nn.Module):
    """A model whose token vectors are its embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding.from_pretrained(
            torch.randn(128, 4, generator=torch.Generator().manual_seed(0)), freeze=False
        )

    @override
    def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.table(input_ids))


def compared_rows(accelerator: Any, parts: list[list[int]]) -> list[list[float]]:
    """Totals and gradients of a step by sentence-similarity without scores, and of one with them.

    Args:
        accelerator: of this process.
        parts: rows of each process's micro-batch; one without any gets the first row of all, as a stand-in.
    """
    texts = {"a": ["good", "bad film", "dull", "good", "long plot"], "b": ["fun", "bad", "dull film", "lovely", "long"]}
    model, found, own = Vectors(), list[list[float]](), parts[accelerator.process_index]
    for label in (None, "score"):
        table = pa.table({**texts, "score": [0.5, 0.25, 1.0, 0.0, 0.75]})
        task = Task(text_columns=("a", "b"), label_column=label, metric_names=(), selection_metric="")
        reader = EmbeddingReader(tokenizer=tiny_tokenizer(), modules=MEAN)
        examples = task.encode(Split(table=table, source="rows"), reader, Reading(max_length=16))
        batch = examples.batch(np.array(own or [0]))
        part = MicroBatch(batch=batch, is_empty=not own, num_rows_of_step=5, num_tokens_of_step=None)
        update = Recorder(model)
        stepper = Stepper(
            model, torch.optim.SGD(model.parameters()), update, accelerator, objective=Objective(task),
            tally=Tally(torch.device("cpu")), num_micro=1, batch_size=6,
        )  # fmt: skip
        stepper.optimizer.param_groups[0]["peak_lr"] = 1.0
        stepper.step(1, iter([part]), 1.0)
        found += update.steps
    return found


def warn(number: int) -> None:
    """SIGTERM to this process after step 6."""
    if number == 6:
        signal.raise_signal(signal.SIGTERM)


def run_without_dropout(folder: Path) -> dict[str, Any]:
    """FSDP2 as one process could do it too."""
    trainer = tiny_runs.make_trainer(folder, fresh=is_main(), **STEPS)
    return trainer.fit().metrics


def run_of_low_rank(folder: Path) -> dict[str, Any]:
    """An adapter that would carry its factors, if one process had them whole."""
    adapted = tiny_runs.adapt(AdapterSpec(rank=4), trained=None)
    trainer = tiny_runs.make_trainer(folder, adapted=adapted, fresh=is_main(), max_steps=1, batch_size=4)
    return trainer.fit().metrics


def is_main() -> bool:
    """Whether this is the first process."""
    return os.environ["RANK"] == "0"


def report(folder: Path, accelerator: Any, do: dict[str, Callable[[], Any]]) -> None:
    """Do everything, runs by ``accelerator``, and write down what came of it in this process's file."""
    torch.set_num_threads(1)
    tiny_runs.make_accelerator = lambda: accelerator
    found = {"count": accelerator.num_processes, **{name: one() for name, one in do.items()}}
    (folder / f"found-{accelerator.process_index}.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


def main(folder: Path) -> None:
    """What FSDP2 and the meetings of processes are tested by."""
    accelerator = sharding_accelerator()
    report(folder, accelerator, {
        "meetings": lambda: meetings(accelerator),
        "votes": lambda: votes(accelerator),
        "factors": lambda: factors(accelerator, folder / "factors"),
        "bases": lambda: bases(accelerator),
        "compared": lambda: [compared_rows(accelerator, parts) for parts in PARTS],
        "runs": lambda: sharded_runs(folder),
    })  # fmt: skip


def command(words: list[str], accelerator: Callable[[], Any]) -> None:
    """The command line as it would be on two GPUs, by an ``accelerator`` of accelerate's."""
    train.make_accelerator = lambda *_, **__: accelerator()
    sys.argv = ["mirrortune", *words]
    app.main()


def launch(module: str, folder: Path, *words: object, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a module of ``tests`` in two processes: its ``main`` in ``folder``, or a command line of ``words``."""
    own = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}
    own["MIRRORTUNE_CACHE"] = str(folder / "cache")
    python = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    started = [*python, "-m", f"tests.{module}", str(folder), *map(str, words)]
    return subprocess.run(
        started, env={**os.environ, **env, **own}, cwd=ROOT, capture_output=True, text=True, check=False
    )


def found_by_each(folder: Path) -> list[dict[str, Any]]:
    """What :func:`report` has written down for each process."""
    return [json.loads((folder / f"found-{i}.json").read_text(encoding="utf-8")) for i in (0, 1)]


if __name__ == "__main__":
    main(Path(sys.argv[1])) if len(sys.argv) == 2 else command(sys.argv[2:], sharding_accelerator)
