# SPDX-License-Identifier: Apache-2.0
"""What a training step costs by method: ours beside the tuners of PEFT, a frozen backbone and a full fine-tune.

    python -m tests.bench.methods -o tests/bench/results/methods-cpu [--size base] [--batch 8] [--length 128]
    python -m tests.bench.methods -o FOLDER --device cuda --dtype bfloat16 --size 1b --length 2048 --factors any

One model of random weights, the same linear layers, the same batch. Steps of all methods are taken in turns, each turn
in an order of its own, and each is divided by the step of ``lora`` in its turn, so that a machine that is busy, or
grows warm, slows all of them alike; the table has the medians. Saved activations are what autograd keeps between
forward and backward, without parameters. Peak memory is of a process of its own for each method (of the GPU's
allocator, if there is one). The results, with hardware and versions, are written as results.json and table.md.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from mirrortune.adapters.inject import attachment
from mirrortune.merging.in_memory import adapted_tensors
from tests.bench.contestants import (
    FROZEN,
    METHODS,
    REFERENCE,
    Contestant,
    any_factors,
    contestant,
    factor_source,
    hardware,
    make_batch,
    saved_bytes,
    versions,
    wait,
)  # fmt: skip
from tests.bench.output import command_line, write_and_print
from tests.bench.peak import add_options, base_model, peaks, setting

_SLOW = 5
"""Steps of the reference that a step may take to be repeated: BOFT's and HRA's take ten and more on a CPU."""


def merge_seconds(made: Contestant, base: nn.Module, clock: Callable[[], float]) -> float | None:
    """How long the changed weights of all layers take to compute; None for what has none."""
    if not attachment(made.model).layers:
        return None
    started = clock()
    for _ in adapted_tensors(made.model, base.state_dict()):
        pass
    wait()
    return clock() - started


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything but peak memory."""
    base, batch = base_model(options), make_batch(options.batch, options.length, options.device)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    factors, seconds = factor_source(base, clock) if options.factors == "real" else (any_factors, None)
    tokens = options.batch * options.length
    made: dict[str, Contestant] = {}
    for name in options.methods:
        try:
            made[name] = contestant(base, name, factors, tokens=tokens)
        except Exception as error:  # noqa: BLE001  (a tuner of PEFT's, on a device that it has never run on)
            _leave_out(name, error)
    found: dict[str, dict[str, Any]] = {
        name: {"trained": one.trained, "adapter_bytes": one.adapter_bytes} for name, one in made.items()
    }
    taken = turns(made, batch, options.warmup, options.steps, clock)
    for name, steps in taken.items():
        found[name] |= {
            "turns": len(steps),
            "saved_bytes": saved_bytes(made[name], batch),
            "step_seconds": statistics.median(own for own, _ in steps),
            "step_ratio": statistics.median(own / reference for own, reference in steps),
            "merge_seconds": None if options.no_merges else merge_seconds(made[name], base, clock),
        }
    num_weights = sum(isinstance(m, nn.Linear) and min(m.weight.shape) > 2 for m in base.modules())
    return {"methods": found, "factorise_seconds": seconds, "matrices": num_weights}


def turns(
    made: dict[str, Contestant], batch: dict[str, Tensor], warmup: int, steps: int, clock: Callable[[], float]
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each step of each contestant, and of the reference's step in the same turn.

    Their order is another in every turn: who comes after a method that touched gigabytes pays for it. What takes
    :data:`_SLOW` times the reference's in the first turn takes one more, and that one counts. What runs out of memory,
    or has no kernel on the device, is left out.
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in (REFERENCE, *made)}
    running, slow = list(taken), set[str]()
    for turn in range(warmup + steps):
        own: dict[str, float] = {}
        for name in random.Random(turn).sample(running, len(running)):
            wait()
            started = clock()
            try:
                made[name].step(batch)
                wait()
            except RuntimeError as error:
                _leave_out(name, error)
                made[name].optimizer.zero_grad()
                del taken[name]
                continue
            own[name] = clock() - started
        for name, seconds in own.items():
            if turn >= warmup or name in slow:
                taken[name].append((seconds, own[REFERENCE]))
        running = [name for name in own if name not in slow]
        slow = {name for name in own if turn == 0 and own[name] > _SLOW * own[REFERENCE]}
    return taken


def _leave_out(name: str, error: Exception) -> None:
    """Say why a method is left out; without the reference, nothing can be compared."""
    if name == REFERENCE:
        raise error
    print(f"{name} is left out: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr, flush=True)  # noqa: T201


def table(found: dict[str, Any]) -> str:
    """The results in Markdown; step, activations and memory in units of the reference's."""
    methods = found["methods"]
    reference = methods[REFERENCE]

    def ratio(row: dict[str, Any], key: str) -> str:
        return f"{row[key] / reference[key]:.2f}" if row.get(key) and reference.get(key) else ""

    lines = [
        "| method | trainable parameters | adapter | step | step / frozen | saved activations | peak memory | merge |",
        "|" + "---|" * 8,
    ]
    for name, row in methods.items():
        size = f"{row['adapter_bytes'] / 1000:,.0f} kB" if row["adapter_bytes"] else ""
        merge = f"{row['merge_seconds']:.2f} s" if row.get("merge_seconds") is not None else ""
        least = methods.get(FROZEN)
        has_stepped = "step_ratio" in row
        of_frozen = f"{row['step_ratio'] / least['step_ratio']:.2f}" if least and has_stepped else ""
        step = f"{row['step_ratio']:.2f}" if has_stepped else "failed"
        cells = (f"{row['trained']:,}", size, step, of_frozen, ratio(row, "saved_bytes"), ratio(row, "peak_bytes"),
                 merge)  # fmt: skip
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Step, activations and memory relative to {REFERENCE}: {reference['step_seconds']:.3f} s per step "
        f"({found['clock']} clock), {reference['saved_bytes'] / 1e6:,.0f} MB saved"
        + (f", {reference['peak_bytes'] / 1e6:,.0f} MB at the peak." if reference.get("peak_bytes") else "."),
        (
            f"{found['matrices']} matrices factorised in {found['factorise_seconds']:.1f} s. "
            if found["factorise_seconds"] is not None
            else ""
        )
        + found["setting"],
        f"{found['hardware']}; {', '.join(f'{k} {v}' for k, v in found['versions'].items())}.",
    ]
    return "\n".join(lines) + "\n"


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    add_options(parser)
    parser.set_defaults(factors="real")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a machine that others use too"
    )
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--no-peaks", action="store_true", help="leave out the processes that measure memory")
    parser.add_argument("--no-merges", action="store_true", help="leave out the merges, which are made on the CPU")
    options = parser.parse_args(words)
    options.methods = list(dict.fromkeys([REFERENCE, *options.methods]))
    return options


def main() -> None:
    """Measure, write, print."""
    options = parse()
    found = measure(options)
    if not options.no_peaks:
        for name, peak in peaks(options, [n for n, row in found["methods"].items() if "step_ratio" in row]).items():
            found["methods"][name]["peak_bytes"] = peak
    found |= {"setting": setting(options), "clock": options.clock}
    found |= {"hardware": hardware(options.device), "versions": versions()}
    write_and_print(options.output, found, table(found))


if __name__ == "__main__":
    main()
