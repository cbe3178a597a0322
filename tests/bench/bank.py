# SPDX-License-Identifier: Apache-2.0
"""Many adapters on one base: a batch of 64 rows with 1, 8 and 64 different adapters, and the memory of a thousand.

    python -m tests.bench.bank -o tests/bench/results/bank-cpu [--lengths 1 32] [--layers 2] [--turns 3]

The shapes of a BERT-base encoder, with random weights. In every turn each contestant computes the same rows once, and
ratios are taken within turns. ``1``, ``8`` and ``64`` are the bank with so many adapters, ``swapped`` computes
row by row, one adapter after another; ``alone`` is a model with one adapter loaded, and ``peft`` PEFT's mixed batch
(``adapter_names``) of 64 LoRA adapters r=8 on the same layers. A length of 1 is a step of writing text, of which eight
follow each other within one ``rows``.

Memory is that of the process before and after a thousand adapters of 12 layers are put into a bank, with numbers of
their own.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

import mirrortune
from mirrortune.adapters.files.adapter_file import write_adapter
from mirrortune.adapters.files.load import adapt
from mirrortune.adapters.inject import adapter_parameters
from mirrortune.adapters.spec import AdapterSpec
from mirrortune.adapters.svd import Factors
from tests.bench.contestants import any_factors, hardware, make_model, versions
from tests.bench.output import command_line, write_and_print

ROWS, WRITTEN, TARGETS = 64, 8, ["query", "key", "value", "dense"]
Run = Callable[[Tensor, int], None]
METHODS: dict[str, AdapterSpec] = {
    "mirror": AdapterSpec(method="mirror"),
    "mirror r=64": AdapterSpec(method="mirror", rank=64),
    "lora-xs r=16": AdapterSpec(method="lora-xs", rank=16),
}


class Source:
    """Random factors, the same at every call for a layer."""

    def __init__(self) -> None:
        self.made: dict[tuple[str, int], Factors] = {}

    def __call__(self, name: str, weight: Tensor, rank: int) -> Factors:
        """Factors of the layer ``name``."""
        if (name, rank) not in self.made:
            self.made[name, rank] = any_factors(name, weight, rank)
        found = self.made[name, rank]
        return Factors(U=found.U.double(), S=found.S, Vh=found.Vh.double())


def filled_bank(base: nn.Module, spec: AdapterSpec, count: int) -> tuple[mirrortune.AdapterBank, nn.Module]:
    """A bank of ``count`` adapters of a copy of ``base``, with numbers of their own (one is loaded, the others are made
    of it), and a model that has the first one alone.
    """
    source, model = Source(), copy.deepcopy(base)
    adapted = copy.deepcopy(base)
    head = {name for name, _ in adapted.named_parameters() if name.startswith("classifier")}
    book = adapt(adapted, spec, factor_source=source, new_parameters=head)
    with torch.no_grad():
        for parameter in adapter_parameters(adapted).values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    bank = mirrortune.AdapterBank(model)
    bank._admission.source = source
    with tempfile.TemporaryDirectory() as place:
        write_adapter(Path(place), adapted, book.entries, base={"name": "random"}, task=None, extra={})
        bank.add("0", place)
    fill(bank, count)
    return bank, adapted.eval()


def fill(bank: mirrortune.AdapterBank, count: int) -> None:
    """Put as many adapters into ``bank`` as make ``count``."""
    first = bank._entry("0")
    own = first.tensors
    for index in range(len(bank), count):
        bank._entries[str(index)] = dataclasses.replace(
            first, tensors={key: t if key == "signs" else t + 0.01 * torch.randn_like(t) for key, t in own.items()}
        )


def peft_model(base: nn.Module, count: int) -> nn.Module:
    """A copy of ``base`` with ``count`` LoRA adapters of PEFT."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, target_modules=TARGETS, init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(base), config, adapter_name="0")
    for index in range(1, count):
        model.add_adapter(str(index), config)
    return model.eval()


def contestants(base: nn.Module, spec: AdapterSpec) -> dict[str, Run]:
    """What is compared, by name: computes token ids (64, L) as often as it is told."""
    bank, one = filled_bank(base, spec, ROWS)
    model = bank.model

    def mixed(count: int) -> Run:
        def run(ids: Tensor, steps: int) -> None:
            with bank.rows([str(row % count) for row in range(ROWS)]):
                for _ in range(steps):
                    model(input_ids=ids)

        return run

    def swapped(ids: Tensor, steps: int) -> None:
        for row in range(ROWS):
            with bank.rows([str(row)]):
                for _ in range(steps):
                    model(input_ids=ids[row : row + 1])

    return {"1": mixed(1), "8": mixed(8), "64": mixed(ROWS), "swapped": swapped, "alone": plainly(one)}


def plainly(model: nn.Module) -> Run:
    """Compute a model as it is."""

    def run(ids: Tensor, steps: int) -> None:
        for _ in range(steps):
            model(input_ids=ids)

    return run


def mixed_by_peft(model: nn.Module) -> Run:
    """Compute PEFT's batch of 64 adapters."""

    def run(ids: Tensor, steps: int) -> None:
        for _ in range(steps):
            model(input_ids=ids, adapter_names=[str(row) for row in range(ROWS)])

    return run


def ratios(runs: dict[str, Run], length: int, turns: int) -> dict[str, float]:
    """Processor time of each in units of the base model's; a turn before the first one is not counted."""
    ids = torch.randint(5, 2000, (ROWS, length), generator=torch.Generator().manual_seed(0))
    steps = WRITTEN if length == 1 else 1
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns + 1):
        for name, run in runs.items():
            started = time.process_time()
            run(ids, steps)
            times[name].append(time.process_time() - started)
    return {
        name: statistics.median(t / base for t, base in zip(own[1:], times["base"][1:], strict=True))
        for name, own in times.items()
    }


def memory_of_a_thousand() -> dict[str, float]:
    """Bytes of a thousand adapters of 12 layers of a BERT-base at full rank, beside the base and its factors."""
    base = make_model("base", 64, torch.float32, "cpu", layers=12).eval()
    bank, _ = filled_bank(base, METHODS["mirror"], 1)
    gc.collect()
    before = psutil.Process().memory_info().rss
    fill(bank, 1001)
    gc.collect()
    found = psutil.Process().memory_info().rss - before
    trained = sum(t.numel() for key, t in bank._entry("0").tensors.items() if key.startswith(("core.", "param.")))
    return {"process": found, "tensors": 1000 * bank.adapter_nbytes("1"), "trained": 4000 * trained,
            "factors": bank.shared_nbytes()}  # fmt: skip


def measure(lengths: Sequence[int], layers: int, turns: int, *, with_memory: bool) -> dict[str, Any]:
    """Everything."""
    memory = memory_of_a_thousand() if with_memory else None
    base = make_model("base", max(64, *lengths), torch.float32, "cpu", layers=layers).eval()
    from_peft = peft_model(base, ROWS)
    found: dict[str, Any] = {}
    with torch.no_grad():
        for name, spec in METHODS.items():
            runs = {"base": plainly(base), "peft": mixed_by_peft(from_peft), **contestants(base, spec)}
            found[name] = {str(length): ratios(runs, length, turns) for length in lengths}
            gc.collect()
    return {"ratios": found, "memory": memory, "rows": ROWS, "layers": layers, "turns": turns}


def table(found: dict[str, Any]) -> str:
    """The results in Markdown."""
    names = ("alone", "1", "8", "64", "swapped", "peft")
    lines = [f"| method, length | {' | '.join(names)} | 64 / 1 | peft / 64 |", "|" + "---|" * (len(names) + 3)]
    for method, by_length in found["ratios"].items():
        for length, own in by_length.items():
            cells = [f"{own[name]:.2f}" for name in names]
            cells += [f"{own['64'] / own['1']:.2f}", f"{own['peft'] / own['64']:.2f}"]
            lines.append(f"| `{method}`, {length} | {' | '.join(cells)} |")
    if found["memory"]:
        memory = {name: f"{value / 1e9:.3f} GB" for name, value in found["memory"].items()}
        said = (
            "1,000 adapters of a BERT-base at full rank: the process grows by {process}, tensors take {tensors}, of "
            "which trained parameters {trained}; the shared factors take {factors}."
        )
        lines += ["", said.format(**memory)]
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines += ["", f"CPU time of {found['rows']} rows relative to the base model, {found['layers']} layers of a "
              f"BERT-base, median of {found['turns']} repetitions. {hardware('cpu')}; {made}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--no-memory", action="store_true")
    return parser.parse_args(words)


def main() -> None:
    """Measure, write, print."""
    options = parse()
    found = measure(options.lengths, options.layers, options.turns, with_memory=not options.no_memory)
    write_and_print(options.output, found, table(found))


if __name__ == "__main__":
    main()
