# SPDX-License-Identifier: Apache-2.0
"""How much memory it takes to prepare, to train and to merge a large model: a synthetic sharded Llama of some
gigabytes, each command in a process of its own, whose peak resident memory is measured.

    python -m tests.bench.large_models FOLDER [-o OUTPUT] [--gigabytes 2] [--rank full] [--layers 1] [--load-in 4bit]
                                       [--experts 8]

FOLDER holds the base, the factors, a run and the merged model, twice the size in all; the base is made where it is
missing. All seven matrices of the first LAYERS layers are adapted, at full rank unless ``--rank`` says otherwise: their
factors, which training holds besides the weights, are counted by their size in the cache. With ``--experts`` it is a
Mixtral, whose files hold expert by expert what the model stacks.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

from mirrortune.system.tensor_files import PlannedTensor, shard_like, write_shards
from tests.bench.output import command_line, write_and_print
from tests.tiny_models import tiny_chat_tokenizer

_WIDTH, _INSIDE, _VOCABULARY, _SHARD_BYTES = 1024, 2816, 8192, 400_000_000
_LARGEST = 4 * _VOCABULARY * _WIDTH
"""Bytes of the largest matrix, the embedding."""


def write_base(folder: Path, gigabytes: float, experts: int | None) -> None:
    """Random float32 weights, made and written one at a time."""
    per_layer = 4 * (2 * _WIDTH * _WIDTH + 2 * _WIDTH * _WIDTH // 4 + 3 * _WIDTH * _INSIDE * (experts or 1))
    family, own = ("Llama", {}) if experts is None else ("Mixtral", {"num_local_experts": experts})
    config = getattr(transformers, f"{family}Config")(
        vocab_size=_VOCABULARY, hidden_size=_WIDTH, intermediate_size=_INSIDE, dtype="float32",
        num_hidden_layers=max(1, round((gigabytes * 1e9 - 2 * _LARGEST) / per_layer)), num_attention_heads=16,
        num_key_value_heads=4, max_position_embeddings=512, architectures=[f"{family}ForCausalLM"], **own,
    )  # fmt: skip
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    tiny_chat_tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
        shapes = {name: tuple(t.shape) for name, t in revert_weight_conversion(model, model.state_dict()).items()}
    plan = [PlannedTensor(name=name, code="F32", shape=shape) for name, shape in shapes.items()]
    seeds = {name: seed for seed, name in enumerate(shapes)}

    def make(tensor: PlannedTensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seeds[tensor.name])
        noise = torch.randn(tensor.shape, generator=generator)
        return noise / tensor.shape[-1] ** 0.5 if noise.ndim > 1 else torch.ones(tensor.shape)

    write_shards(folder, shard_like(plan, [], _SHARD_BYTES), make)


def write_rows(path: Path) -> None:
    """A few short conversations."""
    turns = [("Which way up?", "This way."), ("And now?", "The other way round.")] * 4
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in turns]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def measured(*words: object, cache: Path) -> dict[str, Any]:
    """Peak resident memory and time of one command, and the object that it prints."""
    started = time.perf_counter()
    environment = {**os.environ, "MIRRORTUNE_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "mirrortune", *map(str, words), "--json"], env=environment, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, words
    return {
        "peak_gigabytes": round(used.ru_maxrss * 1024 / 1e9, 3),
        "seconds": round(time.perf_counter() - started, 1),
        "printed": json.loads(printed),
    }


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__, has_folder=True)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rank", default="full")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--load-in", choices=["4bit", "8bit"])
    parser.add_argument("--experts", type=int)
    return parser.parse_args(words)


def main() -> None:
    """Make what is missing, run the commands, and print."""
    given = parse()
    base, rows, run, merged = (given.folder / name for name in ("base", "rows.jsonl", "run", "merged"))
    if not base.is_dir():
        write_base(base, given.gigabytes, given.experts)
    write_rows(rows)
    cache = given.folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    numbers = "|".join(map(str, range(given.layers)))
    recipe = ["-m", base, "-t", "causal-lm", "-d", rows, "--method", "mirror", "--rank", given.rank,
              "--batch-size", 2, "--max-length", 64, "--target-modules", rf"layers\.({numbers})\..*_proj"]  # fmt: skip
    recipe += ["--load-in", given.load_in] if given.load_in else []
    found: dict[str, Any] = {
        "checkpoint_gigabytes": round(sum(f.stat().st_size for f in base.glob("*.safetensors")) / 1e9, 3),
        "files": len(list(base.glob("*.safetensors"))),
        "largest_matrix_gigabytes": round(_LARGEST / 1e9, 3),
        "rank": given.rank,
        "load_in": given.load_in,
        "experts": given.experts,
        "prepare": measured("prepare", *recipe, cache=cache),
    }
    found["factors_gigabytes"] = round(sum(f.stat().st_size for f in cache.rglob("*.safetensors")) / 1e9, 3)
    found["train"] = measured("train", *recipe, "-o", run, "--overwrite", "--max-steps", 2, cache=cache)
    found["merge"] = measured("merge", run, "-o", merged, "--overwrite", cache=cache)
    found["verification"] = found["merge"].pop("printed")["verification"]
    found["layers"] = found["prepare"].pop("printed")["targets"]
    del found["train"]["printed"]
    rows_of = {name: found[name] for name in ("prepare", "train", "merge")}
    lines = [
        f"A checkpoint of {found['checkpoint_gigabytes']} GB:",
        "",
        "| command | peak memory | time |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {row['peak_gigabytes']} GB | {row['seconds']} s |" for name, row in rows_of.items()]
    write_and_print(given.output, found, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
