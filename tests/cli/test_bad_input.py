# SPDX-License-Identifier: Apache-2.0
"""Everything a user can get wrong: the exit code, what is said about it, and that nothing is lost or left behind."""

from __future__ import annotations

import errno
import gzip
import json
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from tests.cli.console import changed, mirrortune, reviews, write_table

TRAIN = "train -m {model} -t text-classification -d reviews.csv -o run --max-steps 2"


@dataclass(frozen=True)
class Bad:
    """A command line that must be refused.

    Attributes:
        words: what follows ``mirrortune``, or ``TRAIN`` if it starts with ``+``; ``{model}`` is a model's folder.
        code: the exit code.
        says: parts of the message, in any order: where, what was got, what is allowed, what to do.
        files: content of files by name, written beforehand.
        change: what else happens to the folder beforehand; it gets the folder and the model's.
    """

    words: str
    code: int
    says: tuple[str, ...]
    files: dict[str, str | bytes] = field(default_factory=dict)
    change: Callable[[Path, Path], object] | None = None


def rows(*labels: object, text: str = "a film") -> str:
    """A csv file with these labels."""
    return "text,label\n" + "".join(f"{text} {i},{label}\n" for i, label in enumerate(labels))


def data(content: str | bytes, *says: str, name: str = "bad.csv", code: int = 3, words: str = "") -> Bad:
    """A training run on a file that cannot be used."""
    return Bad(f"+ -d {name} {words}", code, (f"{name}", *says), {name: content})


def recipe(content: str | bytes, *says: str) -> Bad:
    """A training run by a recipe that cannot be used."""
    return Bad("train my.yaml", 2, says, {"my.yaml": content})


def setting(words: str, *says: str) -> Bad:
    """A training run with a setting that cannot be used."""
    return Bad(f"+ {words}", 2, says)


def choice(words: str, *says: str) -> Bad:
    """A training run on reviews.csv with a setting that does not fit its rows."""
    return Bad(f"+ {words}", 3, says)


def model(change: Callable[[Path], object], *says: str, code: int = 2) -> Bad:
    """A training run on a copy of the model that something happened to."""

    def copy_and_change(desk: Path, source: Path) -> None:
        shutil.copytree(source, desk / "broken")
        change(desk / "broken")

    return Bad("+ -m broken", code, says, change=copy_and_change)


def edit_config(**fields: object) -> Callable[[Path], object]:
    """Set fields of a model's config.json."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **fields}), encoding="utf-8")

    return change


def cut_weights(folder: Path) -> None:
    """Leave the first half of a model's weights."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def poison_weights(folder: Path) -> None:
    """Put a NaN into a model's weights."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("query.weight"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path, {"format": "pt"})


def remove_tokenizer(folder: Path) -> None:
    """Leave a model without its tokenizer."""
    for path in [*folder.glob("tokenizer*"), *folder.glob("vocab*")]:
        path.unlink()


def parquet(desk: Path, _: Path) -> None:
    """Half of a parquet file."""
    pq.write_table(pa.table({"text": ["a"] * 99, "label": [0, 1, 1] * 33}), desk / "bad.parquet")
    whole = (desk / "bad.parquet").read_bytes()
    (desk / "bad.parquet").write_bytes(whole[: len(whole) // 2])


def folder(**splits: str) -> Callable[[Path, Path], object]:
    """A folder ``parts`` with a csv file for each split."""

    def change(desk: Path, _: Path) -> None:
        (desk / "parts").mkdir()
        for name, content in splits.items():
            (desk / "parts" / f"{name}.csv").write_text(content, encoding="utf-8")

    return change


def fill(name: str) -> Callable[[Path, Path], object]:
    """A folder with a file that somebody else made."""

    def change(desk: Path, _: Path) -> None:
        (desk / name).mkdir()
        (desk / name / "thesis.tex").write_text("years of work", encoding="utf-8")

    return change


def unfinished(desk: Path, _: Path) -> None:
    """A run that was killed before its first checkpoint."""
    (desk / "killed" / "checkpoints").mkdir(parents=True)


def plain_peft(desk: Path, _: Path) -> None:
    """An adapter that PEFT's own save_pretrained wrote."""
    (desk / "peft").mkdir()
    (desk / "peft" / "adapter_config.json").write_text('{"peft_type": "LORA"}', encoding="utf-8")


GOOD = rows(*"ababababab")
BAD: dict[str, Bad] = {
    # The command line.
    "unknown command": Bad("trian", 2, ("No such command 'trian'", "Did you mean 'train'")),
    "unknown flag": setting("--modle x", "No such option: --modle", "--model"),
    "flags of transformers": setting(
        "--per_device_train_batch_size 2 --num-train-epochs=1",
        "--num-train-epochs: no such option. Use --epochs.",
        "--per_device_train_batch_size: no such option. Use --batch-size.",
    ),
    "flag without value": Bad("train --lr", 2, ("'--lr' requires an argument",)),
    "number that is none": setting("--lr abc", "--lr: got 'abc'. Allowed: number."),
    "fraction for a count": setting("--batch-size 1.5", "--batch-size: got 1.5. Allowed: integer."),
    "infinite rate": setting("--lr .inf", "--lr: got inf. Allowed: a finite number."),
    "negative rate": setting("--lr=-1", "--lr: got -1. Allowed: greater than or equal to 0."),
    "absurd rate": setting("--lr 1e40", "--lr: got 1e+40. Allowed: less than 1000"),
    "no rows a batch": setting("--batch-size 0", "--batch-size: got 0. Allowed: greater than 0."),
    "no epochs": setting("--epochs 0", "--epochs: got 0. Allowed: greater than 0."),
    "negative seed": setting("--seed=-1", "--seed: got -1. Allowed: greater than or equal to 0."),
    "unknown precision": setting("--precision fp8", "--precision: got 'fp8'. Did you mean 'fp32'?", "'auto', 'fp32'"),
    "two recipes": Bad("train glue/sst2 glue/rte", 2, ("one recipe at most, got glue/sst2, glue/rte", "key.sub=value")),
    "nothing but train": Bad(
        "train",
        2,
        (
            "model.name: it is not set. Give --model.",
            "task.kind: it is not set. Give --task.",
            "data.path: it is not set. Give --data.",
        ),
    ),
    "unknown recipe": Bad(
        "train glue/sst", 2, ("unknown recipe 'glue/sst'. Did you mean 'glue/sst2'?", "Allowed: ag-news")
    ),
    "recipe that is not there": Bad("train my.yaml", 2, ("cannot read my.yaml", "Check the path.")),
    "unknown task": Bad(
        "train -t text-clasification",
        2,
        ("--task: unknown task 'text-clasification'. Did you mean 'text-classification'?", "glue/sst2"),
    ),
    "unknown shipped task": Bad(
        "train -t glue/sst-2", 2, ("--task: unknown task 'glue/sst-2'. Did you mean 'glue/sst2'?",)
    ),
    "unknown setting": setting(
        "train.lrr=1", "'train.lrr=1': unknown key 'lrr'. Did you mean 'lr'? Allowed: lr, head_lr"
    ),
    "unknown section": setting("trian.lr=1", "'trian.lr=1': unknown key 'trian'. Did you mean 'train'?"),
    "setting of the wrong type": setting("train.epochs=many", "'train.epochs=many': got 'many'. Allowed: number."),
    "switch in words of YAML 1.1": setting("train.compile=on", "got 'on'. Allowed: true or false."),
    "setting of null": setting("train.epochs=null", "got null. Allowed: number."),
    "setting of an unset variable": setting("train.max_steps=", "'train.max_steps=': it has no value. Give one"),
    "setting that is no YAML": setting("train.lr=[1", "'train.lr=[1'", "not valid YAML"),
    "section set as a value": setting("model=5", "'model=5': got 5. Allowed: a section, such as model: {name: ...}"),
    "share above one": setting("data.validation_fraction=1.5", "got 1.5. Allowed: less than 1."),
    "resume and overwrite": setting("--resume --overwrite", "--resume: it excludes --overwrite. Give one of the two."),
    # Recipes.
    "unknown recipe key": recipe(
        "train:\n  learning_rate: 1\n",
        "my.yaml:2: train.learning_rate: unknown key 'learning_rate'. It is train.lr here.",
    ),
    "several recipe errors": recipe(
        "train:\n  lr: yes\n  epochs: '3'\n  batchsize: 4\nadaptr: {}\n",
        "my.yaml:2: train.lr: got 'yes'. Allowed: number.",
        "my.yaml:3: train.epochs: got '3'. Allowed: number.",
        "my.yaml:4: train.batchsize: unknown key 'batchsize'. Did you mean 'batch_size'?",
        "my.yaml:5: adaptr: unknown key 'adaptr'. Did you mean 'adapter'?",
    ),
    "repeated recipe key": recipe(
        "train:\n  lr: 2e-4\n  lr: 1\n",
        "my.yaml:3: key 'train.lr' appears twice (first on line 2)",
        "Remove one of the two.",
    ),
    "recipe that is no YAML": recipe("train: {lr: [1\n", "my.yaml:2: not valid YAML", "Correct the line."),
    "recipe with a tab": recipe("train:\n\tlr: 1\n", "my.yaml:2: not valid YAML"),
    "empty recipe": recipe("", "my.yaml: the recipe is empty. Write sections such as model"),
    "recipe that is a list": recipe("- train\n", "my.yaml: a recipe is a mapping of sections, got a list."),
    "recipe that is not text": recipe(b"\xff\xfe", "cannot be read", "my.yaml"),
    "section that is a value": recipe(
        "model: roberta-base\n", "my.yaml:1: model: got 'roberta-base'. Allowed: a section"
    ),
    # Names and what does not go together.
    "unknown method": setting(
        "--method mirorr", "adapter.method: unknown method 'mirorr'. Did you mean 'mirror'?", "bitfit"
    ),
    "unknown pairing": setting("--pairing mirro", "adapter.pairing: unknown pairing 'mirro'. Did you mean 'mirror'?"),
    "unknown metric": setting(
        "task.metrics=[acuracy]", "task.metrics: unknown metric 'acuracy'. Did you mean 'accuracy'?"
    ),
    "metric of numbers": setting("task.metrics=[pearson]", "'pearson' does not score a class. Allowed: accuracy, f1"),
    "selection by another metric": setting(
        "task.selection_metric=f1", "task.selection_metric: 'f1' is not computed", "Allowed: accuracy."
    ),
    "several unknown names": setting(
        "--method mirorr task.metrics=[acuracy] task.selection_metric=f1",
        "Did you mean 'mirror'?",
        "Did you mean 'accuracy'?",
        "'f1' is not computed",
    ),
    "unknown kind": Bad(
        "train -m {model} -d reviews.csv task.kind=regresion",
        2,
        ("task.kind: unknown kind of task 'regresion'. Did you mean 'regression'?",),
    ),
    "rank that is none": setting("--rank banana", "--rank: got 'banana'. Allowed: 'full' or 'out' or integer."),
    "no rank": setting("--rank 0", "--rank: got 0. Allowed: 'full' or 'out' or greater than 0."),
    "rank above the matrix": setting(
        "--rank 33",
        "rank 33 does not fit a weight of shape 32 x 32. Allowed: 1 to 32, full or out.",
        "query",
        "Lower --rank",
    ),
    "rank of no adapter": setting(
        "--method none --rank 4", "adapter.rank: method 'none' has no rank, got 4. Remove it."
    ),
    "pairing of no adapter": setting(
        "--method bitfit --pairing mirror", "method 'bitfit' has no pairing, got 'mirror'."
    ),
    "unknown option": setting("adapter.options.foo=1", "adapter.options.foo", "has no option 'foo'. Allowed: "),
    "targets that match nothing": setting(
        "--target-modules quary",
        "adapter.target_modules: 'quary' matches none of the 13",
        "Nearest: query.",
        "all-linear",
    ),
    "targets that are no pattern": setting(
        "--target-modules [", "adapter.target_modules: not a regular expression: '['"
    ),
    "revision of a folder": setting("--revision main", "model.revision", "is local and has none. Remove it."),
    "length above the model": setting(
        "--max-length 65", "got 65, the model takes at most 64 tokens. Allowed: 4 to 64."
    ),
    "configuration of a file": setting("data.config=x", "data.config: local data has none, got 'x'. Remove it."),
    # The output directory.
    "output with something in it": Bad(
        "+ -o theirs",
        2,
        ("theirs: the output directory is not empty", "--resume", "choose another with -o", "--overwrite"),
        change=fill("theirs"),
    ),
    "overwriting what is not ours": Bad(
        "+ -o theirs --overwrite",
        2,
        ("theirs is no folder that mirrortune wrote and is left alone", "Choose another with -o."),
        change=fill("theirs"),
    ),
    "resuming nothing": setting("--resume", "--resume: run holds no run. Start it without --resume."),
    "output where none can be": Bad(
        "+ -o theirs/thesis.tex/run",
        2,
        ("theirs/thesis.tex is a file", "Choose another with -o"),
        change=fill("theirs"),
    ),
    # Files of data.
    "missing file": Bad(
        "+ -d review.csv", 3, ("review.csv: no such file", "files beside it: reviews.csv", "Check the path")
    ),
    "folder without splits": Bad(
        "+ -d theirs",
        3,
        ("theirs: no train, validation or test file; it holds thesis.tex", "Rename the files"),
        change=fill("theirs"),
    ),
    "unknown file type": data("text\n", "unknown file type '.docx'. Allowed: .csv, .tsv", name="bad.docx"),
    "pattern of nothing": choice("-d rows/*.csv", "rows/*.csv: no file matches. Check the pattern given to --data"),
    "half a gzip file": data(gzip.compress(b"text,label\n" * 99)[:40], "not a whole gzip file", name="bad.csv.gz"),
    "no gzip file": data("text,label\n", "not a whole gzip file (Not a gzipped file", name="bad.csv.gz"),
    "no arrow file": data("text,label\n", "not a whole arrow file", name="bad.arrow"),
    "cycles of no cosine": setting(
        "--schedule linear train.num_cycles=3",
        "train.num_cycles: linear has none, got 3. Remove it, or set",
    ),
    "a share of no decay": setting("train.decay_ratio=0.5", "train.decay_ratio: linear has none, got 0.5. Remove it"),
    "a class called 1": setting('--class-weights "{1: 3}"', """a key must be text, got '1'. Quote it: "1"."""),
    "one decay rate of two": setting("train.betas=[0.9]", "Allowed: a list of two numbers from 0 to below 1, such as"),
    "one class alone": setting("task.labels=[good]", "task.labels: got ['good']. Allowed: two classes or more."),
    "one class twice": setting("task.labels=[bad,bad,good]", "got ['bad', 'bad', 'good']. Allowed: names that are"),
    "bounds upside down": setting("eval.prediction_bounds=[3,1]", "got [3, 1]. Allowed: two numbers, the lower one"),
    "a checkpoint by the loss": setting(
        "task.selection_metric=loss", "task.selection_metric: the loss is only logged. Allowed: accuracy. Use log_loss"
    ),
    "sample of one row": setting("-d reviews.csv#1", "--data: got #1. Allowed: #2 or more"),
    "two configurations": setting(
        "-d hf://nyu-mll/glue:sst2 data.config=cola", "data.config: got 'cola', and hf://nyu-mll/glue:sst2. Give one"
    ),
    "address of too many parts": setting("-d hf://a/b:c:d:e", "--data: got 'hf://a/b:c:d:e'. Allowed: hf://owner/name"),
    "empty file": data("", "the file is empty. Give it a header and rows."),
    "header only": data("text,label\n", "the file has no rows."),
    "bytes that are no text": data(
        GOOD.encode() + b"caf\xe9,a\n",
        ":12: byte 0xe9",
        "is not utf-8",
        "if the line should read 'café,a', set data.encoding=cp1252",
    ),
    "unknown encoding": choice(
        "data.encoding=utf-99", "data.encoding: unknown encoding 'utf-99'", "Allowed: a Python codec"
    ),
    "ragged row": data(GOOD + "a,b,c\n", ":12: 3 cells in a row of a table with 2 columns. Quote cells"),
    "open quote": data('text,label\na,b\n"c,d\ne,f\n', ":3: malformed row (unexpected end of data). Close the quote"),
    "repeated column": data("text,text\na,b\n", ":1: column name 'text' appears twice in the header. Rename one."),
    "broken json": data(
        '[{"text": "a", "label": 1},\n{"text": "b", "label": }]',
        ":2: not valid JSON (Expecting value)",
        name="bad.json",
    ),
    "broken json line": data(
        '{"text": "a", "label": 1}\n{"text": "b", "label": 0\n',
        ":2: not valid JSON",
        "one JSON object a line",
        name="bad.jsonl",
    ),
    "json of numbers": data("[1, 2]", "row 1: got int. Allowed: JSON objects", name="bad.json"),
    "json of mixed types": data(
        '{"text": "a", "label": 1}\n{"text": "b", "label": "x"}\n', "column 'label' mixes types", name="bad.jsonl"
    ),
    "half a parquet file": Bad(
        "+ -d bad.parquet", 3, ("bad.parquet: not a whole parquet file", "Copy or download it again."), change=parquet
    ),
    # Columns.
    "missing text column": choice(
        "--text-column txt", "--text-column 'txt' is not a column. Did you mean 'text'?", "Allowed: text, label."
    ),
    "missing label column": choice(
        "--label-column lable", "--label-column 'lable' is not a column. Did you mean 'label'?"
    ),
    "one column for both": choice("--text-column text --label-column text", "column 'text' is both text and label."),
    "three text columns": data(
        "a,b,c,label\n1,2,3,x\n",
        "3 text columns, got a, b, c. Allowed: one or two.",
        words="--text-column a --text-column b --text-column c",
    ),
    "nothing like a label": data(
        "a,b\nx,y\n", "no column looks like a label. Allowed: one of the columns a, b.", "Name it with --label-column."
    ),
    "several texts": data(
        "a,b,label\nx,y,0\nx,y,1\n", "several columns could be the text", "Name it with --text-column."
    ),
    "numbers for text": data('{"text": 1, "label": 0}\n', "text column 'text' holds int64, not text", name="bad.jsonl"),
    "empty text column": data("text,label\n,a\n,b\n", "text column 'text' is empty in all 2 rows.", "--text-column"),
    "a number for a context": data(
        '[{"question": 1, "choices": ["a", "b"], "label": 0}]',
        "text column 'question' holds int64, not text",
        name="bad.json",
        words="-t multiple-choice",
    ),
    "more places than answers": data(
        '[{"question": "a", "context": "b c", "answers": {"text": ["b"], "answer_start": [0, 2]}}]',
        "bad.json row 1: answers are",
        "Allowed: {text: [...], answer_start: [...]}",
        name="bad.json",
        words="-t question-answering",
    ),
    "one object over many lines": data(
        '{\n"text": "a"}',
        "bad.json:1: not valid JSON",
        "one JSON object a line, or an array of objects",
        name="bad.json",
    ),
    "a sample that is no number": setting(
        "-d reviews.csv#many", "'reviews.csv#many' is neither a local path nor a valid Hub id"
    ),
    "blank texts only": data("text,label\n" + "  ,a\n  ,b\n" * 4, "rows are blank.", "--text-column"),
    # Labels.
    "one class": data(
        rows(*"aaaa"),
        "label column 'label' has one class only ('a'). Allowed: two classes or more.",
        "Add rows of another class",
    ),
    "real numbers for classes": data(
        rows(0.5, 1.5, 2.5), "holds real numbers (such as 0.5), not classes", "Use --task regression"
    ),
    "a class for every row": data(rows(*range(60)), "has 60 different values in 60 rows", "--label-column"),
    "words for numbers": data(
        GOOD,
        ":2: label 'a' in column 'label' is not a finite number",
        "use --task text-classification",
        words="-t regression",
    ),
    "infinite number": data(rows(1, 2, "inf"), ":4: label 'inf'", "not a finite number", words="-t regression"),
    "number out of range": data(rows(1, 2, "1e300"), ":4: label '1e300'", words="-t regression"),
    "one number": data(rows(2, 2, 2), "holds one value only (2). Allowed: numbers that differ.", words="-t regression"),
    "missing labels": data(
        GOOD + "x,\ny,\n",
        "2 of 12 rows have no label in column 'label' (lines 12, 13)",
        "a label in every row used for training",
        "Fill or remove these rows.",
    ),
    "missing numbers": data(rows(1, 2, 3) + "x,\n", "1 of 4 rows have no number", words="-t regression"),
    "label that is not listed": data(
        GOOD, ":3: label 'b' is not among the classes", "Allowed: a, c.", words="task.labels=[a,c]"
    ),
    "one row": data(rows("a"), "one class only"),
    "three classes for f1": Bad(
        "+ -d bad.csv task.metrics=[f1]",
        2,
        ("task.metrics: 'f1' needs two classes, got 3.", "Allowed: f1_macro"),
        {"bad.csv": rows(*"abcabc")},
    ),
    "new class in validation": Bad(
        "+ -d parts",
        3,
        ("parts/validation.csv:3: label 'c' is not among the classes", "Allowed: a, b.", "task.labels"),
        change=folder(train=GOOD, validation=rows("a", "c")),
    ),
    "unlabelled validation": Bad(
        "+ -d parts",
        3,
        ("parts/validation.csv: 1 of 1 rows have no label",),
        change=folder(train=GOOD, validation=rows("")),
    ),
    "validation of other columns": Bad(
        "+ -d parts",
        3,
        ("parts/dev.csv: it has no label column 'label'. Allowed: text, y.",),
        change=folder(train=GOOD, dev="text,y\na,b\n"),
    ),
    "no training rows": Bad(
        "+ -d parts",
        3,
        ("data.train_split: there is no split 'train'. Allowed: validation.",),
        change=folder(validation=GOOD),
    ),
    "unknown split": choice(
        "data.train_split=trian", "data.train_split: there is no split 'trian'. Did you mean 'train'?"
    ),
    # Models.
    "no such model folder": setting(
        "-m ./nowhere", "model.name: no such folder: ", "nowhere", "Check the path; if the model has moved, give its"
    ),
    "folder without a model": Bad(
        "+ -m theirs", 2, ("holds no config.json. Allowed: a folder in the Hub's layout.",), change=fill("theirs")
    ),
    "package that is not there": setting(
        "-m package:no_such_package/model",
        "is inside a Python package that is not installed",
        "pip install no-such-package",
    ),
    "folder that is not in the package": setting("-m package:typer/model", "package 'typer' has no folder 'model'."),
    "config that is no JSON": model(
        lambda f: (f / "config.json").write_text("{"), "config.json", "not a valid JSON file"
    ),
    "unknown architecture": model(edit_config(model_type="brt"), "model type `brt`"),
    "architecture without a head": model(edit_config(model_type="vit"), "no head for this task in transformers."),
    "architecture from the repository": model(
        edit_config(model_type="x", auto_map={"AutoConfig": "x.Config"}),
        "it needs code from its own repository",
        "--trust-remote-code",
    ),
    "no weights": model(lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "half of the weights": model(cut_weights, "a file is damaged", "Download or copy it again."),
    "weights with NaN": model(poison_weights, "query: the weight holds NaN or infinities. Repair or replace", code=3),
    "no tokenizer": model(remove_tokenizer, "it has no tokenizer files. Put its tokenizer beside it."),
    "tokenizer of bytes": model(
        lambda f: (f / "tokenizer.json").write_bytes(b"PK\x03\x04\xff\xfe"), "a file is damaged"
    ),
    "broken tokenizer": model(lambda f: (f / "tokenizer.json").write_text("{"), "a file is damaged"),
    # Evaluating and merging.
    "merge without a place": Bad("merge run", 2, ("Missing option '-o' / '--output-dir'",)),
    "merge of nothing": Bad(
        "merge nowhere -o m",
        2,
        ("'nowhere' is neither a run directory nor an adapter folder.", "Give what train wrote."),
    ),
    "merge of an adapter of PEFT": Bad(
        "merge peft -o m",
        2,
        ("peft: a PEFT adapter without mirrortune's adapter.json", "merge_and_unload", "analyze reads it"),
        change=plain_peft,
    ),
    "eval of an adapter of PEFT": Bad(
        "eval peft", 2, ("peft: a PEFT adapter without mirrortune's adapter.json",), change=plain_peft
    ),
    "merge of a model": Bad("merge {model} -o m", 2, ("is neither a run directory nor an adapter folder",)),
    "merge of an unfinished run": Bad(
        "merge killed -o m", 2, ("killed: this run has not finished", "--resume"), change=unfinished
    ),
    "evaluation of nothing": Bad("eval nowhere", 2, ("nowhere: it is not a run, and --data and --task not given",)),
    "evaluation of an unfinished run": Bad(
        "eval killed -d reviews.csv",
        2,
        ("killed: this run has not finished, it has no adapter yet. Wait until it ends, or continue it: train",),
        change=unfinished,
    ),
    "evaluation without a task": Bad("eval {model} -d reviews.csv", 2, ("--task not given",)),
    "evaluation of an untrained model": Bad(
        "eval {model} -d reviews.csv -t text-classification",
        2,
        ("no trained head for this task (classifier.bias, classifier.weight",),
    ),
    "prepare with an unknown flag": Bad("prepare --modle x", 2, ("No such option: --modle", "--model")),
    "prepare without anything": Bad("prepare", 2, ("model.name: it is not set", "data.path: it is not set")),
}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in a folder, by its path; what is hidden too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", BAD)
def test_it_is_refused_with_advice_and_nothing_is_lost_or_left(desk: Path, tiny_model_dir: Path, name: str) -> None:
    bad = BAD[name]
    for file, content in bad.files.items():
        (desk / file).write_bytes(content.encode() if isinstance(content, str) else content)
    if bad.change:
        bad.change(desk, tiny_model_dir)
    before = contents(desk)
    words = shlex.split(bad.words)
    if words[:1] == ["+"]:
        words = [str(word) for word in changed(TRAIN.split(), *words[1:])]

    outcome = mirrortune(*(word.format(model=tiny_model_dir) if "{model}" in word else word for word in words))

    assert outcome.exit_code == bad.code, outcome.stderr
    for part in bad.says:
        assert part in outcome.said
    assert outcome.stdout == ""
    assert "Traceback" not in outcome.stderr
    assert contents(desk) == before


def test_there_are_enough_of_them() -> None:
    assert len(BAD) >= 100
    assert all(bad.says and bad.code in (2, 3, 4) for bad in BAD.values())


def test_blank_training_texts_are_counted_and_left_out(desk: Path, tiny_model_dir: Path) -> None:
    write_table(desk / "parts" / "train.csv", [*reviews(30), ("  ", "positive"), ("", "negative")])
    write_table(desk / "parts" / "validation.csv", [*reviews(10), ("", "positive")])

    for keep, train_rows, said in (("drop", 30, "2 blank (left out)"), ("keep", 32, "2 blank (kept)")):
        outcome = mirrortune(
            "prepare",
            "-m",
            tiny_model_dir,
            "-t",
            "text-classification",
            "-d",
            "parts",
            f"data.blank_text={keep}",
            "--json",
        )
        assert outcome.data["rows"] == {"train": train_rows, "validation": 11}
        assert said in outcome.stderr
        assert "validation: 11 rows, 7 tokens (median), 7 at most; 1 blank (kept)" in outcome.stderr


def test_long_texts_are_cut_and_counted(desk: Path, tiny_model_dir: Path) -> None:
    write_table(desk / "long.csv", [*reviews(30), ("the film " * 40, "positive"), ("was bad " * 40, "negative")])

    outcome = mirrortune("prepare", "-m", tiny_model_dir, "-t", "text-classification", "-d", "long.csv", "--json")

    assert sum(outcome.data["truncated_rows"].values()) == 2
    assert "truncated to 64" in outcome.stderr


def test_a_rate_as_people_write_it_is_a_number(desk: Path, tiny_model_dir: Path) -> None:
    (desk / "my.yaml").write_text("train:\n  lr: 2e-4\n  head_lr: 1E-3\n", encoding="utf-8")

    outcome = mirrortune(
        "train", "my.yaml", "-m", tiny_model_dir, "-t", "text-classification", "-d", "reviews.csv", "-v", "--dry-run"
    )

    assert outcome.exit_code == 0, outcome.stderr
    assert "train.lr = 0.0002  (my.yaml:2: train.lr)" in outcome.stderr
    assert "train.head_lr = 0.001  (my.yaml:3: train.head_lr)" in outcome.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--max-steps 9", "step 2: the training loss is nan and the gradient norm nan; the step was not taken"),
        ("--max-steps 1", "step 1: the validation loss is nan"),
    ],
)
def test_a_loss_that_is_not_a_number_stops_the_run_at_once(
    desk: Path, tiny_model_dir: Path, words: str, says: str
) -> None:
    absurd = [
        "--method",
        "full",
        "--lr",
        "1e29",
        "--head-lr",
        "1e29",
        "train.schedule=constant",
        "train.warmup_ratio=0",
    ]

    outcome = mirrortune(
        *["train", "-m", tiny_model_dir, "-t", "text-classification", "-d", "reviews.csv", "-o", "run"],
        *absurd,
        *words.split(),
    )

    assert outcome.exit_code == 2
    assert f"{says}, and there is no checkpoint yet. Lower --lr or --head-lr" in outcome.said
    assert outcome.stdout == ""
    assert not (desk / "run" / "adapter").exists()


def test_an_earlier_run_survives_an_attempt_to_replace_it_that_fails(desk: Path, tiny_model_dir: Path) -> None:
    words = ["train", "-m", tiny_model_dir, "-t", "text-classification", "-o", "run", "--max-steps", 1]
    assert mirrortune(*words, "-d", "reviews.csv").exit_code == 0
    before = contents(desk / "run")
    (desk / "bad.csv").write_text(rows(*"aaaa"), encoding="utf-8")

    for attempt in (["-d", "bad.csv"], ["-d", "reviews.csv", "-m", "./nowhere"], ["-d", "reviews.csv", "--rank", 99]):
        assert mirrortune(*changed(words, *attempt), "--overwrite").exit_code in (2, 3)
        assert contents(desk / "run") == before


@pytest.mark.parametrize(
    ("closed", "words"),
    [
        ("model", "prepare -m model -t text-classification -d reviews.csv --dry-run"),
        ("rows", "prepare -m model -t text-classification -d rows --dry-run"),
        ("bank", "predict model --bank bank -d reviews.csv --adapter-column stars"),
    ],
)
def test_a_folder_that_may_be_entered_but_not_listed_is_named(
    closed: str, words: str, desk: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_model_dir, desk / "model")
    for name in ("rows", "bank"):
        (desk / name).mkdir()
    listed = Path.iterdir

    def refused(folder: Path) -> Iterator[Path]:
        if folder.name == closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))  # root may list every folder
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", refused)
    outcome = mirrortune(*words.split())
    assert outcome.exit_code == 4
    assert f"{closed}: permission denied. Permit it (chmod u+rx for a folder), or choose another path" in outcome.said
