# SPDX-License-Identifier: Apache-2.0
"""What is said of models that an adapter does not fit in one way or another: exit codes and messages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file, save_file

from tests.cli.console import Outcome, mirrortune, reviews, write_table
from tests.tiny_models import tiny_causal, tiny_chat_tokenizer, write_tiny_causal, write_tiny_model


def run(command: str, model: Path, *words: object) -> Outcome:
    data = write_table(Path("reviews.csv"), reviews(20))
    return mirrortune(command, "-m", model, "-t", "text-classification", "-d", data, *words)


def test_a_pattern_of_which_a_part_matches_is_refused_with_the_nearest(desk: Path, tiny_model_dir: Path) -> None:
    outcome = run("train", tiny_model_dir, "--target-modules", "query|valve")
    assert outcome.exit_code == 2
    assert "'valve' (an alternative of 'query|valve') matches none of the 13 linear layers" in outcome.said
    assert "Nearest: value." in outcome.said
    assert "Put alternatives that may be absent in brackets: (a|b)" in outcome.said
    assert run("prepare", tiny_model_dir, "--target-modules", "(query|valve)", "--json").data["targets"] == 2


def test_what_is_left_alone_is_in_the_plan_and_in_the_adapter(desk: Path, tiny_model_dir: Path) -> None:
    outcome = run("train", tiny_model_dir, "-o", "run", "--max-steps", 1)
    assert "left alone: 3 (embedding, adapted on request only)" in outcome.stderr
    skipped = json.loads(Path("run/adapter/adapter.json").read_text(encoding="utf-8"))["skipped"]
    assert skipped["bert.embeddings.word_embeddings"] == "embedding, adapted on request only"
    assert len(skipped) == 3


def test_a_rank_above_that_of_some_layers_leaves_them_whole_and_says_which(desk: Path, tmp_path: Path) -> None:
    causal = tiny_causal()  # keys and values are 16 wide
    causal.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    tiny_chat_tokenizer().save_pretrained(tmp_path / "model")
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8, encoding="utf-8")
    outcome = mirrortune("prepare", "-m", tmp_path / "model", "-t", "causal-lm", "-d", "rows.jsonl", "--rank", 24)
    assert outcome.exit_code == 0
    assert "the rank is above min(out, in) of 4 layers, which keep all their directions: " in outcome.said
    assert "model.layers.0.self_attn.k_proj" in outcome.said


@pytest.mark.parametrize("place", ["the adapter's own", "--base"])
def test_a_base_of_other_shapes_is_refused(desk: Path, tmp_path: Path, place: str) -> None:
    base = write_tiny_model(tmp_path / "base")
    assert run("train", base, "-o", "run", "--max-steps", 1).exit_code == 0
    other = write_tiny_model(tmp_path / "wide", intermediate_size=96)
    words: tuple[object, ...] = ("--base", other)
    if place != "--base":
        shutil.rmtree(base)
        shutil.copytree(other, base)
        words = ()
    outcome = mirrortune("merge", "run", "-o", "merged", *words)
    assert outcome.exit_code == 5
    assert "was made for a weight of shape (64, 32), the base has one of shape (96, 32)" in outcome.said
    assert "intermediate.dense" in outcome.said
    assert "Use its own base model." in outcome.said
    assert not Path("merged").exists()


def diverge(*_: object, **__: object) -> None:
    raise torch.linalg.LinAlgError("did not converge")


def give_up(*_: object, **__: object) -> None:
    raise scipy.linalg.LinAlgError("did not converge")


def test_a_weight_that_does_not_converge_is_factorised_another_way_and_that_is_said(
    desk: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.linalg, "svd", diverge)
    outcome = run("prepare", tiny_model_dir, "--target-modules", "0.*query")
    assert outcome.exit_code == 0
    assert "query: LAPACK's gesdd did not converge on this weight, gesvd did" in outcome.said
    assert outcome.is_plain
    monkeypatch.setattr(scipy.linalg, "svd", give_up)
    monkeypatch.setattr(torch.linalg, "eigh", diverge)
    outcome = run("prepare", tiny_model_dir, "--target-modules", "1.*query")
    assert outcome.exit_code == 3
    assert "layer.1.attention.self.query: no algorithm finds the singular values of this weight" in outcome.said
    assert "Leave this layer out with --target-modules" in outcome.said


def rewrite(folder: Path, change: Any) -> Path:
    """Change every matrix of a model's checkpoint."""
    path = folder / "model.safetensors"
    save_file({n: change(t) if t.ndim == 2 else t for n, t in load_file(path).items()}, path, {"format": "pt"})
    return folder


@pytest.mark.slow
def test_weights_of_16_bits_are_loaded_in_others_and_merged_into_their_own(desk: Path, tmp_path: Path) -> None:
    for stored, loaded in (("float16", "auto"), ("float16", "bfloat16"), ("bfloat16", "float32")):
        base = write_tiny_model(tmp_path / f"{stored}-{loaded}", dtype=getattr(torch, stored))
        train = run("train", base, "-o", f"run-{stored}-{loaded}", "--max-steps", 2, f"model.dtype={loaded}", "--json")
        assert train.exit_code == 0
        merged = mirrortune("merge", train.data["run_dir"], "-o", f"merged-{stored}-{loaded}", "--json").data
        assert merged["verification"]["passed"]
        tensors = load_file(Path(f"merged-{stored}-{loaded}") / "model.safetensors")
        assert {t.dtype for n, t in tensors.items() if n.startswith("bert.")} == {getattr(torch, stored)}


def test_bare_float8_weights_are_merged_into_wider_ones(desk: Path, tmp_path: Path) -> None:
    base = rewrite(write_tiny_model(tmp_path / "float8"), lambda t: t.to(torch.float8_e4m3fn))
    assert run("train", base, "-o", "run", "--max-steps", 1).exit_code == 0
    assert mirrortune("merge", "run", "-o", "merged", "--json").data["verification"]["passed"]
    written = load_file("merged/model.safetensors")
    assert written["bert.encoder.layer.0.attention.self.query.weight"].dtype == torch.float32
    assert written["bert.embeddings.word_embeddings.weight"].dtype == torch.float8_e4m3fn


def test_a_pickle_of_more_than_tensors_is_refused_with_the_way_out(desk: Path, tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "pickle")
    state = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save({**state, "code": Path}, base / "pytorch_model.bin")
    outcome = run("train", base)
    assert outcome.exit_code == 2
    assert "a pickle that holds more than tensors, and would run code when loaded" in outcome.said
    assert "Take a revision with safetensors (--revision)" in outcome.said
    torch.save(state, base / "pytorch_model.bin")
    assert run("prepare", base, "--json").data["targets"] == 13


@pytest.mark.parametrize("load_in", ["4bit", pytest.param("8bit", marks=pytest.mark.slow)])
def test_a_quantised_base_is_trained_beside_and_merged_either_way(desk: Path, tmp_path: Path, load_in: str) -> None:
    pytest.importorskip("bitsandbytes")
    base = write_tiny_causal(tmp_path / "base", hidden_size=64, intermediate_size=128)
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 12, encoding="utf-8")
    words = ("-m", base, "-t", "causal-lm", "-d", "rows.jsonl", "--load-in", load_in, "-o", "run", "--max-steps", 2)
    trained = mirrortune("train", *words, "--rank", 8, "--json").data
    assert mirrortune("eval", "run", "--json").data["metrics"] == pytest.approx(trained["metrics"], rel=1e-3)
    merged = mirrortune("merge", "run", "-o", "merged")
    assert merged.exit_code == 0
    assert "dequantised (--base merges into full-precision weights instead)" in merged.said
    assert "quantization" not in Path("merged/config.json").read_text(encoding="utf-8")
    full = mirrortune("merge", "run", "-o", "full", "--base", base, "--json").data
    assert full["verification"]["passed"]
    refused = mirrortune("train", *words, "--overwrite", "--method", "full")
    assert refused.exit_code == 2
    assert "'full' trains every weight" in refused.said


def test_a_mixture_of_experts_trains_to_its_page(desk: Path, tmp_path: Path) -> None:
    write_tiny_causal(tmp_path / "experts", family="Mixtral", num_local_experts=3, num_experts_per_tok=2)
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8, encoding="utf-8")
    outcome = mirrortune(
        "train", "-m", tmp_path / "experts", "-t", "causal-lm", "-d", "rows.jsonl", "-o", "run", "--max-steps", 2
    )
    assert outcome.exit_code == 0, outcome.said
    assert "failed while attempting" not in outcome.said, "torch's log of an estimate that cannot be made"
    angles = json.loads(Path("run/validation.json").read_text(encoding="utf-8"))["angles"]
    assert len(angles["model.layers.0.mlp.experts.gate_up_proj"]) == 3 * 16, "one list for all experts"
    assert Path("run/report.html").is_file()
