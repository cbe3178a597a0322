# SPDX-License-Identifier: Apache-2.0
"""Every index that inputs can take is checked against the model's tables before its weights are read."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from mirrortune.runs.index_checks import Lengths, count_in_rows, longest
from tests.cli.console import Outcome, mirrortune, reviews, write_table
from tests.tiny_models import FAMILIES, tiny_chat_tokenizer, tiny_tokenizer, write_tiny_causal, write_tiny_model

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
         "max_position_embeddings": 34, "vocab_size": 50}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 34}
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 50,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
        "max_position_embeddings": 34}  # fmt: skip


def prepare(model: Path, kind: str, data: object, *words: object) -> Outcome:
    """A dry run, which reads no weights."""
    for file in model.glob("*.safetensors"):
        file.unlink()
    return mirrortune("prepare", "-m", model, "-t", kind, "-d", data, "--dry-run", *words)


@pytest.mark.parametrize(
    ("family", "auto", "fields", "limit"),
    [
        ("Bert", "AutoModelForSequenceClassification", {}, 34),
        ("Roberta", "AutoModelForSequenceClassification", {"pad_token_id": 1}, 32),
        ("MPNet", "AutoModelForSequenceClassification", {"pad_token_id": 1}, 32),
        ("OPT", "AutoModelForCausalLM", {"ffn_dim": 64, "word_embed_proj_dim": 32}, 34),
        ("GPT2", "AutoModelForCausalLM", GPT, 34),
        ("Llama", "AutoModelForCausalLM", {"num_key_value_heads": 2}, 60),
    ],
)
def test_the_longest_rows_are_known_without_weights(family: str, auto: str, fields: dict[str, Any], limit: int) -> None:
    with torch.device("meta"):
        config = getattr(transformers, f"{family}Config")(**{**SIZES, **fields})
        model = getattr(transformers, auto).from_config(config)
    probe = {"input_ids": torch.full((2, 9), 7), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    assert longest(model, probe, Lengths(tokens=60)) == Lengths(tokens=limit)


def test_decoders_have_limits_of_their_own() -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForSeq2SeqLM.from_config(transformers.BartConfig(**BART))
    ids = torch.full((1, 9), 7)
    probe = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids}
    assert longest(model, probe, Lengths(tokens=20, targets=50)) == Lengths(tokens=20, targets=34)


def test_positions_that_begin_behind_the_padding_are_not_overrun(desk: Path, tmp_path: Path) -> None:
    model = tmp_path / "roberta"
    config = transformers.RobertaConfig(**{**SIZES, "vocab_size": 128, "pad_token_id": 0})
    transformers.RobertaModel(config).save_pretrained(model)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 10**30
    tokenizer.save_pretrained(model)
    write_table(desk / "long.csv", [(" ".join([text] * 9), label) for text, label in reviews(40)])

    refused = prepare(model, "text-classification", "long.csv", "--max-length", 34)
    shortened = prepare(model, "text-classification", "long.csv")

    assert refused.exit_code == 2
    assert "data.max_length: got 34, the model takes at most 33 tokens" in refused.said
    assert "the model has positions for 33 tokens: longer rows are cut" in shortened.said
    assert "truncated to 33" in shortened.said


def test_tokens_that_the_model_has_no_embedding_for_are_named(desk: Path, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "bert", vocab_size=len(tiny_tokenizer()))
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["zzz", "qqq", "unused"])
    tokenizer.save_pretrained(model)
    known, last = reviews(60), len(tiny_tokenizer())
    write_table(desk / "known.csv", known)
    write_table(desk / "new.csv", [(f"zzz {text} qqq", label) for text, label in known])

    assert prepare(model, "text-classification", "known.csv").exit_code == 0, "tokens that no row has do no harm"
    outcome = prepare(model, "text-classification", "new.csv")

    assert outcome.exit_code == 2
    assert f"has {last} rows, none for 2 tokens of the train rows: zzz ({last}), qqq ({last + 1})" in outcome.said
    assert f"token ids 0 to {last - 1}" in outcome.said


def test_a_padding_token_beyond_the_embedding_is_not_used(desk: Path, tmp_path: Path) -> None:
    model = write_tiny_causal(tmp_path / "late", vocab_size=259)
    tokenizer = tiny_chat_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 259
    tokenizer.save_pretrained(model)
    rows = [{"prompt": "a" * i, "completion": "b"} for i in range(1, 13)]
    (desk / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_table(desk / "reviews.csv", reviews(40))
    assert prepare(model, "causal-lm", "rows.jsonl", "--batch-size", 4).exit_code == 0
    assert prepare(model, "text-classification", "reviews.csv").exit_code == 0


@pytest.mark.parametrize("place", ["config.json", "generation_config.json", None])
def test_the_end_token_may_stand_in_the_configuration(desk: Path, tmp_path: Path, place: str | None) -> None:
    model = write_tiny_causal(tmp_path / "endless", eos_token_id=None)
    tokenizer = tiny_chat_tokenizer(eos=None)
    tokenizer.save_pretrained(model)
    (model / "generation_config.json").unlink(missing_ok=True)
    if place:
        file = model / place
        known = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps({**known, "eos_token_id": [258, 256]}))
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 8
    (desk / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    outcome = prepare(model, "causal-lm", "rows.jsonl")

    if place:
        assert outcome.exit_code == 0, outcome.stderr
    else:
        assert outcome.exit_code == 2
        assert "Set eos_token" in outcome.said


def test_families_of_the_tests_take_all_their_positions() -> None:
    probe = {"input_ids": torch.full((1, 9), 7), "attention_mask": torch.ones(1, 9, dtype=torch.long)}
    found = {name: longest(make(), probe, Lengths(tokens=90)).tokens for name, make in FAMILIES.items()}
    assert found == {"bert": 64, "roberta": 65, "albert": 64, "distilbert": 64}


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BART whose words are those of the tiny tokenizer, which ends texts with [SEP], the end token."""
    model = tmp_path_factory.mktemp("bart") / "model"
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3}
    config = transformers.BartConfig(**{**BART, "vocab_size": 128, "max_position_embeddings": 64}, **tokens)
    transformers.BartModel(config).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    return model


@pytest.mark.parametrize("kind", ["text-classification", "regression"])
def test_classifiers_that_read_the_end_token_need_a_tokenizer_that_adds_it(desk: Path, bart: Path, kind: str) -> None:
    from tests.tiny_models import write_tiny_seq2seq

    rows = [(text, {"up": "1", "down": "0"}.get(label, label)) for text, label in reviews(40)]
    rows = [(text, str(place % 5)) for place, (text, _) in enumerate(rows)] if kind == "regression" else rows
    write_table(desk / "rows.csv", rows)

    refused = prepare(write_tiny_seq2seq(desk / "t5"), kind, "rows.csv")

    assert refused.exit_code == 2
    assert "reads the state at the end token '<|im_end|>', which its tokenizer does not add" in refused.said
    assert mirrortune("prepare", "-m", bart, "-t", kind, "-d", "rows.csv", "--dry-run").exit_code == 0


def test_texts_that_hold_the_end_token_are_named_in_training_and_prediction(desk: Path, bart: Path) -> None:
    rows = reviews(40)
    write_table(desk / "rows.csv", rows)
    write_table(desk / "odd.csv", [*rows[:38], ("a good [SEP] film", rows[38][1]), rows[39]])
    write_table(desk / "later.csv", [("the film", "x"), ("[SEP] bad", "x"), ("a plot", "x")])
    words = ("-m", bart, "-t", "text-classification", "--max-steps", 1, "-d")

    refused = mirrortune("train", *words, "odd.csv")
    trained = mirrortune("train", *words, "rows.csv", "-o", "run")
    predicted = mirrortune("predict", "run", "-d", "later.csv", "-o", "out.csv", "--on-error", "skip")

    assert refused.exit_code == 3
    assert "1 row with 2 in place of 1 end tokens '[SEP]'" in refused.said
    assert "a good [SEP] film" in refused.said
    assert trained.exit_code == 0, trained.stderr
    assert predicted.exit_code == 0, predicted.stderr


def test_the_end_tokens_of_later_rows_of_a_stream_are_counted(desk: Path, bart: Path) -> None:
    rows = reviews(1010)
    write_table(desk / "scored.csv", rows[:20])
    lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in rows]
    lines[1004] = lines[1004].replace("the ", "[SEP] ").replace("a ", "[SEP] ")
    (desk / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    words = ("-m", bart, "-t", "text-classification", "-d", "rows.jsonl", "data.streaming=true", "--max-steps", 1)

    refused = mirrortune("train", *words, "data.validation_path=scored.csv", "-o", "run", "eval.before=false")

    assert refused.exit_code == 3
    assert "rows.jsonl (a block of the stream): 1 row with 2 in place of 1 end tokens '[SEP]'" in refused.said


def test_the_end_tokens_of_many_rows_are_counted_in_little_memory() -> None:
    """The ids of millions of rows lie on disk."""
    ids = np.ones(10_000_000, np.int32)
    ids[[3, 4, 2_000_000, 9_999_999]] = 7
    rows = SimpleNamespace(features={"input_ids": ids}, offsets=np.array([0, 4, 4, 5, 9_000_000, 10_000_000]))
    tracemalloc.start()

    counts = count_in_rows(rows, 7)  # type: ignore[arg-type]

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts.tolist() == [1, 0, 1, 1, 1]
    assert peak < len(ids)
