# SPDX-License-Identifier: Apache-2.0
"""Every kind of task from the command line, on tiny models: a rule is learned, scored again and survives merging."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from mirrortune.merging.parcel import merged_parcel, read_report
from tests.cli.console import mirrortune, write_lines
from tests.tiny_models import tiny_tokenizer, write_tiny_audio, write_tiny_model, write_tiny_seq2seq

Rows = list[dict[str, Any]]
_PLAIN = ("the", "a", "plot", "is", "was", "very")


def learn(model: Path, kind: str, rows: Rows, *words: object) -> dict[str, float]:
    """Train on rows, score the run, merge it, and score what was merged: all three agree. Returns the metrics."""
    data = write_lines(Path("rows.jsonl"), rows)
    flags = ["-m", model, "-t", kind, "-d", data, "-o", "run", "--batch-size", 8, "--head-lr", "1e-2", "--json", *words]
    trained = mirrortune("train", *flags)
    metrics = trained.data["metrics"]
    assert mirrortune("eval", "run", "--json").data["metrics"] == pytest.approx(metrics, abs=1e-4)
    merged = mirrortune("merge", "run", "-o", "merged", "--json").data
    assert merged["verification"]["passed"]
    assert mirrortune("eval", "merged", "--json").data["metrics"] == pytest.approx(metrics, abs=1e-3)
    return {str(name): float(value) for name, value in metrics.items()}


def test_token_classification(desk: Path, tiny_model_dir: Path) -> None:
    draw = random.Random(0)
    rows: Rows = []
    for _ in range(120):
        words = [draw.choice((*_PLAIN, "good", "bad")) for _ in range(draw.randrange(2, 9))]
        tags = [{"good": "B-UP", "bad": "B-DOWN"}.get(word, "O") for word in words]
        rows.append({"tokens": words, "ner_tags": tags})
    metrics = learn(tiny_model_dir, "token-classification", rows, "--epochs", 4)
    assert metrics["entity_f1"] >= 0.8
    assert metrics["tag_accuracy"] >= 0.9


def test_anchors_and_their_texts(desk: Path, tiny_model_dir: Path) -> None:
    draw, rows = random.Random(0), list[dict[str, Any]]()
    for i in range(120):
        one, other = (("good", "great"), ("bad", "awful"))[i % 2]
        rows.append({"anchor": f"the {draw.choice(_PLAIN)} film is {one}", "positive": f"{other} {i % 20}"})
    metrics = learn(tiny_model_dir, "sentence-similarity", rows, "--epochs", 3)
    assert set(metrics) == {"ndcg_at_10", "mrr_at_10", "recall_at_1", "recall_at_10", "loss"}
    merged = {path.relative_to("merged").as_posix() for path in Path("merged").rglob("*") if path.is_file()}
    assert {"modules.json", "1_Pooling/config.json"} <= merged
    report = read_report(Path("merged"))
    assert merged - {".mirrortune.json"} == set(report["files"])
    sent = merged_parcel(Path("merged"), report, Path("staged")).files
    for name in ("modules.json", "1_Pooling/config.json"):
        assert json.loads(sent[name].read_text()) == json.loads(Path("merged", name).read_text())


def test_scored_pairs_and_their_cosines(desk: Path, tiny_model_dir: Path) -> None:
    draw, rows = random.Random(0), list[dict[str, Any]]()
    for i in range(120):
        text = f"the {draw.choice(_PLAIN)} film is {draw.choice(('good', 'bad'))}"
        other = f"{draw.choice(_PLAIN)} movie was not {draw.choice(('long', 'dull'))}"
        rows.append({"sentence1": text, "sentence2": text if i % 3 == 0 else other, "score": float(i % 3 == 0)})
    metrics = learn(tiny_model_dir, "sentence-similarity", rows, "--epochs", 4, "eval.before=true")
    assert metrics["spearmanr"] > 0.5
    results = json.loads(Path("run/results.json").read_text())
    assert results["metrics"]["loss"] < results["metrics_before"]["loss"]
    one = mirrortune("predict", "run", "--text", "the film", "--format", "jsonl").data["prediction"]
    corpus = write_lines(Path("corpus.jsonl"), [{"sentence1": "the film"}, {"sentence1": "a movie"}])
    mirrortune("predict", "run", "-d", corpus, "-o", "embedded.jsonl")
    embedded = [json.loads(line)["prediction"] for line in Path("embedded.jsonl").read_text().splitlines()]
    assert [len(vector) for vector in embedded] == [32, 32]
    assert embedded[0] == pytest.approx(one, abs=1e-5)
    other = write_lines(Path("other.jsonl"), [{"id": 7, "body": "the film"}])
    for target in ("run", "merged"):  # whatever the column is called, and by a model that has no run
        words = ("-t", "sentence-similarity") if target == "merged" else ()
        named = mirrortune("predict", target, *words, "-d", other, "--format", "jsonl")
        assert named.data["prediction"] == pytest.approx(one, abs=1e-4)
        with_flag = mirrortune("predict", target, *words, "-d", other, "--text-column", "body", "--format", "jsonl")
        assert with_flag.data["prediction"] == named.data["prediction"]
        alone = mirrortune("predict", target, *words, "--text", "the film", "--format", "jsonl")
        assert alone.data["prediction"] == pytest.approx(one, abs=1e-4)
    mirrortune("eval", "run", "--predictions", "p.tsv")
    cosines = [float(line.split("\t")[1]) for line in Path("p.tsv").read_text().splitlines()[1:]]
    assert len(cosines) == 12
    assert all(abs(cosine) <= 1 + 1e-6 for cosine in cosines), "all digits of unit vectors in float32"


@pytest.mark.parametrize("kind", ["sentence-similarity", "multiple-choice"])
def test_a_shorter_length_is_among_the_ways_to_fit(
    desk: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_tiny_model(tmp_path / "long", max_position_embeddings=2048)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 2048
    tokenizer.save_pretrained(model)
    text = "film good " * 700
    rows = [{"anchor": f"{text} {i}", "positive": f"a {i}"} for i in range(20)]
    if kind == "multiple-choice":
        rows = [{"question": f"{text} {i}", "choices": ["a", "the"], "label": 0} for i in range(20)]
    monkeypatch.setenv("MIRRORTUNE_DEVICE_MEMORY", "0.04")
    data = write_lines(Path("rows.jsonl"), rows)
    flags = ["-m", model, "-t", kind, "-d", data, "--max-length", 2000, "--batch-size", 1]
    outcome = mirrortune("prepare", *flags, "--dry-run")
    assert outcome.exit_code == 4
    assert "--max-length" in outcome.stderr


def test_question_answering(desk: Path, tiny_model_dir: Path) -> None:
    draw = random.Random(0)
    rows: Rows = []
    for i in range(160):
        words = [draw.choice(_PLAIN) for _ in range(draw.randrange(3, 12))]
        answer = draw.choice(("good", "bad", "awful"))
        if i % 4:
            words.insert(draw.randrange(len(words)), answer)
        context = " ".join(words)
        found = (
            {"text": [answer], "answer_start": [context.index(answer)]} if i % 4 else {"text": [], "answer_start": []}
        )
        rows.append({"question": "was it ?", "context": context, "answers": found})
    metrics = learn(tiny_model_dir, "question-answering", rows, "--epochs", 8, "--max-length", 48, "data.stride=8")
    assert metrics["exact_match"] >= 0.6, "one word of about nine by chance"


def test_multiple_choice(desk: Path, tiny_model_dir: Path) -> None:
    draw = random.Random(0)
    rows: Rows = []
    for _ in range(120):
        label = draw.randrange(3)
        endings = [f"{draw.choice(_PLAIN)} {'good' if i == label else draw.choice(('bad', 'dull'))}" for i in range(3)]
        rows.append({"sent1": "the film", "sent2": "it was", "label": label}
                    | {f"ending{i}": text for i, text in enumerate(endings)})  # fmt: skip
    assert learn(tiny_model_dir, "multiple-choice", rows, "--epochs", 6)["accuracy"] >= 0.6, "a third by chance"


def test_seq2seq(desk: Path, tmp_path: Path) -> None:
    model = write_tiny_seq2seq(tmp_path / "tiny-t5")
    draw = random.Random(0)
    verdicts = {"good": "up", "bad": "down"}
    rows: Rows = []
    for _ in range(96):
        word = draw.choice(("good", "bad"))
        rows.append({"document": f"{draw.choice(_PLAIN)} film was {word}", "summary": verdicts[word] * 2})
    flags = [
        "--method",
        "full",
        "--epochs",
        12,
        "--lr",
        "1e-2",
        "data.max_target_length=12",
        "task.metrics=[rouge1, bleu]",
    ]
    metrics = learn(model, "seq2seq", rows, *flags)
    assert metrics["rouge1"] >= 0.6, "nothing is right by chance"
    written = [json.loads(line) for line in (desk / "run" / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len({sample["step"] for sample in written}) >= 12
    for sample in written[-3:]:
        assert "film was" in sample["prompt"]
        assert sample["expected"] in ("upup", "downdown")
        assert sample["answer"]


def test_several_labels(desk: Path, tiny_model_dir: Path) -> None:
    draw = random.Random(0)
    rows: Rows = []
    for _ in range(120):
        topics = [topic for topic in ("good", "dull", "film") if draw.random() < 0.5]
        words = [*topics, *(draw.choice(_PLAIN) for _ in range(3))]
        draw.shuffle(words)
        rows.append({"text": " ".join(words), "labels": topics})
    assert learn(tiny_model_dir, "text-classification", rows, "--epochs", 10)["f1_micro"] >= 0.8


def test_audio_classification(desk: Path, tmp_path: Path) -> None:
    model = write_tiny_audio(tmp_path / "tiny-wav2vec2")
    random_ = np.random.default_rng(0)
    for label, amplitude in (("loud", 0.5), ("still", 0.0)):
        for number in range(24):
            # Silence and noise: extractors take out the volume itself.
            wave = random_.normal(0, 0.1, 1600) * (np.arange(1600) % 2 if amplitude else 1)
            path = Path("sounds") / label / f"{number}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, wave, 16000)
    flags = ["-m", model, "-t", "audio-classification", "-d", "sounds", "-o", "run", "--head-lr", "1e-2", "--json"]
    trained = mirrortune("train", *flags, "--epochs", 10, "--batch-size", 8, "data.max_seconds=0.2").data
    assert trained["metrics"]["accuracy"] >= 0.75, "half by chance"
    merged = mirrortune("merge", "run", "-o", "merged", "--json").data
    assert merged["verification"]["passed"]
    assert mirrortune("eval", "merged", "--json").data["metrics"] == pytest.approx(trained["metrics"], abs=1e-3)
