# SPDX-License-Identifier: Apache-2.0
"""Adapter files that are damaged, swapped, renamed, or were made to do harm (with hashes that fit): refused by message
in Python, by eval and by merge, with the contract's exit code and without a trace of a merged model.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from transformers import AutoModelForSequenceClassification

from mirrortune import load_adapter
from mirrortune.adapters.pairings.encoding import pairs_of
from mirrortune.errors import MirrortuneError
from tests.cli.console import mirrortune, reviews, write_table
from tests.tiny_models import write_tiny_model
from tests.unit.adapters.test_adapter_file import rewrite, sign, spelt_out

QUERY, KEY = (f"bert.encoder.layer.0.attention.self.{name}" for name in ("query", "key"))
Damage = Callable[[Path, Path], None]
"""(adapter, another run's adapter) -> the first is damaged."""


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, another of the same shapes, and runs: ``compact``, ``other``, ``portable`` and ``peft``."""
    folder = tmp_path_factory.mktemp("desk")
    base = write_tiny_model(folder / "base")
    write_tiny_model(folder / "foreign", seed=1)
    write_table(folder / "reviews.csv", reviews(24))
    runs: dict[str, list[object]] = {
        "compact": ["--method", "random", "adapter.options.scale_top_k=2"],
        "other": ["--method", "random", "adapter.options.scale_top_k=2", "--seed", 5],
        "portable": ["--rank", 4, "adapter.form=portable"],
        "peft": ["--method", "lora", "--rank", 2],
    }
    for name, words in runs.items():
        done = mirrortune(
            "train", "-m", base, "-t", "text-classification", "-d", folder / "reviews.csv", "--max-steps", 1, "-q",
            "--lr", 0.1, "--target-modules", "attention.self.(query|key)", "-o", folder / name, *words,
            cache=folder / "cache",
        )  # fmt: skip
        assert done.exit_code == 0, done.stderr
    return folder


def say(*keys: Any, value: Any) -> Damage:
    """The description says ``value`` at a place."""

    def apply(folder: Path, _: Path) -> None:
        place = found = spelt_out(folder)
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        sign(folder, found)

    return apply


def put(name: str, change: Callable[[dict[str, torch.Tensor]], torch.Tensor]) -> Damage:
    """A tensor is another one."""

    def apply(folder: Path, _: Path) -> None:
        rewrite(folder, lambda description, tensors: tensors.update({name: change(tensors)}))

    return apply


def put_all(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    """A tensor of all layers is another one."""

    def apply(folder: Path, _: Path) -> None:
        tensors = load_file(folder / "adapter.safetensors")
        tensors[name] = change(tensors[name])
        sign(folder, spelt_out(folder), save(tensors))

    return apply


def listed(change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    """Pairs in the longer form, changed; they are those of the shorter one, which is gone."""

    def apply(folder: Path, _: Path) -> None:
        def turn(description: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
            pairs = pairs_of(tensors.pop(PARTNERS), 32)
            tensors[PARTNERS.replace("partners", "pairs")] = change(pairs.short()).contiguous()

        rewrite(folder, turn)

    return apply


def swap(kind: str, number: str = "") -> Damage:
    """Two layers' tensors of a kind have changed places."""

    def apply(folder: Path, _: Path) -> None:
        def turn(description: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
            one, two = (f"{kind}.{name}{number}" for name in (QUERY, KEY))
            tensors[one], tensors[two] = tensors[two], tensors[one]

        rewrite(folder, turn)

    return apply


def spoilt(name: str, value: float) -> Damage:
    """One number of a tensor is ``value``."""

    def change(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        tensors[name].view(-1)[1] = value
        return tensors[name]

    return put(name, change)


def header(change: Callable[[bytes], bytes]) -> Damage:
    """The header of the file of tensors is another one; its length and the hashes fit."""

    def apply(folder: Path, _: Path) -> None:
        data = (folder / "adapter.safetensors").read_bytes()
        length = int.from_bytes(data[:8], "little")
        own = change(data[8 : 8 + length])
        sign(folder, spelt_out(folder), len(own).to_bytes(8, "little") + own + data[8 + length :])

    return apply


def length(value: int) -> Damage:
    """The header says that it is so long."""

    def apply(folder: Path, _: Path) -> None:
        data = (folder / "adapter.safetensors").read_bytes()
        sign(folder, spelt_out(folder), value.to_bytes(8, "little") + data[8:])

    return apply


def text(change: Callable[[str], str]) -> Damage:
    """The description is another text."""

    def apply(folder: Path, _: Path) -> None:
        path = folder / "adapter.json"
        path.write_text(change(path.read_text()))

    return apply


def in_place_of(name: str, make: Callable[[Path], object]) -> Damage:
    """Something else stands where a file was."""

    def apply(folder: Path, _: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return apply


def renamed_layer(folder: Path, _: Path) -> None:
    """A layer is called like a file outside."""

    def apply(description: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        name = "../../../../etc/passwd"
        description["layers"] = {name if n == QUERY else n: layer for n, layer in description["layers"].items()}
        for key in [key for key in tensors if f".{QUERY}" in key]:
            tensors[key.replace(QUERY, name)] = tensors.pop(key)

    rewrite(folder, apply)


def peft_says(**fields: Any) -> Damage:
    """PEFT's own description says something else, and its hash fits."""

    def apply(folder: Path, _: Path) -> None:
        path = folder / "adapter_config.json"
        data = json.dumps(json.loads(path.read_text()) | fields).encode()
        path.write_bytes(data)
        say("config_sha256", value=hashlib.sha256(data).hexdigest())(folder, folder)

    return apply


def peft_spoilt(folder: Path, _: Path) -> None:
    """PEFT's file of tensors holds a NaN."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    data = save(tensors, {"format": "pt"})
    path.write_bytes(data)
    say("tensors_sha256", value=hashlib.sha256(data).hexdigest())(folder, folder)


EVERYWHERE, BY_COMMAND, BY_MERGE = ("python", "eval", "merge"), ("eval", "merge"), ("merge",)
THETA, LAYER, PARTNERS = f"core.{QUERY}.theta", ("layers", QUERY), f"partners.{QUERY}"
# Run, damage, what is said; and where, if an adapter without a base and a task is still a right one.
CASES: dict[str, tuple[str, Damage, str] | tuple[str, Damage, str, tuple[str, ...]]] = {
    "tensors cut short": ("compact", text(lambda t: t[:-3]), "damaged"),
    "another run's tensors": ("compact", lambda a, b: shutil.copy(b / "adapter.safetensors", a), "its hash differs"),
    "another run's description": ("compact", lambda a, b: shutil.copy(b / "adapter.json", a), "its hash differs"),
    "renamed": ("compact", lambda a, b: (a / "adapter.safetensors").rename(a / "model.safetensors"), "missing"),
    "a pipe": ("compact", in_place_of("adapter.safetensors", os.mkfifo), "missing or unreadable"),
    "a device": ("compact", in_place_of("adapter.safetensors", lambda p: p.symlink_to("/dev/zero")), "unreadable"),
    "a folder": ("compact", in_place_of("adapter.safetensors", Path.mkdir), "missing or unreadable"),
    "a link to a secret": ("compact", in_place_of("adapter.safetensors", lambda p: p.symlink_to("/etc/passwd")), "hash"),
    "a link to nothing": ("compact", in_place_of("adapter.safetensors", lambda p: p.symlink_to("/none")), "missing"),
    "an empty file": ("compact", lambda a, b: sign(a, spelt_out(a), b""), "damaged"),
    "a header of 4 exabytes": ("compact", length(2**62), "damaged"),
    "a header of 90 MB": ("compact", length(90_000_000), "damaged"),
    "a header of brackets": ("compact", header(lambda h: b'{"a":' * 100_000), "damaged"),
    "a header with a name twice": ("compact", header(lambda h: h.replace(b"core.scale", b"core.theta")), "damaged"),
    "tensors beyond the file": ("compact", header(lambda h: h.replace(b'"data_offsets":[0,', b'"data_offsets":[9999999,')), "damaged"),
    "brackets": ("compact", text(lambda t: "[" * 1_000_000), "damaged"),
    "a long number": ("compact", text(lambda t: t.replace('"format_version": ', f'"format_version": {"9" * 5000}', 1)), "damaged"),
    "a key twice": ("compact", text(lambda t: t.replace('"form":', '"form": "portable", "form":', 1)), "damaged"),
    "not a number": ("compact", say("max_length", value=float("nan")), "damaged"),
    "NaN in an angle": ("compact", spoilt(THETA, float("nan")), "NaN or infinities"),
    "an infinite head": ("compact", spoilt("param.classifier.weight", float("inf")), "NaN or infinities"),
    "NaN in the effects": ("compact", spoilt("effects", float("nan")), "its effect differs"),
    "an infinite factor": ("portable", spoilt(f"factor.{QUERY}.U", float("inf")), "NaN or infinities"),
    "another factor": ("portable", spoilt(f"factor.{QUERY}.U", 0.5), "its effect differs"),
    "a factor of another shape": ("portable", put(f"factor.{QUERY}.Vh", lambda t: t[f"factor.{QUERY}.Vh"][:, 1:].contiguous()), "has shape"),
    "angles of another shape": ("compact", put(THETA, lambda t: t[THETA][1:]), "has shape"),
    "whole numbers as angles": ("compact", put_all("core.theta", lambda t: t.int()), "dtype int32"),
    "an angle too few": ("compact", put_all("core.theta", lambda t: t[1:]), "'core.theta' is missing or too short"),
    "an angle too many": ("compact", put_all("core.theta", lambda t: torch.cat([t, t[:1]])), "not all of it"),
    "angles in rows": ("compact", put_all("core.theta", lambda t: t[None]), "'core.theta' is missing or too short"),
    "signs that are numbers": ("compact", put_all("signs", lambda t: t.float()), "damaged"),
    "a sign too few": ("compact", put_all("signs", lambda t: t[1:]), "'signs' is missing or too short"),
    "other signs": ("compact", put_all("signs", lambda t: t ^ 8), "its effect differs"),
    "a layer that holds a billion": ("compact", say(*LAYER, "holds", "core.theta", value=[10**9]), "is missing or too short"),
    "a layer that holds less than none": ("compact", say(*LAYER, "holds", "core.theta", value=[-16]), "is invalid"),
    "a layer that holds all effects": ("compact", say(*LAYER, "holds", value={"effects": [32]}), "is missing or too short"),
    "a layer that holds words": ("compact", say(*LAYER, "holds", value="much"), "damaged"),
    "layers that share a list": ("compact", say("layers_share", value=[1]), "damaged"),
    "broken partners": ("compact", put(PARTNERS, lambda t: t[PARTNERS].float()), "dtype float32"),
    "a partner that is not there": ("compact", put(PARTNERS, lambda t: t[PARTNERS] + 1000), "has the partner 1"),
    "partners that end too soon": ("compact", put(PARTNERS, lambda t: t[PARTNERS][:-1]), "end within a round"),
    "partners in rows": ("compact", put(PARTNERS, lambda t: t[PARTNERS][None]), "shape of 'partners"),
    "broken pairs": ("compact", listed(lambda pairs: pairs.float()), "dtype float32"),
    "a pair of three": ("compact", listed(lambda pairs: pairs.reshape(-1)[:30].reshape(10, 3)), "shape of 'pairs"),
    "a pair that is not there": ("compact", listed(lambda pairs: pairs + 1000), "a pair of"),
    "pairs that overlap": ("compact", listed(lambda pairs: pairs[:1].expand(16, 2)), "overlap"),
    "pairs in another order": ("compact", listed(lambda pairs: pairs.flip(0)), "its effect differs"),
    "layers swapped": ("compact", swap("core", ".theta"), "its effect differs"),
    "signs swapped": ("compact", swap("signs"), "its effect differs"),
    "a layer called like a file": ("compact", renamed_layer, "no such layer"),
    "a tensor called like a file": ("compact", put("../../../etc/passwd", lambda t: t[THETA].clone()), "is invalid"),
    "a tensor that is no head": ("compact", put("param.bert.pooler.dense.bias", lambda t: torch.zeros(32)), "is invalid"),
    "a hash of nothing": ("compact", say(*LAYER, "weight", value=""), "is invalid"),
    "a negative seed": ("compact", say(*LAYER, "probe_seeds", value=[-1]), "is invalid"),
    "a seed too many": ("compact", say(*LAYER, "probe_seeds", value=[0, 1]), "is invalid"),
    "a side that is none": ("compact", say(*LAYER, "side", value="diagonal"), "is invalid"),
    "a huge cluster": ("compact", say(*LAYER, "clusters", value=[[[0, 10**9]]]), "is invalid"),
    "clusters that overlap": ("compact", say(*LAYER, "clusters", value=[[[0, 3], [2, 5]]]), "is invalid"),
    "no outputs": ("compact", say(*LAYER, "layout", "out_features", value=0), "is invalid"),
    "a negative shape": ("compact", say(*LAYER, "layout", "shape", value=[-32, -32]), "is invalid"),
    "other rows": ("compact", say(*LAYER, "layout", "rows", value={"repeat": 1, "start": 5, "stop": 2, "period": 9}), "is invalid"),
    "transposed": ("compact", say(*LAYER, "layout", "is_transposed", value=True), "base weight is not|read in another way"),
    "a huge rank": ("portable", say("adapter", "rank", value=10**12), "is invalid"),
    "a billion rounds": ("compact", say("adapter", "options", "rounds", value=10**9), "rounds: got 1000000000"),
    "a head without names": ("compact", say("head", value=[5]), "is invalid"),
    "no numbers": ("compact", say("layers", value={"": {}}), "is invalid"),
    "a base that is no model": ("compact", say("base", "auto_class", value="AutoTokenizer"), "transformers cannot load here", BY_COMMAND),
    "a base that writes a card": ("compact", say("base", "name", value="x\n---\nlicense: mit"), "is invalid"),
    "a base of another module": ("compact", say("base", "auto_class", value="os.system"), "is invalid"),
    "a base outside": ("compact", say("base", "name", value="../../../../etc"), "etc", BY_MERGE),
    "a base in float64": ("compact", say("base", "dtype", value="float64"), "its base was loaded in float64. Allowed: float32, ", BY_MERGE),
    "a dtype that is a function": ("compact", say("base", "dtype", value="load"), "is invalid"),
    "a task of another module": ("compact", say("task", "kind", value="../../os"), "unknown kind of task", BY_MERGE),
    "labels that are none": ("compact", say("task", "labels", value=5), "labels: got 5", BY_COMMAND),
    "a task's class": ("compact", say("task", "auto_class", value="AutoTokenizer"), "auto_class is", BY_COMMAND),
    "a length in words": ("compact", say("max_length", value="long"), "is invalid"),
    "PEFT: NaN": ("peft", peft_spoilt, "NaN or infinities"),
    "PEFT: a huge rank": ("peft", peft_says(r=10**9), "is invalid"),
    "PEFT: a huge rank of a layer": ("peft", peft_says(rank_pattern={"query": 10**9}), "'rank_pattern' of its"),
    "PEFT: an endless search": (
        "peft", peft_says(init_lora_weights="pissa_niter_999999999"), "requests more than 128 iterations",
    ),
    "PEFT: an endless search for LoftQ": (
        "peft", peft_says(init_lora_weights="loftq", loftq_config={"loftq_iter": 10**9}), "more than 128 iterations",
    ),
    "PEFT: layers without end": ("peft", peft_says(layer_replication=[[0, 2]] * 9), "'layer_replication' of its"),
    "PEFT: a start that is not here": (
        "peft", peft_says(init_lora_weights="loftq", loftq_config={"loftq_bits": 3}), "PEFT cannot put", BY_COMMAND,
    ),
    "PEFT: no tuner": ("peft", peft_says(peft_type="os"), "is not the tuner of its method"),
    "PEFT: another layer's probe": ("peft", say(*LAYER, "response", value=[1.0, 2.0, 3.0, 4.0]), "does not compute"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_everywhere(desk: Path, tmp_path: Path, case: str) -> None:
    run, damage, said, *rest = CASES[case]
    shutil.copytree(desk / run, tmp_path / "run")
    adapter = tmp_path / "run" / "adapter"
    damage(adapter, desk / "other" / "adapter")
    for way in rest[0] if rest else EVERYWHERE:
        if way == "python":
            with pytest.raises(MirrortuneError, match=said) as caught:
                load_adapter(AutoModelForSequenceClassification.from_pretrained(desk / "base"), adapter)
            assert caught.value.exit_code in (2, 5)
        else:
            words = ["eval", tmp_path / "run"] if way == "eval" else ["merge", tmp_path / "run", "-o", tmp_path / "m"]
            outcome = mirrortune(*words, cache=desk / "cache")
            assert outcome.exit_code in (2, 5), outcome.stderr
            assert any(part in outcome.said for part in said.split("|")), outcome.said
            assert "Traceback" not in outcome.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_undamaged_they_are_taken(desk: Path, tmp_path: Path) -> None:
    for run in ("compact", "portable", "peft"):
        load_adapter(AutoModelForSequenceClassification.from_pretrained(desk / "base"), desk / run)
        assert mirrortune("eval", desk / run, "-q", cache=desk / "cache").exit_code == 0
        assert mirrortune("merge", desk / run, "-o", tmp_path / run, "-q", cache=desk / "cache").exit_code == 0


@pytest.mark.parametrize("run", ["compact", "portable", "peft"])
def test_other_weights_are_scored_only_by_force(desk: Path, run: str) -> None:
    words = ["eval", desk / run, "--model", desk / "foreign"]
    refused = mirrortune(*words, cache=desk / "cache")
    assert refused.exit_code == 5
    assert "the base weight is not the one" in refused.said
    forced = mirrortune(*words, "--force-base", cache=desk / "cache")
    assert forced.exit_code == 0, forced.stderr
    assert forced.said.count("by force:") >= 4
    plain = mirrortune("eval", desk / "base", "-t", "text-classification", "-d", desk / "reviews.csv", "--force-base")
    assert plain.exit_code == 2
    assert "holds no adapter" in plain.said


def test_a_base_that_differs_in_frozen_weights_alone_is_refused_too(
    desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(desk / "base")
    model.get_parameter("bert.embeddings.word_embeddings.weight").data += 1
    shutil.copytree(desk / "base", tmp_path / "updated")
    model.save_pretrained(tmp_path / "updated")
    words = [desk / "compact", "--model", tmp_path / "updated"]
    refused = mirrortune("eval", *words, cache=desk / "cache")
    assert refused.exit_code == 5
    assert "differs in 1 of the weights that the adapter leaves as they are" in refused.said
    merge = ["merge", desk / "compact", "--base", tmp_path / "updated", "-o", tmp_path / "merged"]
    for size in (2**30, -1):  # large models are not loaded
        monkeypatch.setattr("mirrortune.merging.write.LARGE", size)
        assert mirrortune(*merge, cache=desk / "cache").exit_code == 5
        assert not (tmp_path / "merged").exists()
    assert mirrortune("merge", desk / "compact", "-o", tmp_path / "merged", cache=desk / "cache").exit_code == 0
    forced = mirrortune("eval", *words, "--force-base", cache=desk / "cache")
    assert forced.exit_code == 0, forced.stderr
    assert forced.said.count("by force:") == 1


def test_other_weights_are_exported_only_by_force(desk: Path, tmp_path: Path) -> None:
    words = ["merge", desk / "portable", "--format", "lora", "--base", desk / "foreign", "-o", tmp_path / "lora"]
    assert mirrortune(*words, cache=desk / "cache").exit_code == 5
    forced = mirrortune(*words, "--force-base", cache=desk / "cache")
    assert forced.exit_code == 0, forced.stderr
    assert "by force:" in forced.said
