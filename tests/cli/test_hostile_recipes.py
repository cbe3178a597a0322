# SPDX-License-Identifier: Apache-2.0
"""Recipes, models and adapters of strangers that ask for more than a score: for the right to run code, to write
elsewhere, or for endless work. Every command that takes a target gives them none, says so, and leaves every other
folder as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.console import REPOSITORY, mirrortune, reviews, write_table
from tests.cli.test_hostile_adapters import peft_says, say
from tests.tiny_models import write_tiny_model

Attack = Callable[[Path], object]
"""(place) -> what a stranger's folders hold: ``run``, ``model`` and others, beside ``bystander``."""

pytestmark = pytest.mark.figures  # some files are found to be damaged when they are drawn

# Runs when it is imported, and then works as a model.
CODE = """
from pathlib import Path
from transformers import BertConfig, BertForSequenceClassification
Path({mark!r}).write_text("ran")
class OwnConfig(BertConfig):
    model_type = "own-bert"
class OwnModel(BertForSequenceClassification):
    config_class = OwnConfig
"""
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, after in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with its data, and two runs on it: ``run``, and ``peft`` of a tuner of PEFT."""
    folder = tmp_path_factory.mktemp("desk")
    base = write_tiny_model(folder / "base")
    write_table(folder / "reviews.csv", reviews(24))
    for name, words in {"run": [], "peft": ["--method", "lora", "--rank", 2]}.items():
        done = mirrortune(
            "train", "-m", base, "-t", "text-classification", "-d", folder / "reviews.csv", "--max-steps", 1, "-q",
            "--target-modules", "attention.self.(query|key)", "-o", folder / name, *words, cache=folder / "cache",
        )  # fmt: skip
        assert done.exit_code == 0, done.stderr
    return folder


@pytest.fixture
def place(desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copies of the base and the runs, a bystander's folder, and an empty folder to work in."""
    for name in ("run", "peft"):
        shutil.copytree(desk / name, tmp_path / name)
    shutil.copytree(desk / "base", tmp_path / "model")
    shutil.copy(desk / "reviews.csv", tmp_path / "reviews.csv")
    write_table(tmp_path / "bystander" / "notes.csv", reviews(3))
    (tmp_path / "bystander" / "thesis.txt").write_text("years of work")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))  # of commands that compare starts
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def tree(*folders: Path) -> str:
    """A hash of every name and byte below some folders."""
    found = hashlib.sha256()
    for path in sorted(p for folder in folders for p in folder.rglob("*")):
        found.update(f"{path} {path.is_file() and path.read_bytes()!r}\n".encode())
    return found.hexdigest()


def recipe(**sections: Any) -> Attack:
    """The run's recipe says something else in these sections."""

    def apply(place: Path) -> None:
        path = place / "run" / "recipe.yaml"
        values = yaml.safe_load(path.read_text())
        for name, section in sections.items():
            values[name] = {**values[name], **section} if isinstance(section, dict) else section
        path.write_text(yaml.safe_dump(values))

    return apply


def file(name: str, text: str) -> Attack:
    """A file is there, with a text."""

    def apply(place: Path) -> None:
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(text)

    return apply


def coded(place: Path) -> None:
    """The model needs code of its own, which leaves a mark."""
    (place / "model" / "own.py").write_text(CODE.format(mark=str(place / "mark")))
    path = place / "model" / "config.json"
    mapped = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.OwnModel"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "own-bert", "auto_map": mapped}))


def model_with_recipe(place: Path) -> None:
    """What ``hf download X --local-dir d`` may leave: a model with code, and a recipe that switches it on."""
    coded(place)
    (place / "model" / "recipe.yaml").write_text(RECIPE.replace(": /", f": {place}/"))


def adapter_alone(folder: str, *beside: str) -> Attack:
    """The adapter lies at ``folder``, with files of the run beside it and not the whole run."""

    def apply(place: Path) -> None:
        target = place / folder
        shutil.copytree(place / "run" / "adapter", target)
        for name in beside:
            shutil.copy(place / "run" / name, target.parent / name)

    return apply


def on_adapter(damage: Callable[[Path, Path], object], run: str = "run") -> Attack:
    """The description of the run's adapter says something else; see ``test_hostile_adapters.py``."""
    return lambda place: damage(place / run / "adapter", place / run / "adapter")


def relabelled(place: Path) -> None:
    """A class has a name of several lines, in the adapter and in the data."""
    names = {"negative": "a\n0\tb", "positive": "c"}
    write_table(place / "rows.csv", [(text, names[label]) for text, label in reviews(24)])
    on_adapter(say("task", "labels", value=[*names.values()]))(place)


def pipe(place: Path) -> None:
    """The recipe is a pipe, from which nothing ever comes."""
    (place / "run" / "recipe.yaml").unlink()
    os.mkfifo(place / "run" / "recipe.yaml")


def kernels(place: Path) -> None:
    """The model's configuration asks for compiled code from another repository."""
    path = place / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attn_implementation": "evil/kernels"}))


def worded(place: Path) -> None:
    """The words of the model's tokenizer are a file of the user, which a merge would copy."""
    (place / "model" / "tokenizer.json").unlink()
    secret = next(path for path in (place / "bystander").rglob("*") if path.is_file())
    (place / "model" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "vocab": str(secret)})
    )


def piped(place: Path) -> None:
    """The tokenizer is a pipe, from which nothing ever comes."""
    (place / "model" / "tokenizer.json").unlink()
    os.mkfifo(place / "model" / "tokenizer.json")


def configured(**fields: Any) -> Attack:
    """The model's configuration says something else."""

    def apply(place: Path) -> None:
        path = place / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return apply


def foreign(**fields: Any) -> Attack:
    """PEFT's own adapter, without our description, whose configuration says something else."""

    def apply(place: Path) -> None:
        shutil.copytree(place / "peft" / "adapter", place / "foreign")
        (place / "foreign" / "adapter.json").unlink()
        path = place / "foreign" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return apply


def index(text: str) -> Attack:
    """The model's weights are where its index says."""

    def apply(place: Path) -> None:
        (place / "model" / "model.safetensors").rename(place / "bystander" / "theirs.safetensors")
        (place / "model" / "model.safetensors.index.json").write_text(text)

    return apply


def all_of(*attacks: Attack) -> Attack:
    """Several at once."""
    return lambda place: [attack(place) for attack in attacks]


@dataclass(frozen=True)
class Case:
    """An attack, the command that meets it (words below the place begin with a slash), and how that ends."""

    attack: Attack
    command: str
    code: int
    says: str


DATA = "-t text-classification -d /reviews.csv"
TRUST = {"trust_remote_code": True}
RECIPE = (
    "model:\n  name: /model\n  trust_remote_code: true\ntask: {kind: text-classification}\ndata: {path: /reviews.csv}\n"
)
NO_CODE, NO_DATA = "it needs code from its own repository", "and --data not given"
ASKS = "r.yaml:3: model.trust_remote_code: the recipe asks to run Python code from the repository of"
ALIAS = "is a YAML anchor or alias"
# No regular expression: whoever matches it fails. In an attack it takes longer than the sun to match nothing.
PATTERN = "((a+)+"
CASES = {
    "a model with code and a recipe": Case(model_with_recipe, "eval /model", 2, NO_CODE),
    "the same, with the command's own data": Case(
        model_with_recipe, f"eval /model {DATA}", 2, NO_CODE
    ),
    "a run's recipe names another base and code": Case(
        all_of(coded, recipe(model={**TRUST, "name": "../model"})), "eval /run -v", 0, "model.name, model.trust"
    ),
    "the base of an adapter has code": Case(coded, "eval /run -m /model", 2, NO_CODE),
    "the base of a merge has code": Case(coded, "merge /run -m /model -o out", 2, NO_CODE),
    "the base of an export has code": Case(coded, "merge /run -m /model -o out --format lora", 2, NO_CODE),
    "an analysed model has code": Case(coded, "analyze /model /run", 2, NO_CODE),
    "a recipe around an adapter": Case(adapter_alone("scratch/mine", "recipe.yaml"), "eval /scratch/mine", 2, NO_DATA),
    "a recipe around a folder called adapter": Case(
        adapter_alone("scratch/adapter", "recipe.yaml"), "eval /scratch/adapter", 2, NO_DATA
    ),
    "results around an adapter": Case(
        adapter_alone("bystander/mine", "recipe.yaml", "results.json"), "merge /bystander/mine -o out", 0, "merged into"
    ),
    "a recipe file, prepare": Case(file("r.yaml", RECIPE), "prepare /r.yaml --dry-run", 2, ASKS),
    "a recipe file, train": Case(file("r.yaml", RECIPE), "train /r.yaml -o out", 2, ASKS),
    "a recipe file, compare": Case(file("r.yaml", RECIPE), "compare /r.yaml --methods none -o out", 2, ASKS),
    "a contender": Case(
        coded, f"compare -m /model {DATA} -o out --methods none:model.trust_remote_code=true", 2, "asks to run Python",
    ),
    "a recipe for eval": Case(file("r.yaml", RECIPE), "eval /run /r.yaml", 2, ASKS),
    "a run to be continued": Case(
        all_of(coded, recipe(model=TRUST)), f"train -m /model {DATA} --max-steps 1 "
        "--target-modules attention.self.(query|key) -o /run --resume", 2, "--resume: model.name: the run was started",
    ),
    "a saved recipe that is run again": Case(recipe(model=TRUST), "train /run/recipe.yaml -o out", 2, "asks to run"),
    "places to write": Case(
        recipe(output_dir="../bystander", train={"track": "tensorboard"}), "eval /run -v", 0, "output_dir"
    ),
    "answers above the folder": Case(
        recipe(eval={"prediction_files": {"train": "../bystander/.bash_profile"}}), "eval /run --predictions .", 2,
        "eval.prediction_files.train: got '../bystander/.bash_profile'. Allowed: a plain file name",
    ),
    "answers at a path": Case(
        recipe(eval={"prediction_files": {"train": "/tmp/x.tsv"}}), "eval /run --predictions .", 2, "a plain file name"
    ),
    "answers in a hidden file": Case(
        recipe(eval={"prediction_files": {"train": ".bashrc"}}), "eval /run --predictions .", 2, "a plain file name"
    ),
    "class names of several lines": Case(
        all_of(relabelled, recipe(data={"path": "../rows.csv"})), "eval /run --predictions .", 2,
        "class name 'a\\n0\\tb' holds a line break",
    ),
    "data of the stranger's choice": Case(
        recipe(data={"path": "/etc/passwd"}), "eval /run", 3, "/run/recipe.yaml: path /etc/passwd"
    ),
    "aliases, eval": Case(file("run/recipe.yaml", BOMB), "eval /run", 2, f"/recipe.yaml:1: '&a' {ALIAS}"),
    "aliases, report": Case(file("run/recipe.yaml", BOMB), "report /run -o out.html", 2, ALIAS),
    "aliases, train": Case(file("r.yaml", BOMB), "train /r.yaml -o out", 2, ALIAS),
    "aliases, resume": Case(
        file("run/recipe.yaml", BOMB), f"train -m /model {DATA} -o /run --resume", 2, ALIAS
    ),
    "a pipe for a recipe": Case(pipe, "eval /run", 2, NO_DATA),
    "an empty recipe of sections": Case(file("run/recipe.yaml", "data:\nmodel: 5\n"), "eval /run", 2, NO_DATA),
    "a recipe without end": Case(
        lambda place: os.truncate(place / "run" / "recipe.yaml", 2**25), "eval /run", 2, "a recipe of 33,554,432 bytes"
    ),
    "a list for a recipe": Case(file("run/recipe.yaml", "- a\n"), "eval /run", 2, "a recipe is a mapping"),
    "a file of pairs in a run's recipe": Case(
        all_of(file("secret.json", "[[0, 1]]"), recipe(adapter={"pairing": "../secret.json"})), "report /run -o out", 2,
        "the recipe of a run lists the pairs",
    ),
    "a log of lists, report": Case(
        file("run/metrics.jsonl", "[]\n5\n"), "report /run -o out", 5, "damaged, line 1 is no object"
    ),
    "a log of brackets, report": Case(
        file("run/metrics.jsonl", '{"a":' * 100_000 + "\n"), "report /run -o out", 5, "damaged, line 1 is no object"
    ),
    "a log of astronomical numbers, report": Case(
        file("run/metrics.jsonl", "".join(
            f'{{"event": "train", "step": {10**i}, "epoch": 0, "loss": 1e308, "lr": 1e308}}\n' for i in range(1, 18)
        )), "report /run -o out", 5, "is damaged (",
    ),
    "results of nothing, report": Case(
        file("run/results.json", "[]"), "report /run -o out", 5, "damaged (results.json holds [], not an object)"
    ),
    "an endless pattern of parts, eval": Case(
        on_adapter(say("adapter", "split", value={PATTERN: 2})), "eval /run", 0, "rows"
    ),
    "an endless pattern of parts, merge": Case(
        on_adapter(say("adapter", "split", value={PATTERN: 2})), "merge /run -o out", 0, "merged into"
    ),
    "an endless pattern of layers": Case(
        on_adapter(say("adapter", "target_modules", value=PATTERN)), "analyze /run", 0, "matrices"
    ),
    "endless patterns of pairs": Case(
        on_adapter(say("adapter", "pairing", value={PATTERN: [[0, 1]]})), "eval /run", 5, "adapter.pairing is invalid"
    ),
    "an endless pattern of ranks": Case(
        on_adapter(peft_says(rank_pattern={PATTERN: 1}), "peft"), "eval /peft", 5,
        "'rank_pattern' of its adapter_config.json holds a pattern",
    ),
    "an endless pattern of exceptions": Case(
        on_adapter(peft_says(exclude_modules=PATTERN), "peft"), "merge /peft -o out", 0, "merged into"
    ),
    "every file of every disk": Case(recipe(data={"path": "/**/*.csv"}), "eval /run -v", 2, NO_DATA),
    "the same for others": Case(recipe(data={"path": "../*/*/*/*.csv"}), "eval /run -v", 2, "data.path"),
    "millions of values": Case(file("run/recipe.yaml", f"data: [{'x,' * 30_000}]"), "eval /run", 2, "more than 30,0"),
    "thousands of unknown keys": Case(
        file("r.yaml", "train:\n" + "".join(f"  k{i}: 1\n" for i in range(10_000))), "train /r.yaml -o out", 2,
        "9,900 more problems",
    ),
    "an endless search by PEFT": Case(
        foreign(init_lora_weights="pissa_niter_999999999"), "analyze /model /foreign", 2, "more than 128 iterations"
    ),
    "a huge rank for PEFT": Case(foreign(r=10**9), "analyze /model /foreign", 2, "'r' of its adapter_config.json"),
    "layers without end for PEFT": Case(
        foreign(layer_replication=[[0, 2]] * 9), "analyze /model /foreign", 2, "'layer_replication' of its"
    ),
    "a kind unknown to PEFT": Case(foreign(peft_type="os"), "analyze /model /foreign", 2, "PEFT cannot read"),
    "other repositories for PEFT": Case(
        foreign(peft_type="XLORA", hidden_size=32, adapters={"0": "evil/x"}), "analyze /model /foreign", 2,
        "changes no weights",
    ),
    "another model for PEFT": Case(
        foreign(peft_type="SHADOW", shadow_model="evil/x"), "analyze /model /foreign", 2, "changes no weights"
    ),
    "a prompt for PEFT": Case(
        foreign(peft_type="PROMPT_TUNING", num_virtual_tokens=4), "analyze /model /foreign", 2, "changes no weights"
    ),
    "tokens that are not there": Case(
        foreign(trainable_token_indices=[1000]), "analyze /model /foreign", 2, "PEFT cannot load it"
    ),
    "a list for PEFT": Case(
        all_of(foreign(), file("foreign/adapter_config.json", "[]")), "analyze /foreign", 2, "is damaged (a list)"
    ),
    "a base that is no name": Case(
        foreign(base_model_name_or_path=["a"]), "analyze /foreign", 2, "does not say what its base is"
    ),
    "weights elsewhere": Case(
        index('{"weight_map": {"a": "../bystander/theirs.safetensors"}}'), "analyze /model /run", 2,
        "none of a checkpoint",
    ),
    "an index that is a list": Case(index("[]"), "analyze /model /run", 2, "damaged (TypeError)"),
    "weights elsewhere, train": Case(
        index('{"weight_map": {"a": "../bystander/theirs.safetensors"}}'), f"train -m /model {DATA} -o out", 2,
        "none of a checkpoint",
    ),
    "an index that is a list, train": Case(index("[]"), f"train -m /model {DATA} -o out", 2, "damaged (TypeError)"),
    "half an index, train": Case(
        all_of(file("model/w.safetensors", ""), index('{"weight_map": {"a": "w.safetensors"}}')),
        f"train -m /model {DATA} -o out", 2, "its files cannot be loaded (KeyError: 'metadata')",
    ),
    "aliases, push": Case(file("run/recipe.yaml", BOMB), "push /run me/x", 2, ALIAS),
    "a list for results, push": Case(
        file("run/results.json", "[]"), "push /run me/x", 5, "damaged (results.json holds [], not an object)"
    ),
    "brackets for results, push": Case(
        file("run/results.json", '{"a":' * 100_000), "push /run me/x", 5, "damaged (RecursionError)"
    ),
    "a size without end": Case(
        configured(hidden_size=10**9), f"prepare -m /model {DATA} --dry-run", 2, "hidden_size is 1000000000, allowed"
    ),
    "a size below nothing": Case(
        configured(hidden_size=-5), f"train -m /model {DATA} -o out", 2, "cannot be used (RuntimeError"
    ),
    "a size that is a word": Case(
        configured(hidden_size="x"), f"train -m /model {DATA} -o out", 2, "cannot be used (StrictDataclass"
    ),
    "no heads": Case(
        configured(num_attention_heads=0), f"train -m /model {DATA} -o out", 2, "cannot be used (ZeroDivisionError"
    ),
    "heads that do not divide": Case(
        configured(num_attention_heads=7), f"train -m /model {DATA} -o out", 2, "cannot be used (ValueError"
    ),
    "layers without end": Case(
        configured(num_hidden_layers=10**7), f"prepare -m /model {DATA} --dry-run", 2, "num_hidden_layers is 10000000"
    ),
    "a number type that is a function": Case(
        configured(dtype="load"), f"prepare -m /model {DATA} --dry-run", 2, "its configuration cannot be used"
    ),
    "a number type that is a number": Case(
        configured(dtype=5), f"prepare -m /model {DATA} --dry-run", 2, "its configuration cannot be used (dtype is 5)"
    ),
    "brackets for a model": Case(
        file("model/config.json", '{"a":' * 100_000), f"prepare -m /model {DATA} --dry-run", 2, "a file is damaged"
    ),
    **{
        f"brackets for {name}": Case(
            file(f"model/{name}", "[" * 100_000), f"prepare -m /model {DATA} --dry-run", 2, "a file is damaged (maximum"
        )
        for name in ("tokenizer_config.json", "special_tokens_map.json")
    },
    "a pipe for a tokenizer": Case(
        piped, f"prepare -m /model {DATA} --dry-run", 2, "tokenizer.json is a pipe or a device"
    ),
    "a file of the user for a vocabulary": Case(
        worded, f"prepare -m /model {DATA} --dry-run", 2, "vocab is a file outside of the model's folder"
    ),
    "compiled code for a model": Case(
        kernels, f"prepare -m /model {DATA} --dry-run", 2,
        "asks for code from 'evil/kernels'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_target_gains_no_rights(place: Path, desk: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mirrortune.config.strict_yaml._MOST_NODES", 30_000)  # in place of three million
    case = CASES[name]
    case.attack(place)
    for path in place.glob("r.yaml"):
        path.write_text(path.read_text().replace(": /", f": {place}/"))
    words = [f"{place}{word}" if word.startswith("/") else word for word in case.command.split()]
    before = tree(place / "bystander", *((place / "run", place / "model") if "resume" not in name else ()))

    outcome = mirrortune(*words, cache=desk / "cache")

    said = outcome.said + outcome.stdout
    assert (outcome.exit_code, case.says in said) == (case.code, True), said
    assert "Traceback" not in outcome.stderr
    assert not (place / "mark").exists(), "code of the target has run"
    after = tree(place / "bystander", *((place / "run", place / "model") if "resume" not in name else ()))
    assert after == before or name == "an endless pattern of parts, merge"  # a run notes where it was merged to
    written = sorted(path.name for path in (place / "work").iterdir())
    assert written == (["out"] if case.code == 0 and "-o" in words else [])


def test_code_runs_by_the_flag_of_this_command_line_and_is_announced(place: Path, desk: Path) -> None:
    coded(place)
    words = ["prepare", "-m", place / "model", "-t", "text-classification", "-d", place / "reviews.csv", "--dry-run"]

    for permission in ("--trust-remote-code", "model.trust_remote_code=true"):
        outcome = mirrortune(*words, "-q", permission, cache=desk / "cache")
        assert outcome.exit_code == 0, outcome.stderr
        assert f"running code of folder {place}/model, which has no commit: own.OwnConfig, own.OwnModel" in outcome.said
    assert (place / "mark").exists()


def test_a_recipe_that_asks_is_followed_with_the_flag_and_hands_nothing_on(place: Path, desk: Path) -> None:
    coded(place)
    (place / "r.yaml").write_text(RECIPE.replace(": /", f": {place}/"))

    trained = mirrortune(
        "train", place / "r.yaml", "--trust-remote-code", "--method", "none", "--max-steps", 1, "-o", "out",
        cache=desk / "cache",
    )  # fmt: skip

    assert trained.exit_code == 0, trained.stderr
    assert "trust_remote_code" not in (place / "work" / "out" / "recipe.yaml").read_text()
    (place / "mark").unlink()
    assert NO_CODE in mirrortune("eval", "out", cache=desk / "cache").said
    assert not (place / "mark").exists()
    scored = mirrortune("eval", "out", "--trust-remote-code", cache=desk / "cache")
    assert scored.exit_code == 0, scored.stderr
    assert "running code of folder" in scored.said


@pytest.mark.slow
def test_a_comparison_hands_its_permission_to_its_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coded(place)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    words = ["compare", "-m", place / "model", "-t", "text-classification", "-d", place / "reviews.csv", "-o", "out"]
    words += ["--methods", "none:lr=1e-3", "--seeds", 1, "--extensions", 0, "--max-steps", 1]

    assert mirrortune(*words).exit_code == 2
    outcome = mirrortune(*words, "--trust-remote-code")

    assert outcome.exit_code == 0, outcome.stderr
    files = [*(place / "work" / "out").rglob("*.yaml")]
    assert files
    assert not any("trust_remote_code" in path.read_text() for path in files)


def test_a_run_of_ones_own_is_scored_by_one_word(place: Path, desk: Path) -> None:
    said = {}
    for target in ("run", "run/adapter"):
        outcome = mirrortune("eval", place / target, cache=desk / "cache")
        assert outcome.exit_code == 0, outcome.stderr
        assert f"data named by {place}/run/recipe.yaml: path {desk}/reviews.csv" in outcome.said
        said[target] = outcome.stdout
    assert said["run"] == said["run/adapter"]
