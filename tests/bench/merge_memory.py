# SPDX-License-Identifier: Apache-2.0
"""How much memory a merge takes: a synthetic sharded Llama of some gigabytes, and the peak of a process that merges it.

    python -m tests.bench.merge_memory FOLDER [--gigabytes 3]

FOLDER holds the base, the adapter (rank 16, portable) and the merged model, twice the size in all; it is made where it
is missing. The merging process is one of its own; its peak resident memory and its time are printed.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mirrortune
from mirrortune.adapters.inject import spectral_layers
from mirrortune.lazy_model import outline
from mirrortune.merge_contents import aliases
from mirrortune.model import find_model
from mirrortune.shards import PlannedTensor, shard_like, write_shards
from tests.spectral import train_a_little
from tests.tiny_models import tiny_chat_tokenizer

_WIDTH, _INSIDE, _VOCABULARY, _SHARD_BYTES = 2048, 5632, 8192, 500_000_000


def write_base(folder: Path, gigabytes: float) -> None:
    """Random float32 weights, made and written one at a time."""
    per_layer = 4 * (2 * _WIDTH * _WIDTH + 2 * _WIDTH * _WIDTH // 4 + 3 * _WIDTH * _INSIDE)
    layers = max(1, round((gigabytes * 1e9 - 8 * _VOCABULARY * _WIDTH) / per_layer))
    config = LlamaConfig(vocab_size=_VOCABULARY, hidden_size=_WIDTH, intermediate_size=_INSIDE, dtype="float32",
                         num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=8,
                         max_position_embeddings=512, architectures=["LlamaForCausalLM"])  # fmt: skip
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    tiny_chat_tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in LlamaForCausalLM(config).named_parameters()}
    plan = [PlannedTensor(name=name, code="F32", shape=shape) for name, shape in shapes.items()]
    seeds = {name: seed for seed, name in enumerate(shapes)}

    def make(tensor: PlannedTensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seeds[tensor.name])
        noise = torch.randn(tensor.shape, generator=generator)
        return noise / tensor.shape[-1] ** 0.5 if noise.ndim > 1 else torch.ones(tensor.shape)

    write_shards(folder, shard_like(plan, [], _SHARD_BYTES), make)


def write_adapter(base: Path, folder: Path) -> None:
    """A trained adapter of some layers: rank 16, portable, so that nothing has to be factorised to merge it."""
    model = LlamaForCausalLM.from_pretrained(base)
    mirrortune.attach(model, rank=16, target_modules=r"layers\.0\.self_attn\.[kv]_proj")
    for index, layer in enumerate(spectral_layers(model).values()):
        train_a_little(layer.core, index)
    mirrortune.save_adapter(model, folder)


def main() -> None:
    """Make what is missing, merge, and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    given = parser.parse_args()
    base, adapter, merged = (given.folder / name for name in ("base", "adapter", "merged"))
    if not base.is_dir():
        write_base(base, given.gigabytes)
    if not adapter.is_dir():
        write_adapter(base, adapter)
    assert "lm_head.weight" in aliases(outline(find_model(str(base)), "LlamaForCausalLM", {}, None))
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    command = [sys.executable, "-m", "mirrortune", "merge", str(adapter), "-o", str(merged), "--overwrite", "--json"]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    sys.stdout.write(done.stdout + done.stderr)
    found = {"checkpoint_gigabytes": size / 1e9, "files": len(list(merged.glob("*.safetensors"))),
             "peak_gigabytes": peak / 1e9, "seconds": round(seconds, 1)}  # fmt: skip
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
