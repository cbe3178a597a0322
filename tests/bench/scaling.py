# SPDX-License-Identifier: Apache-2.0
"""On paper: memory and traffic of fine-tuning a 70B base on 1 to 64 GPUs, from bytes counted without numbers.

    python -m tests.bench.scaling -o tests/bench/results/scaling-70b [--length 2048]

The shapes of a 70B Llama (80 blocks of 8,192 x 28,672, 64 heads, 8 of them for keys and values) in bfloat16. One
training step of 2 and of 4 blocks is rehearsed (``mirrortune/rehearsal.py``: every tensor counted, none computed); what
two more blocks take is a block's share, and 80 of them the model's. Nothing here is a time: those of compute and
network need GPUs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from mirrortune.adapters.spec import AdapterSpec
from mirrortune.runs.size import Load, footprint, make_plan
from tests.bench.output import command_line, write_and_print

BLOCKS, GIB = 80, 2**30
SIZES = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
GPUS = (1, 2, 4, 8, 16, 32, 64)
METHODS: dict[str, tuple[str, Any]] = {"mirror": ("mirror", 128), "lora": ("lora", 8)}


def counted(blocks: int, spec: AdapterSpec, length: int) -> dict[str, float]:
    """Bytes of a step of a model of so many blocks on a row of ``length`` tokens, and its trainable parameters."""
    config = LlamaConfig(**SIZES, num_hidden_layers=blocks, vocab_size=128256, tie_word_embeddings=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    ids = torch.zeros(1, length, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "targets": ids}
    load = Load(
        batch=batch,
        scored=batch,
        loss=lambda inputs, outputs, targets: (
            torch.nn.functional.cross_entropy(outputs.logits[0].float(), targets[0], reduction="sum"),
            1,
        ),
        dtype=torch.bfloat16,
        is_16bit_compute=False,
        device="cpu",
    )
    found = footprint(model, spec, load)
    assert found.is_counted, "a guess is no count"
    trained = make_plan(model, spec).trainable_parameters
    return {**found.parts(), "trained": trained}


def on_gpus(found: dict[str, Any], count: int) -> dict[str, float]:
    """Bytes that each of ``count`` GPUs holds and receives in a step of one row a GPU under FSDP2.

    Held: its share of everything that is stored, the activations of its own row, and two blocks that are gathered
    (one in use, one on its way). Received: weights and factors twice (forward, backward), gradients once.
    """
    stored = sum(found[key] for key in ("weights", "factors", "gradients", "optimizer"))
    gathered = 2 * (found["block"]["weights"] + found["block"]["factors"]) if count > 1 else 0
    others = (count - 1) / count
    return {
        "held": stored / count + found["activations"] + gathered,
        "received": others * (2 * (found["weights"] + found["factors"]) + found["gradients"]),
        "received_ddp": 2 * others * found["gradients"],
    }


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    names = list(METHODS)
    shown = {"mirror": "mirror of rank 128", "lora": "PEFT's LoRA r=8"}
    lines = ["| 70B, bfloat16 | " + " | ".join(shown[n] for n in names) + " |", "|---|---|---|"]
    rows = {
        "weights, GiB": lambda f: f"{f['weights'] / GIB:.1f}",
        "factors, or A and B, GiB": lambda f: f"{f['factors'] / GIB:.2f}",
        "trainable parameters": lambda f: f"{f['trained']:,.0f}",
        "gradients and optimizer, MiB": lambda f: f"{(f['gradients'] + f['optimizer']) / 2**20:,.1f}",
        "activations per token, KiB": lambda f: f"{f['activations'] / results['length'] / 1024:,.0f}",
        "matrix products per token, GFLOP": lambda f: f"{f['flops'] / 1e9:.0f}",
    }
    lines += [f"| {name} | " + " | ".join(of(results[n]) for n in names) + " |" for name, of in rows.items()]
    lines += [
        "",
        "| GPUs | " + " | ".join(f"{shown[n]}: held | received per step" for n in names) + " |",
        "|---|" + "---|" * 4,
    ]
    for count in GPUS:
        parts = [on_gpus(results[n], count) for n in names]
        cells = [f"{p['held'] / GIB:,.0f} GiB | {p['received'] / GIB:,.0f} GiB" for p in parts]
        lines.append(f"| {count} | " + " | ".join(cells) + " |")
    ddp = {n: on_gpus(results[n], 64)["received_ddp"] / 2**20 for n in names}
    lines += [
        "",
        f"FSDP2, one row of {results['length']:,} tokens per GPU, without activation checkpointing; memory held and "
        "data received by each GPU. Where a copy of the base fits on every GPU, "
        f"DDP receives {ddp['mirror']:.1f} MiB per step ({ddp['lora']:,.0f} for LoRA).",
        "Calculated without a GPU, by simulating 2 and 4 of the 80 blocks; it says nothing about time.",
    ]
    return "\n".join(lines) + "\n"


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--length", type=int, default=2048)
    return parser.parse_args(words)


def main() -> None:
    """Count, print, write."""
    options = parse()
    results: dict[str, Any] = {"length": options.length}
    for name, (method, rank) in METHODS.items():
        spec = AdapterSpec(method=method, rank=rank)
        two, four = (counted(blocks, spec, options.length) for blocks in (2, 4))
        block = {key: (four[key] - two[key]) / 2 for key in two}
        found = {key: two[key] + (BLOCKS - 2) * block[key] for key in two}
        # Two operations a number: frozen ones forward and for the input's gradient, LoRA's for their own too.
        frozen = (found["weights"] + (found["factors"] if name == "mirror" else 0)) / 2
        found["flops"] = 4 * frozen + (6 * found["trained"] if name == "lora" else 0)
        results[name] = found | {"block": block}
    write_and_print(options.output, results, table(results))


if __name__ == "__main__":
    main()
