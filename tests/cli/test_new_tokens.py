# SPDX-License-Identifier: Apache-2.0
"""data.add_tokens: the tokenizer and the embeddings of a run, from prepare to what is merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mirrortune import load_adapter
from mirrortune.adapters.files.adapter_file import read_adapter
from tests.cli.console import mirrortune
from tests.spectral import relative
from tests.tiny_models import write_tiny_causal

TOKENS = "data.add_tokens=[<user>, Zweig, film]"


def words(command: str, model: Path, *more: object) -> list[object]:
    """A command line for classification with two new tokens and one that is known."""
    task = ["-m", model, "-t", "text-classification", "-d", "reviews.csv", TOKENS, "train.batch_size=16"]
    return [command, *task, *more]


def tokens_in(folder: Path) -> Any:
    """The tokenizer of a folder, by transformers alone."""
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.slow
def test_a_run_with_new_tokens_is_scored_answered_and_merged(desk: Path, tiny_model_dir: Path) -> None:
    text = (desk / "reviews.csv").read_text().replace(" the ", " <user> ").replace(" a ", " Zweig ")
    (desk / "reviews.csv").write_text(text)
    more = ("-o", "run", "--max-steps", 3, "train.save_every_steps=2", "train.keep=9", "adapter.also_train=[norms]")
    done = mirrortune(*words("train", tiny_model_dir, *more))
    assert done.exit_code == 0, done.said
    assert "in the vocabulary already, and not added: film" in done.said
    assert "64 in embeddings of new tokens" in done.said

    # Two rows alone are stored, and the base is what it was.
    size = len(tokens_in(tiny_model_dir))
    entry = f"bert.embeddings.word_embeddings.weight[{size}:{size + 2}]"
    adapter = read_adapter(desk / "run" / "adapter")
    assert adapter.plain[-1] == entry
    assert len(adapter.plain) == 11
    assert adapter.base["new_tokens"] == ["<user>", "Zweig"]
    rows = adapter.plain_tensors()[entry]
    assert rows.shape == (2, 32)
    before = load_file(tiny_model_dir / "model.safetensors")["embeddings.word_embeddings.weight"]
    assert not torch.equal(rows, before[:size].mean(dim=0).expand(2, -1))

    # A run that was killed after its second step goes on bit for bit.
    last = desk / "run" / "checkpoints" / "step-000003"
    once = read_adapter(last).tensors
    shutil.rmtree(last)
    assert mirrortune(*words("train", tiny_model_dir, *more, "--resume")).exit_code == 0
    again = read_adapter(last).tensors
    assert again.keys() == once.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in once.items())

    assert mirrortune("merge", "run", "-o", "merged").exit_code == 0
    merged = load_file(desk / "merged" / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
    assert torch.equal(merged[:size], before[:size])
    assert torch.equal(merged[size : size + 2], rows)
    assert torch.equal(merged[size + 2 :], before[size + 2 :])  # room that the base has beyond its vocabulary
    assert tokens_in(desk / "merged").tokenize("the <user> Zweig") == ["the", "<user>", "Zweig"]
    scores = [json.loads(mirrortune("eval", it, "-d", "reviews.csv", "--json").stdout) for it in ("run", "merged")]
    assert scores[0]["metrics"] == pytest.approx(scores[1]["metrics"], abs=1e-5)
    assert mirrortune("predict", "run", "-d", "reviews.csv", "-o", "answers.jsonl").exit_code == 0


# With room for more tokens in the model, and without.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own
@pytest.mark.parametrize(
    ("is_tied", "rows", "how"),
    [
        (True, 259, "hf"), pytest.param(False, 272, "lora", marks=pytest.mark.slow),
        pytest.param(True, 259, "lora", marks=pytest.mark.slow), pytest.param(False, 272, "hf", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_language_model_reads_and_writes_them(desk: Path, is_tied: bool, rows: int, how: str) -> None:
    if how == "lora":
        pytest.importorskip("peft")
    base = write_tiny_causal(desk / "base", tie_word_embeddings=is_tied, vocab_size=rows)
    (desk / "rows.jsonl").write_text("\n".join(json.dumps({"text": f"<user> says {n} to Zweig"}) for n in range(24)))
    done = mirrortune(
        "train", "-m", base, "-t", "causal-lm", "-d", "rows.jsonl", "data.add_tokens=[<user>, Zweig]", "-o", "run",
        "--max-steps", 2, "--rank", 4, "eval.samples=0", "train.batch_size=4",
    )  # fmt: skip
    assert done.exit_code == 0, done.said
    adapter = read_adapter(desk / "run" / "adapter")
    assert len(adapter.plain) == (1 if is_tied else 2)
    start = len(tokens_in(base))
    assert all(name.endswith(f"[{start}:{start + 2}]") for name in adapter.plain)

    done = mirrortune("merge", "run", "-o", "out", "--format", how)
    assert done.exit_code == 0, done.said
    tokenizer = tokens_in(desk / "out")
    ids = tokenizer("<user> says no to Zweig", return_tensors="pt").input_ids
    assert int((ids >= start).sum()) == 2

    assert len(tokenizer) == start + 2

    adapted = load_adapter(AutoModelForCausalLM.from_pretrained(base), desk / "run").eval()
    assert adapted.config.vocab_size == max(rows, start + 2)
    if how == "hf":
        found = AutoModelForCausalLM.from_pretrained(desk / "out")
        before = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
        after = load_file(desk / "out" / "model.safetensors")["model.embed_tokens.weight"]
        assert "in_memory" not in json.loads((desk / "out" / "merge.json").read_text())
        assert torch.equal(after[:start], before[:start])
        assert torch.equal(after[start : start + 2], adapter.plain_tensors()[adapter.plain[0]])
    else:
        from peft import AutoPeftModelForCausalLM

        found = AutoPeftModelForCausalLM.from_pretrained(desk / "out")
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        assert relative(found.eval()(input_ids=ids).logits, expected) <= 1e-5


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["data.add_tokens=[a b]"], "data.add_tokens"),
        (["data.add_tokens=[<u>, <u>]"], "data.add_tokens: '<u>' is given twice"),
        ([TOKENS, "--method", "vera"], "data.add_tokens: PEFT's files of method 'vera' have no place for them"),
        ([TOKENS, "--target-modules", "word_embeddings"], "which adapter.target_modules adapts"),
        ([TOKENS, "task.kind=image-classification"], "data.add_tokens: image-classification reads no text"),
    ],
)
def test_what_has_no_meaning_is_refused_before_weights_are_read(
    desk: Path, tiny_model_dir: Path, more: list[str], said: str
) -> None:
    kind = [] if "task.kind=image-classification" in more else ["-t", "text-classification"]
    done = mirrortune("prepare", "-m", tiny_model_dir, "-d", "reviews.csv", "--dry-run", *kind, *more)
    assert done.exit_code == 2
    assert said in done.said


@pytest.mark.slow
def test_a_method_that_trains_the_whole_matrix_trains_the_new_rows_with_it(desk: Path, tiny_model_dir: Path) -> None:
    more = ("adapter.also_train=[embeddings]", "--max-steps", 1)
    done = mirrortune(*words("train", tiny_model_dir, "-o", "run", *more))
    assert done.exit_code == 0, done.said
    assert not any("[" in name for name in read_adapter(desk / "run" / "adapter").plain)
    assert mirrortune("merge", "run", "-o", "merged").exit_code == 0
    assert len(tokens_in(desk / "merged")) == len(tokens_in(tiny_model_dir)) + 2
