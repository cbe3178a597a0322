# SPDX-License-Identifier: Apache-2.0
"""ranks, sharding, factor_cache: what two processes do together. They run once, as ``tests/two_ranks.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mirrortune.errors import PeerError, ResourceError
from mirrortune.system.distributed.sharding import ties_in_one_unit
from mirrortune.system.distributed.sync import StopVote, from_main, gather_lists, told_once
from mirrortune.system.signals import StopSignals
from tests.cli.console import mirrortune, reviews, write_table
from tests.laws.test_training_laws import differences
from tests.tiny_models import WORDS, tiny_causal, write_tiny_model, write_tiny_seq2seq
from tests.tiny_runs import make_accelerator, make_trainer
from tests.two_ranks import PARTS, bases, compared_rows, found_by_each, launch

# As accelerate launch sets it for the profile fsdp2.
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def launch_sharded(folder: Path, *words: object, precision: str = "no") -> str:
    """What two processes under FSDP2 print to stdout."""
    process = launch("two_ranks", folder, *words, env={**FSDP, "ACCELERATE_MIXED_PRECISION": precision})
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Where the two processes worked, and what each of them found."""
    folder = tmp_path_factory.mktemp("pair")
    launch_sharded(folder)
    return folder, found_by_each(folder)


Pair = tuple[Path, list[dict[str, Any]]]


def test_two_processes_take_part(pair: Pair) -> None:
    assert [found["count"] for found in pair[1]] == [2, 2]


def test_what_the_main_process_makes_all_have(pair: Pair) -> None:
    for found in pair[1]:
        assert found["meetings"]["made"] == "by 0"
        assert found["meetings"]["gathered"] == [0, 1, 1]
        assert found["meetings"]["copied"] == [1, 1]


def test_when_the_main_process_fails_the_others_end_in_silence(pair: Pair) -> None:
    main, other = (found["meetings"] for found in pair[1])
    assert main["failed"] == ["ResourceError", 4]
    assert other["failed"] == ["PeerError", 4]
    assert (main["failed together"], other["failed together"]) == (["ResourceError", 4], ["PeerError", 4])
    assert (main["told"], other["told"]) == ([False, 4], [True, 4])


def test_a_signal_to_one_stops_all_at_the_same_poll(pair: Pair) -> None:
    assert pair[1][0]["votes"] == pair[1][1]["votes"] == [0, 0, 15, 15, 15]


def test_nothing_is_factorised_twice_and_the_faster_one_helps(pair: Pair) -> None:
    one, other = (found["factors"] for found in pair[1])
    assert one["misses"] + other["misses"] == 12
    assert one["hits"] + other["hits"] == 12 + other["shared"] + one["shared"]
    assert one["shared"] > 6 > other["shared"] > 0


def test_bases_are_measured_on_the_batches_of_all_processes(pair: Pair) -> None:
    one, other = (found["bases"] for found in pair[1])
    assert other == []
    torch.testing.assert_close(torch.tensor(one), torch.tensor(bases(make_accelerator())), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", range(len(PARTS)))
def test_rows_are_compared_with_those_of_all_processes(pair: Pair, case: int) -> None:
    expected = torch.tensor(compared_rows(make_accelerator(), [[0, 1, 2, 3, 4]]))
    one, other = (torch.tensor(found["compared"][case]) for found in pair[1])
    torch.testing.assert_close(one[:, :2], expected[:, :2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one[:, 2:] + other[:, 2:], expected[:, 2:], rtol=1e-5, atol=1e-6)


def test_frozen_weights_and_factors_are_cut_and_nothing_else_is_copied(pair: Pair) -> None:
    runs = pair[1][0]["runs"]
    assert runs["replicated"] == []
    assert "bert.encoder.layer.0.attention.self.query.U" in runs["sharded"]
    assert "bert.encoder.layer.1.output.dense.Vh" in runs["sharded"]


def test_sharded_training_is_that_of_one_process(pair: Pair, tmp_path: Path) -> None:
    folder, found = pair
    trainer = make_trainer(tmp_path / "one", max_steps=8, save_every_steps=3, batch_size=8)
    assert found[0]["runs"]["plain"] == pytest.approx(trainer.fit().metrics, rel=1e-6)
    for kind in ("adapter", "training"):
        path = Path("checkpoints", "step-000008", f"{kind}.safetensors")
        sharded, whole = load_file(folder / "plain" / path), load_file(tmp_path / "one" / path)
        # What a layer does to its weight can be probed only where it is whole.
        probes = {"effects", "signs"} & whole.keys()
        sketches = {"sketch"} if probes else set[str]()
        assert {n for n in sharded if not n.startswith("random.1.")} == (whole.keys() - probes) | sketches
        for name, tensor in whole.items():
            if not name.startswith("random.") and name not in probes:
                torch.testing.assert_close(sharded[name], tensor, rtol=1e-4, atol=1e-6)


def test_of_a_low_rank_no_shares_of_factors_are_stored(pair: Pair) -> None:
    folder, _ = pair
    names = load_file(folder / "low" / "adapter" / "adapter.safetensors").keys()
    assert "core.theta" in names
    assert [name for name in names if name.startswith("factor.")] == []


def test_a_sharded_run_that_was_stopped_goes_on_bit_for_bit(pair: Pair) -> None:
    folder, found = pair
    assert "SIGTERM stopped it after step 7 of 8" in found[0]["runs"]["stopped"]  # a step after it came
    assert found[1]["runs"]["stopped"] == "peer 143"
    assert [f["runs"]["differing"] for f in found] == [[], []]
    assert differences(folder / "whole", folder / "cut") == []


# Numbers of PEFT's that FSDP2 has cut, and an embedding that encoder, decoder and output share.
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mirror", "lora", "dora", "encoder and decoder"])
def test_a_sharded_command_is_that_of_one_process(tmp_path: Path, kind: str) -> None:
    words: list[object] = ["train", "--epochs", 2, "--lr", 0.05, "--json"]
    if kind == "encoder and decoder":
        (tmp_path / "rows.jsonl").write_text(
            "".join(json.dumps({"source": f"say {w}", "target": w}) + "\n" for w in WORDS[:33]), encoding="utf-8"
        )
        words += ["-m", write_tiny_seq2seq(tmp_path / "model"), "-t", "seq2seq", "-d", tmp_path / "rows.jsonl"]
    else:
        words += ["-m", write_tiny_model(tmp_path / "model"), "-t", "text-classification", "--method", kind]
        words += ["-d", write_table(tmp_path / "reviews.csv", reviews(61))]
    two = json.loads(launch_sharded(tmp_path, *words, "-o", tmp_path / "two", "--batch-size", 4))
    one = mirrortune(*words, "-o", tmp_path / "one", "--batch-size", 8).data
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-5)
    assert two["trainable_parameters"] == one["trainable_parameters"]
    assert mirrortune("eval", tmp_path / "two", "--json").data["metrics"] == pytest.approx(two["metrics"], rel=1e-5)
    assert mirrortune("merge", tmp_path / "two", "-o", tmp_path / "merged", "--json").data["verification"]["passed"]


@pytest.mark.slow
def test_what_is_trained_in_shards_is_not_rounded_to_16_bits(tmp_path: Path) -> None:
    """PSOFT puts its parameters into a matrix in float32, which takes no others."""
    words: list[object] = ["train", "-m", write_tiny_model(tmp_path / "model"), "-t", "text-classification"]
    words += ["-d", write_table(tmp_path / "reviews.csv", reviews(61)), "--method", "psoft", "--rank", 8, "--json"]
    words += ["--max-steps", 3, "--lr", 0.05, "--precision", "bf16"]
    two = launch_sharded(tmp_path, *words, "-o", tmp_path / "two", "--batch-size", 4, precision="bf16")
    one = mirrortune(*words, "-o", tmp_path / "one", "--batch-size", 8).data
    assert json.loads(two)["metrics"]["loss"] == pytest.approx(one["metrics"]["loss"], rel=1e-3)


@pytest.mark.parametrize("is_tied", [True, False])
def test_an_embedding_of_many_is_left_to_the_whole_model(is_tied: bool) -> None:
    from transformers import T5Config, T5ForConditionalGeneration, Wav2Vec2Config, Wav2Vec2Model

    sizes = {"vocab_size": 11, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, tie_word_embeddings=is_tied))
    if not is_tied:
        model.lm_head.weight = torch.nn.Parameter(torch.zeros(11, 8))
    output = model.get_output_embeddings()
    with ties_in_one_unit(model):
        assert model.get_input_embeddings() is None
        assert model.get_output_embeddings() is (None if is_tied else output)
    assert model.get_input_embeddings() is model.shared
    assert model.get_output_embeddings() is output
    deaf = Wav2Vec2Model(Wav2Vec2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
                                        conv_dim=[8], conv_stride=[2], conv_kernel=[3], num_feat_extract_layers=1,
                                        num_conv_pos_embedding_groups=2))  # fmt: skip
    with ties_in_one_unit(deaf):  # which outside of it says that it does not know
        assert deaf.get_input_embeddings() is None
    alone = tiny_causal(tie_word_embeddings=is_tied)  # accelerate makes one unit of the two, or two
    with ties_in_one_unit(alone):
        assert alone.get_input_embeddings() is alone.model.embed_tokens


def test_alone_nobody_is_waited_for() -> None:
    accelerator = make_accelerator()
    assert from_main(accelerator, lambda: 3) == 3
    assert gather_lists(accelerator, [1]) == [1]
    error = ResourceError("disk", "it is full")
    assert told_once(accelerator, error) is error
    signals = StopSignals()
    vote = StopVote(accelerator, signals)
    assert vote.poll() == 0
    signals.number = 2
    assert vote.poll() == vote.number == 2
    vote.close()
    assert PeerError(5).exit_code == 5
