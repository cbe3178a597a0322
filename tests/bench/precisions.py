# SPDX-License-Identifier: Apache-2.0
"""What to run first on a new kind of device: training in each precision beside PEFT's LoRA, and what depends on it.

    python -m tests.bench.precisions FOLDER -o tests/bench/results/precisions-cuda --device cuda
    python -m tests.bench.precisions FOLDER --size mini --layers 2 --length 64 --steps 4          on a CPU

It says what a step takes in time and memory, whether 16 bits learn what float32 learns, and which commands fail, with
the last line that they say; the others go on. Nothing is downloaded: weights are random (a BERT of ``--size``; a tiny
language model for the commands that write text), and rows are movie sentences, a token for nearly every letter. Each
command is a process of its own. Results are written after each of them, so that a run that is cut leaves what it has.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.bench.contestants import SIZES, environment, hardware, versions
from tests.bench.output import command_line, write_and_print
from tests.tiny_models import tiny_tokenizer, write_tiny_causal

ROOT = Path(__file__).parents[2]
SENTENCES = ROOT / "recipes" / "data" / "movie-sentences"
METHODS = {
    "lora r=8": ("--method", "lora", "--rank", "8"),
    "mirror-scale": ("--method", "mirror-scale"),
    "mirror-scale r=64": ("--method", "mirror-scale", "--rank", "64"),
}
REFERENCE = "lora r=8"
PRECISIONS = ("bf16", "fp16", "fp32")
TEXT = ("train", "-m", "llama", "-t", "causal-lm", "-d", "prompts.jsonl", "--max-steps", "4", "-q")
_COSTS = ("median_step_seconds", "peak_memory_bytes", "peak_reserved_bytes", "tokens_per_second", "skipped_steps")


def write_model(folder: Path, options: argparse.Namespace) -> None:
    """Write a BERT of random weights and its tokenizer."""
    from transformers import BertConfig, BertModel

    hidden, inner, heads, layers = SIZES[options.size]
    torch.manual_seed(0)
    BertModel(BertConfig(
        hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads, vocab_size=128,
        num_hidden_layers=options.layers or layers, max_position_embeddings=options.length,
    )).save_pretrained(folder)  # fmt: skip
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = options.length
    tokenizer.save_pretrained(folder)


def write_prompts(path: Path) -> None:
    """Write rows to learn to write text from."""
    rows = [{"prompt": f"the film was {word}", "completion": "good fun"} for word in ("good", "bad", "fun", "dull") * 6]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def training(options: argparse.Namespace, *words: str) -> list[str]:
    """The words of a training of the classifier."""
    half = max(1, options.steps // 2)
    return [
        "train", "-m", "model", "-t", "text-classification", "-d", str(SENTENCES), "-q", "--seed", "0",
        "--max-steps", str(options.steps), "--batch-size", str(options.batch), "--max-length", str(options.length),
        f"train.save_every_steps={half}", "train.eval_every_steps=100000", "eval.max_rows=128", "eval.before=false",
        f"data.max_train_rows={min(8000, options.batch * options.steps)}", *words,
    ]  # fmt: skip


def commands(options: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """Yield what is run, by name, in its order: the words after ``mirrortune``."""
    for precision in PRECISIONS:
        for method, words in METHODS.items():
            name = f"{method}, {precision}"
            yield name, training(options, "-o", slug(name), "--precision", precision, *words)
    yield "doctor", ["doctor"]
    for precision in ("bf16", "fp16"):
        for name, words in afterwards(options, precision):
            yield f"{name}, {precision}", [*words, "--precision", precision] if words[0] != "merge" else words
    yield "adaptive pairs", training(options, "-o", "adaptive", "--method", "adaptive")
    yield "lora-sb", training(options, "-o", "lora-sb", "--method", "lora-sb")
    if importlib.util.find_spec("bitsandbytes") is not None:
        for load_in in ("8bit", "4bit"):
            yield load_in, [*TEXT, "-o", load_in, "--load-in", load_in]
            yield f"eval, {load_in}", ["eval", load_in, "-q"]
    if options.device == "cuda" and torch.cuda.device_count() > 1:
        for profile in ("ddp", "fsdp2"):
            yield profile, training(options, "-o", profile, "--accelerate-config", profile)
    if options.device == "cuda" and not options.no_compile:
        yield "compile", training(options, "-o", "compile", "--compile")


def afterwards(options: argparse.Namespace, precision: str) -> Iterator[tuple[str, list[str]]]:
    """Yield what is done with a trained run and with a language model, by name."""
    run, merged, text = slug(f"mirror-scale, {precision}"), f"merged-{precision}", f"text-{precision}"
    yield "eval", ["eval", run, "--split", "validation", "-q"]
    yield "predict", ["predict", run, "--text", "a very good film"]
    yield "merge", ["merge", run, "-o", merged, "-q"]
    yield "eval of the merged model", ["eval", merged, "-t", "text-classification", "-d", str(SENTENCES), "-q"]
    yield "text", [*TEXT, "-o", text]
    yield "predict of text", ["predict", text, "--text", "the film was good"]
    yield "resume", training(options, "-o", run, "--resume", *METHODS["mirror-scale"])  # last, since it changes the run


def slug(name: str) -> str:
    """The folder of a run."""
    return name.replace(", ", "-").replace(" ", "-").replace("=", "")


def prepare(name: str, folder: Path) -> None:
    """Take back the second half of the run that is to be resumed."""
    if name.startswith("resume"):
        run = folder / slug(name.replace("resume", "mirror-scale"))
        shutil.rmtree(max((run / "checkpoints").glob("[!.]*"), key=lambda path: path.name))
        shutil.rmtree(run / "adapter")


def run(name: str, words: list[str], folder: Path, env: dict[str, str]) -> dict[str, Any]:
    """Run a command; return what it took and, for a training, what it found."""
    started = time.perf_counter()
    try:
        prepare(name, folder)
    except (OSError, ValueError) as error:  # the run is not there, because it failed
        return {"words": words, "code": -1, "seconds": 0.0, "said": f"{type(error).__name__}: {error}"}
    command = [sys.executable, "-m", "mirrortune", *words]
    done = subprocess.run(command, check=False, cwd=folder, env=env, capture_output=True, text=True)
    found: dict[str, Any] = {"words": words, "code": done.returncode, "seconds": time.perf_counter() - started}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [""]
        return {**found, "said": lines[-1], "stderr": done.stderr[-4000:]}
    results = folder / words[words.index("-o") + 1] / "results.json" if words[0] == "train" else None
    if results is not None and results.is_file():
        content = json.loads(results.read_text(encoding="utf-8"))
        found |= {"loss": content["metrics"]["loss"], **{key: content.get(key) for key in _COSTS}}
    return found


def table(found: dict[str, Any]) -> str:
    """The results in Markdown."""
    rows = found["commands"]
    lines = ["| method | precision | step | of LoRA's | memory at the peak | of LoRA's | validation loss | skipped |",
             "|" + "---|" * 8]  # fmt: skip
    for precision in PRECISIONS:
        reference = rows.get(f"{REFERENCE}, {precision}", {})
        for method in METHODS:
            own = rows.get(f"{method}, {precision}", {})
            if "loss" not in own:
                lines.append(f"| `{method}` | {precision} | {'failed' if own else 'not run'} |  |  |  |  |  |")
                continue
            step, peak = own["median_step_seconds"], own["peak_memory_bytes"]
            ratios = [f"{own[key] / reference[key]:.2f}" if reference.get(key) else ""
                      for key in ("median_step_seconds", "peak_memory_bytes")]  # fmt: skip
            lines.append(f"| `{method}` | {precision} | {1000 * step:.1f} ms | {ratios[0]} | {peak / 2**20:,.0f} MiB | "
                         f"{ratios[1]} | {own['loss']:.4f} | {own['skipped_steps']} |")  # fmt: skip
    lines += ["", "| command | seconds | outcome |", "|---|---|---|"]
    for name, own in rows.items():
        outcome = "ok" if own["code"] == 0 else f"**exit code {own['code']}**: {own['said'][:300]}"
        lines.append(f"| {name} | {own['seconds']:.0f} | {outcome} |")
    lines += ["", f"{found['setting']} {found['hardware']}; "
              f"{', '.join(f'{name} {version}' for name, version in found['versions'].items())}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__, has_folder=True, output="FOLDER by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes a minute")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="commands whose names begin so")
    return parser.parse_args(words)


def main() -> int:
    """Run everything, write after each command, and print."""
    options = parse()
    folder: Path = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "model", options)
    write_tiny_causal(folder / "llama")
    write_prompts(folder / "prompts.jsonl")
    env = environment(folder / "cache", options.device)
    width = SIZES[options.size][0]
    setting = f"{options.layers} layers of {width}, {options.batch} rows of up to {options.length} tokens."
    found: dict[str, Any] = {"commands": {}, "setting": setting, "hardware": hardware(options.device),
                             "versions": versions()}  # fmt: skip
    output = options.output or folder
    output.mkdir(parents=True, exist_ok=True)
    for name, words in commands(options):
        if options.only and not name.startswith(tuple(options.only)):
            continue
        found["commands"][name] = own = run(name, words, folder, env)
        print(f"{name}: {own}", file=sys.stderr, flush=True)  # noqa: T201
        (output / "results.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        (output / "table.md").write_text(table(found), encoding="utf-8")
    write_and_print(output, found, table(found))
    return int(any(own["code"] for own in found["commands"].values()))


if __name__ == "__main__":
    sys.exit(main())
