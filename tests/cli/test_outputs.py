# SPDX-License-Identifier: Apache-2.0
"""Where commands may write: attacks and mishaps, each refused before any work and without a byte changed anywhere."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import mirrortune as library
from mirrortune.errors import ConfigError, ResourceError
from mirrortune.system.atomic import MARKER, discard, write_folder_atomically
from mirrortune.system.claims import claimed
from mirrortune.system.outputs import Input, Marker, check_place, read_marker, write_marker
from mirrortune.system.run_directory import RunDirectory
from tests.cli.console import finish, mirrortune, reviews, start, write_table
from tests.tiny_models import write_tiny_model
from tests.trees import tree

TRAIN = "train -m model -t text-classification -d reviews.csv --max-steps 1 --batch-size 4"
EVAL = "eval run -d reviews.csv"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a model, a finished run of it and its merge."""
    folder = tmp_path_factory.mktemp("made")
    before, cache = Path.cwd(), folder.parent / "cache"
    write_table(folder / "reviews.csv", reviews(60))
    write_tiny_model(folder / "model")
    os.chdir(folder)
    try:
        for words in (f"{TRAIN} -o run", "merge run -o merged"):
            outcome = mirrortune(*words.split(), cache=cache)
            assert outcome.exit_code == 0, outcome.stderr
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def desk(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to work in, with things of the user's own; the home directory is another."""
    folder = Path(shutil.copytree(made, tmp_path / "desk"))
    (folder / "thesis.txt").write_text("years of work", encoding="utf-8")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear", encoding="utf-8")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(folder)
    return folder


@dataclass(frozen=True)
class Refused:
    """A command that must be refused.

    Attributes:
        words: the command line.
        says: parts of the message.
        change: what happens to the folder beforehand.
        code: of the exit.
    """

    words: str
    says: tuple[str, ...]
    change: Callable[[Path], object] = lambda desk: None
    code: int = 2


def project(desk: Path) -> None:
    """Everything in one folder, as people keep it."""
    shutil.copytree(desk / "model", desk / "proj" / "base")
    shutil.copy(desk / "reviews.csv", desk / "proj" / "reviews.csv")
    (desk / "proj" / "thesis.txt").write_text("years of work", encoding="utf-8")
    text = "model: {name: proj/base}\ntask: {kind: text-classification}\ndata: {path: reviews.csv}\n"
    (desk / "proj" / "recipe.yaml").write_text(text, encoding="utf-8")


def file(name: str, text: str = "mine") -> Callable[[Path], object]:
    """A file of the user's own."""

    def change(desk: Path) -> None:
        (desk / name).parent.mkdir(parents=True, exist_ok=True)
        (desk / name).write_text(text, encoding="utf-8")

    return change


def link(name: str, target: str) -> Callable[[Path], object]:
    """A symbolic link."""
    return lambda desk: (desk / name).symlink_to(target)


def pictures(desk: Path) -> None:
    """A folder of images for each class, as far as their names tell."""
    for name in ("cat/1.png", "dog/2.png"):
        file(f"pictures/{name}")(desk)


def tables(desk: Path) -> None:
    """A folder with a file for each split."""
    for name in ("train", "validation"):
        write_table(desk / "rows" / f"{name}.csv", reviews(20))


def adapter_elsewhere(desk: Path) -> None:
    """The adapter of a run on another disk, with notes beside it, and a link in its place."""
    (desk / "run" / "adapter").rename(desk / "best")
    (desk / "best" / "notes.txt").write_text("mine", encoding="utf-8")
    (desk / "run" / "adapter").symlink_to("../best")


def linked_comparison(desk: Path) -> None:
    """A comparison whose folder of recipes leads to a model."""
    (desk / "new").mkdir()
    write_marker(desk / "new", Marker("comparison", frozenset()))
    (desk / "new" / "recipes").symlink_to("../model")


def linked(folder: Path, target: Path) -> None:
    """A folder of links to the files of another, as caches and disk savers make them."""
    folder.mkdir()
    for path in target.iterdir():
        (folder / path.name).symlink_to(path)


def elsewhere(name: str) -> Callable[[Path], object]:
    """A folder of the run on another disk, and a link in its place."""

    def change(desk: Path) -> None:
        (desk / "run" / name).mkdir(parents=True, exist_ok=True)
        (desk / "run" / name).rename(desk / "elsewhere")
        (desk / "run" / name).symlink_to(desk / "elsewhere")

    return change


NOT_OURS = "is no folder that mirrortune wrote and is left alone"
CASES = {
    # Places where no folder is ever written.
    "a project": Refused("train proj/recipe.yaml -o proj --overwrite", ("that is read lies in it",), project),
    "the working directory": Refused(f"{TRAIN} -o . --overwrite", (".: it is the working directory",)),
    "a parent of it": Refused(f"{TRAIN} -o .. --overwrite", ("..: the working directory lies in it",)),
    "a detour to it": Refused(f"{TRAIN} -o run/../../desk --overwrite", ("it is the working directory",)),
    "the home directory": Refused(f"{TRAIN} -o ~ --overwrite", ("it is your home directory",)),
    "the root": Refused(f"{TRAIN} -o / --overwrite", ("/: the working directory lies in it",)),
    "merging into a mount point": Refused("merge run -o /proc", ("/proc: it is a mount point", "/proc/NAME")),
    "planning in the working directory": Refused(f"{TRAIN} -o . --dry-run", (".: it is the working directory",)),
    "planning to train over a run": Refused(f"{TRAIN} -o run --dry-run", ("run: the output directory is not empty",)),
    "planning to train over notes": Refused(
        f"{TRAIN} -o run --dry-run --overwrite", ("not part of the run: notes.txt",), file("run/notes.txt")
    ),
    "planning to continue what is no run": Refused(f"{TRAIN} -o new --dry-run --resume", ("new holds no run",)),
    "a link to a run": Refused(
        f"{TRAIN} -o link --overwrite", ("link: it is a symbolic link to run",), link("link", "run")
    ),
    "a link to nothing": Refused(f"{TRAIN} -o link", ("link: it is a symbolic link",), link("link", "none")),
    "a file": Refused(f"{TRAIN} -o thesis.txt --overwrite", ("thesis.txt: it is a file",)),
    "below a file": Refused(f"{TRAIN} -o thesis.txt/run", ("thesis.txt is a file",)),
    "merging into the working directory": Refused("merge run -o . --overwrite", ("it is the working directory",)),
    "comparing in the working directory": Refused(
        "compare -m model -t text-classification -d reviews.csv --methods mirror -o .", ("it is the working directory",)
    ),
    "a name too long": Refused(f"{TRAIN} -o {'x' * 256}", ("cannot be used as a path (File name too long)",)),
    "predictions with a name too long": Refused(f"{EVAL} --predictions {'x' * 256}", ("cannot be used as a path",)),
    "the home of nobody": Refused(f"{TRAIN} -o ~nobody-here/x", ("the home directory that ~nobody-here stands for",)),
    "data in the home of nobody": Refused(
        "train -m model -t text-classification -d ~nobody-here/a.csv", ("the home directory that ~nobody-here",)
    ),
    "links in a circle": Refused("merge run -o circle/x", ("circle/x: cannot be used as",), link("circle", "circle")),
    "data that is a circle": Refused("eval run -d circle/x", ("circle/x: cannot be used",), link("circle", "circle")),
    "a folder by its sub-folder": Refused(f"{TRAIN} -o run/adapter/.. --overwrite", ("its name is '..'", "/desk/run.")),
    # Folders that hold what is not ours.
    "a folder with a recipe": Refused(f"{TRAIN} -o mine --overwrite", (NOT_OURS,), file("mine/recipe.yaml", "a: 1")),
    "a folder with merge.json": Refused("merge run -o mine --overwrite", (NOT_OURS,), file("mine/merge.json", "{}")),
    "a run with notes": Refused(
        f"{TRAIN} -o run --overwrite",
        ("run also contains files or folders that are not part of the run: notes/day 1.txt",),
        file("run/notes/day 1.txt"),
    ),
    "a run with an empty folder": Refused(
        f"{TRAIN} -o run --overwrite", ("not part of the run: plans/",), lambda desk: (desk / "run" / "plans").mkdir()
    ),
    "a run with a link": Refused(
        f"{TRAIN} -o run --overwrite", ("not part of the run: link",), link("run/link", "../thesis.txt")
    ),
    "a run with another below its tracker's folder": Refused(
        f"{TRAIN} -o run --overwrite",
        ("not part of the run: wandb/inner/.mirrortune.json, wandb/inner/README.md, ",),
        lambda desk: shutil.copytree(desk / "run", desk / "run" / "wandb" / "inner"),
    ),
    **{
        f"a run with {name}": Refused(
            f"{TRAIN} -o run --overwrite", (f"not part of the run: {name}",), file(f"run/{name}")
        )
        for name in (
            "tensorboard/notes.md",
            "mlruns/thesis.tex",
            "mlflow.db-my-backup.sqlite",
            "._backup/thesis.tex",
            "wandb/run-20260101_000000-ab/files/.mirrortune.json",
            ".thesis.claim",
        )
    },
    "a checkpoint with notes": Refused(
        f"{TRAIN} -o run --overwrite",
        ("checkpoints/step-000001/notes.txt",),
        file("run/checkpoints/step-000001/notes.txt"),
    ),
    "a merge with notes": Refused(
        "merge run -o merged --overwrite", ("not part of the merged model: notes.txt",), file("merged/notes.txt")
    ),
    "training over a merge": Refused(f"{TRAIN} -o merged --overwrite", ("merged is a merged model, not a run",)),
    "merging over another run": Refused(
        "merge run -o other --overwrite",
        ("other is a run, not a merged model",),
        lambda desk: shutil.copytree(desk / "run", desk / "other"),
    ),
    "a LoRA over a merge": Refused(
        "merge run --format lora -o merged --overwrite --rank 4", ("merged is a merged model, not a LoRA export",)
    ),
    "without --overwrite": Refused(
        f"{TRAIN} -o run", ("run: the output directory is not empty", "--resume", "--overwrite")
    ),
    "resuming what is no run": Refused(
        f"{TRAIN} -o mine --resume", ("mine holds no run",), file("mine/recipe.yaml", "a: 1")
    ),
    "resuming what was copied without its marker": Refused(
        f"{TRAIN} -o run --resume",
        ("run holds no run: there is no .mirrortune.json", "FOLDER/* leaves it out"),
        lambda desk: (desk / "run" / MARKER).unlink(),
    ),
    "resuming with an adapter elsewhere": Refused(
        f"{TRAIN} -o run --resume", ("run/adapter is a symbolic link to ../best",), adapter_elsewhere
    ),
    **{
        f"resuming with {name} elsewhere": Refused(
            f"{TRAIN} -o run --resume", (f"run/{name} is a symbolic link to ",), elsewhere(name)
        )
        for name in ("checkpoints", "checkpoints/step-000001", "reports", "tensorboard", "wandb")
    },
    "resuming with a linked database": Refused(
        f"{TRAIN} -o run --resume", ("run/mlflow.db is a symbolic link",), link("run/mlflow.db", "../thesis.txt")
    ),
    "a name that is needed while a run is replaced": Refused(
        f"{TRAIN} -o run --overwrite", ("run: .run.replaced is in the way",), file(".run.replaced/mine.txt")
    ),
    "a new output beside such a name": Refused(
        "merge run -o new", ("new: .new.replaced is in the way",), file(".new.replaced/mine.txt")
    ),
    "another's file in the place of the claim": Refused(
        "merge run -o new", ("it is not one of mirrortune's lock files",), file(".new.claim"), code=4
    ),
    "a comparison with recipes elsewhere": Refused(
        "compare -m model -t text-classification -d reviews.csv --methods mirror -o new",
        ("new: new/recipes is a symbolic link to ../model",),
        linked_comparison,
    ),
    "a pipe in the place of the claim": Refused(
        "merge run -o new",
        ("it is not one of mirrortune's lock files",),
        lambda desk: os.mkfifo(desk / ".new.claim"),
        code=4,
    ),
    "comparing in a run": Refused(
        "compare -m model -t text-classification -d reviews.csv --methods mirror -o run", ("holds no comparison",)
    ),
    # Outputs that are, contain or lie in what is read.
    "over the model": Refused(
        "train -m merged -t text-classification -d reviews.csv -o merged --overwrite",
        ("merged: it is the model that is read",),
    ),
    "in the model": Refused(f"{TRAIN} -o model/run", ("it lies in the model that is read: model",)),
    "over the data": Refused(
        f"{TRAIN.replace('reviews.csv', 'rows')} -o rows --overwrite", ("rows: it is the data that is read",), tables
    ),
    "among pictures": Refused(
        f"{TRAIN.replace('reviews.csv', 'pictures')} -o pictures/run", ("it lies in the data that is read",), pictures
    ),
    "over its own recipe": Refused(
        "train run/recipe.yaml --overwrite", ("the recipe that is read lies in it: run/recipe.yaml",)
    ),
    "around the pairs": Refused(
        f"{TRAIN} -o run --overwrite --pairing run/pairs.json",
        ("the pairs that is read lies in it",),
        file("run/pairs.json", "[[0, 1]]"),
    ),
    "merging over the run": Refused("merge run -o run --overwrite", ("run: the adapter that is read lies in it",)),
    "merging over the adapter": Refused("merge run -o run/adapter --overwrite", ("it is the adapter that is read",)),
    "merging among checkpoints": Refused("merge run -o run/checkpoints/mine", ("it lies in the run that is read",)),
    "merging over the base": Refused(
        "merge run --base merged -o merged --overwrite", ("it is the model that is read",)
    ),
    "exporting into the base": Refused(
        "merge run --format lora --base merged -o merged/lora", ("it lies in the model",)
    ),
    "a model that is linked to the output": Refused(
        "merge run --base linked -o merged --overwrite",
        ("merged: a link in the model that is read leads there: ", "/linked/"),
        lambda desk: linked(desk / "linked", desk / "merged"),
    ),
    "a model with a linked sub-folder": Refused(
        f"{TRAIN.replace('-m model', '-m linked')} -o run --overwrite",
        ("a link in the model that is read leads there: ", "linked/sub"),
        lambda desk: (linked(desk / "linked", desk / "model"), link("linked/sub", "../run")(desk)),
    ),
    "tables that are linked to the output": Refused(
        f"{TRAIN.replace('reviews.csv', 'tables')} -o run --overwrite",
        ("a link in the data that is read leads there: ", "tables/train.csv"),
        lambda desk: ((desk / "tables").mkdir(), link("tables/train.csv", "../run/predictions.safetensors")(desk)),
    ),
    "predictions over a linked table": Refused(
        "eval run -d tables --predictions a.csv --overwrite",
        ("a link in the data that is read leads there: ", "tables/test.csv"),
        lambda desk: (file("a.csv")(desk), (desk / "tables").mkdir(), link("tables/test.csv", "../a.csv")(desk)),
    ),
    # Names like those of what a killed process leaves, which the next command removes.
    "a name for old outputs": Refused(f"{TRAIN} -o .new.replaced", (".new.replaced is a name for temporary files",)),
    "a name for new outputs": Refused("merge run -o .a.mt-ab12cd34.partial", ("is a name for temporary files",)),
    "in a folder of such a name": Refused(
        f"{TRAIN} -o run/.adapter.mt-ab12cd34.partial/new",
        (".adapter.mt-ab12cd34.partial is a name for temporary files",),
    ),
    "the name of a claim": Refused("analyze run --figures .new.claim", (".new.claim is a name for temporary files",)),
    "predictions under such a name": Refused(
        f"{EVAL} --predictions run/.recipe.yaml.mt-ab12cd34.partial", ("is a name for temporary files",)
    ),
    # Files.
    "predictions over the data": Refused(
        f"{EVAL} --predictions reviews.csv --overwrite", ("it is the data that is read",)
    ),
    "predictions over another file": Refused(f"{EVAL} --predictions thesis.txt --overwrite", ("holds no predictions",)),
    "predictions there already": Refused(
        f"{EVAL} --predictions a.tsv", ("a.tsv already exists", "--overwrite"), file("a.tsv", "index\tprediction\n")
    ),
    "predictions through a link": Refused(
        f"{EVAL} --predictions l", ("l is a symbolic link",), link("l", "thesis.txt")
    ),
    "predictions into a pipe": Refused(
        f"{EVAL} --predictions pipe", ("pipe is not a regular file",), lambda desk: os.mkfifo(desk / "pipe")
    ),
    "predictions over the results": Refused(
        f"{EVAL} --predictions run/results.json", ("results.json belongs to the run",)
    ),
    "predictions in the data": Refused(
        "eval run -d rows --predictions rows/test.tsv", ("it lies in the data that is read",), tables
    ),
    "a page over another file": Refused("analyze model run -o thesis.txt", ("was not written by mirrortune",)),
    "a page in the model": Refused("analyze model run -o model/page.html", ("it lies in the model that is read",)),
    "a page through a link": Refused(
        "report run -o l.html", ("l.html is a symbolic link",), link("l.html", "thesis.txt")
    ),
    "figures over another": Refused(
        "analyze model run --figures figures",
        ("shares.png in figures is not from an earlier analysis",),
        file("figures/shares.png"),
    ),
    "figures in a run": Refused("analyze model run --figures run", ("run: the adapter that is read lies in it",)),
    "figures here": Refused("analyze model run --figures .", ("it is the working directory",)),
    "a recipe through a link": Refused(
        "recipes cp quickstart l.yaml --overwrite", ("l.yaml is a symbolic link",), link("l.yaml", "thesis.txt")
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_no_byte_is_changed(case: Refused, desk: Path) -> None:
    case.change(desk)
    before = tree(desk.parent)

    outcome = mirrortune(*case.words.split())

    assert (outcome.exit_code, outcome.stdout) == (case.code, ""), outcome.stderr
    for part in case.says:
        assert part in outcome.said
    assert "Traceback" not in outcome.stderr
    assert tree(desk.parent) == before


@pytest.mark.parametrize(
    ("words", "output"),
    [
        (f"{TRAIN} -o runs/new", "runs/new"),
        (f"{TRAIN} -o run --resume", "run"),
        ("merge run -o new/merged", "new/merged"),
        ("merge run --format lora --rank 4 -o lora", "lora"),
        ("compare -m model -t text-classification -d reviews.csv --methods mirror -o new", "new"),
        ("analyze model run -o page.html", "page.html"),
        ("analyze model run --figures figures", "figures"),
        (f"{EVAL} --predictions answers.tsv", "answers.tsv"),
    ],
)
def test_an_output_that_another_process_writes_is_refused(words: str, output: str, desk: Path) -> None:
    with claimed(Path(output)):
        before = tree(desk.parent)
        outcome = mirrortune(*words.split())
        assert outcome.exit_code == 2
        assert f"{output}: process {os.getpid()} on " in outcome.said
        assert "is writing there. Wait until it ends, or choose another with -o." in outcome.said
        assert tree(desk.parent) == before


@pytest.mark.slow
def test_two_runs_at_once_do_not_mix(desk: Path) -> None:
    """Two seeds, which have the same default folder."""
    words = [*TRAIN.split()[:-4], "--epochs", 4, "--batch-size", 4]
    processes = [start(*words, "--seed", seed) for seed in (1, 2)]
    outcomes = [finish(process) for process in processes]

    assert sorted(outcome.exit_code for outcome in outcomes) == [0, 2]
    refused = next(outcome for outcome in outcomes if outcome.exit_code)
    assert "is writing there" in refused.said or "the output directory is not empty" in refused.said
    (run,) = (desk / "runs").iterdir()
    seed = 1 + [outcome.exit_code for outcome in outcomes].index(0)
    assert f"seed: {seed}\n" in (run / "recipe.yaml").read_text(encoding="utf-8")
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluated = [event["step"] for event in events if event["event"] == "evaluate"]
    assert len(evaluated) == 5, "one before training and one for each epoch of one run"
    assert evaluated == sorted(set(evaluated))


def test_a_run_is_replaced_whole_and_only_when_the_new_one_is_saved(desk: Path) -> None:
    before = tree(desk / "run")
    failed = mirrortune(
        *TRAIN.split(), "-o", "run", "--overwrite", "--method", "full", "--lr", "1e29", "--max-steps", 3
    )
    assert (failed.exit_code, tree(desk / "run")) == (2, before), failed.stderr

    assert mirrortune(*TRAIN.split(), "-o", "run", "--overwrite", "--seed", 5).exit_code == 0
    of_merge = {str(desk / "run" / "reports"), str(desk / "run" / "reports" / "merge.json")}
    assert tree(desk / "run").keys() == before.keys() - of_merge, "every file of a run is listed"
    assert "seed: 5" in (desk / "run" / "recipe.yaml").read_text(encoding="utf-8")
    assert not list(desk.glob(".*"))


def test_a_card_of_a_person_is_kept_when_a_run_is_replaced(desk: Path) -> None:
    card = desk / "run" / "README.md"
    generated = card.read_bytes()
    for content in (generated + b"\nMy notes.\n", "# Caf\u00e9\r\n".encode("latin-1"), generated):
        card.write_bytes(content)
        done = mirrortune(*TRAIN.split(), "-o", "run", "--overwrite", "--seed", 6)
        assert done.exit_code == 0, done.stderr
        is_mine = content != generated
        assert ("is kept, as it was written or edited by hand" in done.said) is is_mine
        assert (card.read_bytes() == content) is is_mine


def test_a_merge_inside_its_run_is_safe_from_the_next_run(desk: Path) -> None:
    assert mirrortune("merge", "run", "-o", "run/merged").exit_code == 0
    assert mirrortune("merge", "run", "-o", "run/merged", "--overwrite").exit_code == 0
    before = tree(desk)
    outcome = mirrortune(*TRAIN.split(), "-o", "run", "--overwrite")
    assert outcome.exit_code == 2
    assert "not part of the run: merged/" in outcome.said
    assert tree(desk) == before


@pytest.mark.slow
def test_figures_are_added_to_others_and_replaced_by_their_own(desk: Path) -> None:
    file("figures/mine.png")(desk)
    for _ in range(2):
        assert mirrortune("analyze", "run", "--figures", "figures").exit_code == 0
    assert (desk / "figures" / "mine.png").read_text(encoding="utf-8") == "mine"
    marker = read_marker(desk / "figures")
    assert marker is not None
    assert marker.files == {path.name for path in (desk / "figures").glob("[!.]*")} - {"mine.png"}


def test_a_run_may_lie_beside_the_tables_of_its_data(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables(desk)
    monkeypatch.chdir(desk / "rows")
    assert mirrortune(*TRAIN.replace("reviews.csv", ".").replace("model", str(desk / "model")).split()).exit_code == 0


def test_what_a_killed_merge_left_is_removed_by_the_next(desk: Path) -> None:
    for name in (".merged.mt-ab12cd34.partial", ".merged.mt-ef56gh78.partial", ".mine.mt-ab12cd34.partial"):
        file(f"{name}/merged/model.safetensors", "half")(desk)
    for name in (".merged.mt-ab12cd34.partial", ".mine.mt-ab12cd34.partial"):
        write_marker(desk / name, Marker("unfinished", frozenset()))
    assert mirrortune("merge", "run", "-o", "merged", "--overwrite").exit_code == 0
    # One is no leftover of ours, the other is of another output.
    assert sorted(path.name for path in desk.glob(".*")) == [".merged.mt-ef56gh78.partial", ".mine.mt-ab12cd34.partial"]


def test_saving_adds_to_what_is_there(desk: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = library.attach(AutoModelForSequenceClassification.from_pretrained(desk / "model"))
    for name in ("adapter.json", "trainer_state.json", ".adapter.json.mt-ab12cd34.partial"):
        file(f"out/{name}")(desk)
    mine = [
        f"out/.adapter.json.{name}" for name in ("old.partial/a.txt", "mt-ef56gh78.partial/a.txt", "replaced/a.txt")
    ]
    for name in (*mine, "out/.adapter.safetensors.download.partial"):
        file(name)(desk)
    before = tree(desk)
    for _ in range(2):
        library.save_adapter(model, desk / "out")
    after = tree(desk)
    changed = {Path(name).name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed == {"adapter.json", "adapter.safetensors", ".adapter.json.mt-ab12cd34.partial"}
    assert sorted(p.name for p in (desk / "out").glob("[!.]*")) == [
        "adapter.json",
        "adapter.safetensors",
        "trainer_state.json",
    ]
    with pytest.raises(ConfigError, match="is a name for temporary files"):
        library.save_adapter(model, desk / ".out.replaced")
    with pytest.raises(ConfigError, match="it is a file"):
        library.save_adapter(model, desk / "thesis.txt")
    library.save_adapter(model, "~/saved")
    assert (Path.home() / "saved" / "adapter.json").is_file()
    with pytest.raises(ConfigError, match="cannot be used as a path"):
        library.save_adapter(model, "x" * 256)


def test_python_refuses_as_the_command_line_does(desk: Path) -> None:
    before = tree(desk)
    for place, said in (
        ("run", "lies in it"),
        (".", "working directory"),
        ("model", "not empty"),
        ("thesis.txt", "a file"),
    ):
        with pytest.raises(ConfigError, match=said):
            library.merge_adapter(None, "run", place)
    assert tree(desk) == before


def test_a_marker_from_elsewhere_gives_no_rights(desk: Path) -> None:
    """Of a downloaded folder, say: what it lists lies in the folder, and nothing above it is reached."""
    write_marker(desk / "model", Marker("merged model", frozenset({"../thesis.txt", "/etc/passwd", "config.json"})))
    before = tree(desk)
    outcome = mirrortune("merge", "run", "-o", "model", "--overwrite")
    assert outcome.exit_code == 2
    assert "not part of the merged model: " in outcome.said
    assert tree(desk) == before
    assert (desk / "model" / MARKER).is_file()


def test_a_copied_run_is_continued_where_it_lies(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not where it was copied from, which its recipe still names."""
    shutil.copytree(desk / "run", desk / "copy")
    before = tree(desk / "run")
    monkeypatch.chdir(desk.parent)
    outcome = mirrortune("train", "desk/copy/recipe.yaml", "--resume")
    assert outcome.exit_code == 0, outcome.stderr
    assert "writing to desk/copy" in outcome.said
    assert tree(desk / "run") == before


def test_what_file_managers_leave_goes_with_the_folder(desk: Path) -> None:
    for name in (
        "merged/.DS_Store",
        "merged/@eaDir/a/thumb.jpg",
        "merged/._config.json",
        "merged/desktop.ini",
        "new/.DS_Store",
    ):
        file(name)(desk)
    for words in ("merge run -o merged --overwrite", "merge run -o new"):
        outcome = mirrortune(*words.split())
        assert outcome.exit_code == 0, outcome.stderr
    assert not (desk / "merged" / "@eaDir").exists()


def test_a_run_that_may_only_be_read_is_merged(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(run: RunDirectory, name: str, data: object) -> None:
        raise ResourceError(str(run.path / name), "cannot be written (Read-only file system)")

    monkeypatch.setattr(RunDirectory, "write_json", refuse)
    outcome = mirrortune("merge", "run", "-o", "new")
    assert outcome.exit_code == 0, outcome.stderr
    assert "warning: this merge is not recorded: " in outcome.said
    assert "run/reports/merge.json cannot be written (Read-only file system)" in outcome.said


def test_links_elsewhere_in_what_is_read_are_fine(desk: Path) -> None:
    linked(desk / "linked", desk / "model")
    tables(desk)
    (desk / "rows" / "latest").symlink_to("../run")  # no table
    run = RunDirectory(desk / "run")
    read = [Input("model", desk / "linked"), Input("data", desk / "rows"), Input("run", desk / "run" / "adapter")]
    run.check(read[:2], overwrite=True, resume=False)
    (desk / "run" / "merged").mkdir()
    (desk / "run" / "merged" / "a").symlink_to("b")
    check_place(desk / "run" / "merged", [Input("run", desk / "run")])


def test_a_merge_is_not_recorded_through_a_link(desk: Path) -> None:
    """``merge.json`` is the name of a file of merged models too."""
    shutil.rmtree(desk / "run" / "reports")
    (desk / "run" / "reports").symlink_to("../merged")
    before = tree(desk / "merged")
    outcome = mirrortune("merge", "run", "-o", "new")
    assert (outcome.exit_code, tree(desk / "merged")) == (0, before), outcome.stderr
    assert "this merge is not recorded" in outcome.said


def test_a_folder_is_not_emptied_through_a_link(tmp_path: Path) -> None:
    file("best/adapter.json")(tmp_path)
    (tmp_path / "adapter").symlink_to("best")
    before = tree(tmp_path)
    discard(tmp_path / "adapter", is_ours=lambda _: True)
    with pytest.raises(ResourceError, match="symbolic link"):
        write_folder_atomically(tmp_path / "adapter", lambda folder: None, is_ours=lambda _: True)
    assert tree(tmp_path) == before


def test_a_finished_run_without_its_log_is_refused(desk: Path) -> None:
    (desk / "run" / "metrics.jsonl").unlink()
    outcome = mirrortune("train", "run/recipe.yaml", "--resume")
    assert outcome.exit_code == 5
    assert "run/metrics.jsonl: the events of the run are gone" in outcome.said


def test_a_folder_around_the_cache_is_refused_before_any_work(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIRRORTUNE_CACHE", str(desk / "new" / "cache"))
    outcome = mirrortune(*f"{TRAIN} -o new".split())
    assert outcome.exit_code == 2
    assert "new: the cache (MIRRORTUNE_CACHE) lies in it" in outcome.said
    assert not (desk / "new").exists()


def test_a_mount_point_is_written_into_and_never_replaced(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of ``docker run -v runs:/out``; beside it nothing may be written."""
    (desk / "above" / "out").mkdir(parents=True)
    mounted, ismount = desk / "above" / "out", os.path.ismount
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == mounted or ismount(path))
    assert "it is a mount point" in mirrortune("merge", "run", "-o", mounted).said
    first = mirrortune(*TRAIN.split(), "-o", mounted)
    assert first.exit_code == 0, first.stderr
    before = tree(desk)
    for words, said in (([], "is not empty"), (["--overwrite"], "it is a mount point")):
        outcome = mirrortune(*TRAIN.split(), "-o", mounted, *words)
        assert (outcome.exit_code, said in outcome.said, tree(desk) == before) == (2, True, True), outcome.stderr
    assert mirrortune("train", mounted / "recipe.yaml", "--resume").exit_code == 0
    assert [path.name for path in mounted.parent.iterdir()] == ["out"]
    assert not list(mounted.glob("*.claim"))


def test_what_is_replaced_stays_as_private_as_it_was(desk: Path) -> None:
    for _ in range(2):
        assert mirrortune(*f"{EVAL} --predictions a.tsv --overwrite".split()).exit_code == 0
        (desk / "a.tsv").chmod(0o600)
        for name in ("run", "merged"):
            (desk / name).chmod(0o700)
        assert mirrortune(*f"{TRAIN} -o run --overwrite".split()).exit_code == 0
        assert mirrortune("merge", "run", "-o", "merged", "--overwrite").exit_code == 0
        modes = [(desk / name).stat().st_mode & 0o777 for name in ("a.tsv", "run", "merged")]
        assert modes == [0o600, 0o700, 0o700]


def test_figures_that_cannot_be_written_leave_no_folder(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ResourceError("figures", "cannot be written (the disk is full)")

    monkeypatch.setattr("mirrortune.analyze.report.write_figures", fail)
    before = tree(desk)
    outcome = mirrortune("analyze", "run", "--figures", "figures")
    assert (outcome.exit_code, tree(desk)) == (4, before), outcome.stderr


def test_a_folder_for_predictions_is_made_where_a_slash_asks_for_it(desk: Path) -> None:
    before = tree(desk)
    assert mirrortune(*f"{EVAL} --split nothing --predictions answers/of/".split()).exit_code == 3
    assert not (desk / "answers" / "of").exists()
    outcome = mirrortune(*f"{EVAL} --predictions answers/of/".split())
    assert outcome.exit_code == 0, outcome.stderr
    assert [path.name for path in (desk / "answers" / "of").iterdir()] == ["train.tsv"]
    assert before.keys() <= tree(desk).keys()
