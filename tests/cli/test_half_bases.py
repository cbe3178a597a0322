# SPDX-License-Identifier: Apache-2.0
"""Bases in 16 bits: what is trained of them is held in float32, in which small steps count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.console import mirrortune
from tests.tiny_models import tiny_causal, tiny_deberta, tiny_tokenizer, write_tiny_causal, write_tiny_model

FLAGS = ("--max-steps", 4, "--batch-size", 4, "--lr", "5e-5", "--json")
REVIEWS = "text,label\n" + "".join(f"the film was very {w},{w}\n" for w in ("good", "bad") * 8)


def trained(folder: Path, *words: object) -> dict[str, torch.Tensor]:
    """Train and return the tensors of the adapter file."""
    done = mirrortune("train", *words, "-o", folder, *FLAGS)
    assert done.exit_code == 0, done.said
    return load_file(folder / "adapter" / "adapter.safetensors")


def test_full_moves_a_16_bit_base_as_its_float32_copy(desk: Path) -> None:
    half = write_tiny_causal(desk / "half", tie_word_embeddings=False)
    tiny_causal(tie_word_embeddings=False).bfloat16().save_pretrained(half)  # type: ignore[operator]
    (desk / "lines.txt").write_text("the film was very good\nand the other one was bad\n" * 12)
    words = ("-m", half, "-t", "causal-lm", "-d", "lines.txt", "--method", "full")
    narrow = trained(desk / "narrow", *words, "model.dtype=bfloat16")
    wide = trained(desk / "wide", *words, "model.dtype=float32")

    assert {t.dtype for t in narrow.values()} == {torch.float32}
    assert narrow.keys() == wide.keys()
    assert all(torch.equal(tensor, wide[name]) for name, tensor in narrow.items())
    checkpoint = next((desk / "narrow" / "checkpoints").iterdir())
    moments = [t for file in checkpoint.glob("*.safetensors") for n, t in load_file(file).items() if ".exp_avg" in n]
    assert moments
    assert {t.dtype for t in moments} == {torch.float32}
    before = load_file(half / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert float((narrow[f"param.{name}"] != before[name].float()).float().mean()) > 0.9

    scores = [mirrortune("eval", run, "--json").data["metrics"] for run in ("narrow", "wide")]
    assert scores[0] == scores[1]
    said = [mirrortune("eval", run).said for run in ("narrow", "wide")]
    assert ["twice the memory of the base in bfloat16" in " ".join(text.split()) for text in said] == [True, False]
    for run in ("narrow", "wide"):
        assert mirrortune("merge", run, "-o", f"{run}-merged", "--json").data["verification"]["passed"]
    merged = [load_file(desk / f"{run}-merged" / "model.safetensors") for run in ("narrow", "wide")]
    assert {t.dtype for t in merged[0].values()} == {torch.bfloat16}
    assert all(torch.equal(tensor, merged[1][name]) for name, tensor in merged[0].items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_bitfit_holds_the_biases_of_a_16_bit_base_in_float32(desk: Path, dtype: str) -> None:
    (desk / "films.csv").write_text(REVIEWS)
    half = write_tiny_model(desk / "half", dtype=getattr(torch, dtype))
    words = ("-m", half, "-t", "text-classification", "-d", "films.csv", "--method", "bitfit", f"model.dtype={dtype}")
    found = trained(desk / "run", *words)
    assert {t.dtype for t in found.values()} == {torch.float32}
    assert mirrortune("merge", "run", "-o", "merged", "--json").data["verification"]["passed"]
    merged = load_file(desk / "merged" / "model.safetensors")
    assert {str(t.dtype) for t in merged.values()} == {f"torch.{dtype}"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_memory_of_full_is_that_of_float32(desk: Path, dtype: str) -> None:
    model = write_tiny_causal(desk / "llama")
    (desk / "a.txt").write_text("one line\nand another one\n" * 20)
    words = ("-m", model, "-t", "causal-lm", "-d", "a.txt", "--method", "full", "--dry-run", "--json")
    memory = mirrortune("prepare", *words, f"model.dtype={dtype}").data["memory"]
    total = mirrortune("prepare", *words).data["trainable_parameters"]
    assert memory["weights"] == pytest.approx(4 * total, rel=0.05)
    assert memory["gradients"] == 4 * total


def test_a_model_that_does_not_compute_in_16_bits_is_named(desk: Path) -> None:
    (desk / "reviews.csv").write_text(REVIEWS)
    tiny_deberta().save_pretrained(desk / "deberta")  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(desk / "deberta")
    words = ("train", "-m", "deberta", "-t", "text-classification", "-d", "reviews.csv", "-o", "run", *FLAGS)
    failed = mirrortune(*words, "--precision", "bf16")
    assert failed.exit_code == 4
    assert "error: train.precision: the model does not compute in 16 bits" in failed.said
    assert json.loads((desk / "run" / "status.json").read_text())["exit_code"] == 4
    assert mirrortune(*words, "--overwrite", "--precision", "fp32").exit_code == 0
