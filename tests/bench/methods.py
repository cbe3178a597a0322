# SPDX-License-Identifier: Apache-2.0
"""What a training step costs by method: ours beside the tuners of PEFT, a frozen backbone and a full fine-tune.

    python -m tests.bench.methods -o tests/bench/results/methods-cpu [--size base] [--batch 8] [--length 128]
    python -m tests.bench.methods -o FOLDER --device cuda --dtype bfloat16 --size 1b --length 2048

One model of random weights, the same linear layers, the same batch. Steps of all methods are taken in turns and each is
divided by the step of ``lora`` in its turn, so that a machine that is busy, or grows warm, slows all of them alike; the
table has the medians. Saved activations are what autograd keeps between forward and backward, without parameters. Peak
memory is of a process of its own for each method (of the GPU's allocator, if there is one). The results, with hardware
and versions, are written as results.json and table.md.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mirrortune.adapter_file import write_adapter
from mirrortune.adapters.factorize import Factors, factorize
from mirrortune.adapters.inject import attachment
from mirrortune.adapters.presets import preset
from mirrortune.adapters.spec import AdapterSpec
from mirrortune.adapting import adapt
from mirrortune.optim import build_optimizer
from tests.bench.output import write_and_print

# (method, rank); the rank of PEFT's is the one of the comparison, or the tuner's default.
METHODS: dict[str, tuple[str, Any]] = {
    "lora r=8": ("lora", 8), "mirror": ("mirror", "full"), "mirror r=64": ("mirror", 64), "psoft": ("psoft", None),
    "speclora": ("speclora", None), "lora-xs": ("lora-xs", None), "none": ("none", None), "frozen": ("none", None),
    "dora r=8": ("dora", 8),
    "psoft-peft": ("psoft-peft", None), "oft": ("oft", None), "boft": ("boft", None), "hra r=8": ("hra", 8),
    "road": ("road", None), "full": ("full", None),
}  # fmt: skip
REFERENCE = "lora r=8"
# A head alone, and the gradient of the embeddings' output: what any adapter of all layers costs at the least.
FROZEN = "frozen"
# hidden size, intermediate size, attention heads, layers. Fewer layers than the models have: a ratio does not see them.
SIZES = {"mini": (384, 1536, 12, 6), "base": (768, 3072, 12, 4), "1b": (2048, 8192, 32, 4), "8b": (4096, 14336, 32, 2)}


def make_model(size: str, length: int, dtype: torch.dtype, device: str) -> nn.Module:
    """A classifier: BERT's encoder for the sizes of encoders, Llama's blocks for the large ones."""
    from transformers import AutoModelForSequenceClassification, BertConfig, LlamaConfig

    hidden, inner, heads, layers = SIZES[size]
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads, "pad_token_id": 0,
             "num_hidden_layers": layers, "max_position_embeddings": length, "vocab_size": 2048}  # fmt: skip
    large = LlamaConfig(**sizes, num_key_value_heads=8)
    config = BertConfig(**sizes, hidden_dropout_prob=0.0) if size in ("mini", "base") else large
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config).to(device=device, dtype=dtype)


@dataclass
class Contestant:
    """One adapted model and its optimizer.

    Attributes:
        model: adapted.
        optimizer: of what it trains.
        trained: numbers, without the head.
        adapter_bytes: of its files, or 0 where it has none.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    trained: int
    adapter_bytes: int

    def step(self, batch: dict[str, Tensor]) -> None:
        """Forward, backward, update."""
        self.model(**batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def contestant(base: nn.Module, name: str, factors: Callable[..., Factors]) -> Contestant:
    """A copy of ``base``, adapted."""
    method, rank = METHODS[name]
    model = copy.deepcopy(base)
    spec = AdapterSpec(method=method, rank=rank)
    head = {n for n, _ in model.named_parameters() if n.split(".")[0] in ("classifier", "score")}
    book = adapt(model, spec, factor_source=factors, new_parameters=head)
    if name == FROZEN:
        model.enable_input_require_grads()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # a tuner's own too: each would draw its numbers
    trained = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and n not in head)
    return Contestant(
        model, build_optimizer(model, lr=1e-4, head_lr=1e-4, weight_decay=0.0), trained, adapter_bytes(model, book)
    )


def adapter_bytes(model: nn.Module, book: Any) -> int:
    """Size of the adapter as it is saved."""
    if not preset(attachment(model).spec.method).is_adapter:
        return 0
    with tempfile.TemporaryDirectory() as place:
        write_adapter(Path(place), model, book.entries, base={"name": "random"}, task=None, extra={})
        return sum(path.stat().st_size for path in Path(place).rglob("*") if path.is_file())


def saved_bytes(made: Contestant, batch: dict[str, Tensor]) -> int:
    """What autograd keeps of one forward pass: every storage once, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in [*made.model.parameters(), *made.model.buffers()]}
    parameters |= {t.untyped_storage().data_ptr() for t in batch.values()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = made.model(**batch).loss
    found = sum(size for size, _ in kept.values())
    del loss
    return found


def factor_source(
    base: nn.Module, clock: Callable[[], float] = time.perf_counter
) -> tuple[Callable[..., Factors], float]:
    """Factors of every linear layer of ``base``, from memory, and the seconds that they took."""
    weights = {n: m.weight for n, m in base.named_modules() if isinstance(m, nn.Linear)}
    held: dict[str, Factors] = {}
    started = clock()
    for name, weight in weights.items():
        if min(weight.shape) > 2:
            held[name] = factorize(weight, "full", name=name)
    _wait()
    seconds = clock() - started

    def of(name: str, weight: Tensor, rank: int) -> Factors:
        found = held[name] if name in held else factorize(weight, "full")
        return Factors(U=found.U[:, :rank], S=found.S[:rank], Vh=found.Vh[:rank])

    return of, seconds


def merge_seconds(made: Contestant, clock: Callable[[], float]) -> float | None:
    """How long the changed weights of all layers take to compute; None for what has none."""
    layers = attachment(made.model).layers
    if not layers:
        return None
    started = clock()
    for layer in layers.values():
        before = {k: p.detach() for k, p in layer.base_layer.named_parameters()}
        before["weight"] = layer.base_layer.weight.detach()
        layer.merged(before)
    _wait()
    return clock() - started


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything but peak memory."""
    base, batch = make_all(options)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    factors, seconds = factor_source(base, clock)
    made = {name: contestant(base, name, factors) for name in options.methods}
    found: dict[str, dict[str, Any]] = {
        name: {"trained": one.trained, "adapter_bytes": one.adapter_bytes, "saved_bytes": saved_bytes(one, batch)}
        for name, one in made.items()
    }
    times: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(options.warmup + options.steps):
        for name, one in made.items():
            _wait()
            started = clock()
            one.step(batch)
            _wait()
            if turn >= options.warmup:
                times[name].append(clock() - started)
    for name, own in times.items():
        turns = zip(own, times[REFERENCE], strict=True)
        found[name] |= {
            "step_seconds": statistics.median(own),
            "step_ratio": statistics.median(a / b for a, b in turns),
            "merge_seconds": merge_seconds(made[name], clock),
        }
    num_weights = sum(isinstance(m, nn.Linear) and min(m.weight.shape) > 2 for m in base.modules())
    return {"methods": found, "factorise_seconds": seconds, "matrices": num_weights}


def make_all(options: argparse.Namespace) -> tuple[nn.Module, dict[str, Tensor]]:
    """The base model and the batch."""
    dtype = getattr(torch, options.dtype)
    base = make_model(options.size, options.length, dtype, options.device)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 2048, (options.batch, options.length), generator=generator)
    labels = torch.randint(0, 2, (options.batch,), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return base, {name: tensor.to(options.device) for name, tensor in batch.items()}


def peak_of_one(options: argparse.Namespace) -> None:
    """Two steps of one method; prints the most memory that this process, or its GPU, has held in them, in bytes."""
    base, batch = make_all(options)
    factors, _ = factor_source(base) if METHODS[options.peak][0] in ("mirror", "psoft", "speclora", "lora-xs") else (
        factorize, 0.0)  # fmt: skip
    made = contestant(base, options.peak, factors)
    del base, factors
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far
    for _ in range(2):
        made.step(batch)
    status = Path("/proc/self/status").read_text(encoding="ascii") if options.device == "cpu" else ""
    peak = next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), None)
    print(torch.cuda.max_memory_allocated() if peak is None else peak)  # noqa: T201


def peaks(options: argparse.Namespace) -> dict[str, int]:
    """Peak memory of every method, each in a process of its own."""
    words = ["--device", options.device, "--dtype", options.dtype, "--size", options.size]
    words += ["--batch", str(options.batch), "--length", str(options.length)]
    command = [sys.executable, "-m", "tests.bench.methods", *words, "--peak"]
    return {
        name: int(subprocess.run([*command, name], check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])
        for name in options.methods
    }


def table(found: dict[str, Any]) -> str:
    """The results in Markdown; step, activations and memory in units of the reference's."""
    methods = found["methods"]
    reference = methods[REFERENCE]

    def ratio(row: dict[str, Any], key: str) -> str:
        return f"{row[key] / reference[key]:.2f}" if key in row else ""

    lines = [
        "| method | trained | adapter | step | of frozen | saved activations | peak memory | merge |",
        "|" + "---|" * 8,
    ]
    for name, row in methods.items():
        size = f"{row['adapter_bytes'] / 1000:,.0f} kB" if row["adapter_bytes"] else ""
        merge = f"{row['merge_seconds']:.2f} s" if row["merge_seconds"] is not None else ""
        least = methods.get(FROZEN)
        of_frozen = f"{row['step_ratio'] / least['step_ratio']:.2f}" if least else ""
        cells = (f"{row['trained']:,}", size, f"{row['step_ratio']:.2f}", of_frozen, ratio(row, "saved_bytes"),
                 ratio(row, "peak_bytes"), merge)  # fmt: skip
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Step, activations and memory in units of {REFERENCE}: {reference['step_seconds']:.3f} s a step "
        f"({found['clock']} clock), {reference['saved_bytes'] / 1e6:,.0f} MB saved"
        + (f", {reference['peak_bytes'] / 1e6:,.0f} MB at the peak." if "peak_bytes" in reference else "."),
        f"{found['matrices']} matrices factorised in {found['factorise_seconds']:.1f} s. {found['setting']}",
        f"{found['hardware']}; {', '.join(f'{k} {v}' for k, v in found['versions'].items())}.",
    ]
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a machine that others use too"
    )
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--no-peaks", action="store_true", help="leave out the processes that measure memory")
    parser.add_argument("--peak", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.methods = list(dict.fromkeys([REFERENCE, *options.methods]))
    return options


def hardware(device: str) -> str:
    """The device by name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def main() -> None:
    """Measure, write, print."""
    options = parse()
    if options.peak:
        peak_of_one(options)
        return
    found = measure(options)
    if not options.no_peaks:
        for name, peak in peaks(options).items():
            found["methods"][name]["peak_bytes"] = peak
    hidden, inner, _, layers = SIZES[options.size]
    found |= {
        "setting": f"{layers} layers of {hidden} x {inner}, {options.batch} x {options.length} tokens, "
        f"{options.dtype}.",
        "clock": options.clock,
        "hardware": hardware(options.device),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft")},
    }
    write_and_print(options.output, found, table(found))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
