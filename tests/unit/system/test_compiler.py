# SPDX-License-Identifier: Apache-2.0
"""compiling: compiled steps are those of eager ones, whole graphs without a break, and refused where they cannot be."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mirrortune.adapters.files.load import adapt
from mirrortune.adapters.methods import CORES
from mirrortune.adapters.spec import AdapterSpec
from mirrortune.adapters.svd import factorize
from mirrortune.adapters.targets import find_targets
from mirrortune.errors import ConfigError, ResourceError
from mirrortune.system.compiler import check_compiler, compile_model
from tests.cli.console import mirrortune, reviews, write_table
from tests.tiny_models import tiny_bert

CPU = torch.device("cpu")


def test_without_a_compiler_it_is_refused_before_anything_is_read(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    if not torch.cuda.is_available():
        outcome = mirrortune("train", "-m", tiny_model_dir, "-t", "text-classification", "-d", "no.csv", "--compile")
        assert outcome.exit_code == 4
        assert "--compile: no C++ compiler was found" in outcome.said
    compiler = tmp_path / "own-c++"
    compiler.write_text("#!/bin/sh\n", encoding="utf-8")
    compiler.chmod(0o755)
    with pytest.raises(ResourceError, match="no C\\+\\+ compiler"):
        check_compiler(CPU)
    monkeypatch.setenv("CXX", str(compiler))
    check_compiler(CPU)


def test_what_triton_needs_is_checked_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    capability, gpu = [(6, 1)], torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace(name=name))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(ResourceError, match="no C compiler was found, which triton needs"):
        check_compiler(gpu)
    (tmp_path / "gcc").write_text("#!/bin/sh\n", encoding="utf-8")
    (tmp_path / "gcc").chmod(0o755)
    with pytest.raises(ResourceError, match=r"compute capability 6\.1"):
        check_compiler(gpu)
    capability[0] = (7, 5)
    check_compiler(gpu)


def test_a_model_that_is_cut_is_refused() -> None:
    with pytest.raises(ConfigError, match="FSDP2"):
        compile_model(tiny_bert(), SimpleNamespace(is_fsdp2=True))


@pytest.mark.slow
@pytest.mark.parametrize("core", sorted(CORES.names()))
@pytest.mark.parametrize("rank", ["full", 8])
def test_every_core_compiles_into_one_graph_with_the_same_gradients(core: str, rank: int | str) -> None:
    torch._dynamo.reset()
    model = tiny_bert()
    spec = AdapterSpec(method=core, rank=rank)
    layers = find_targets(model, spec).layers if spec.basis == "gradient" else {}  # any basis will do
    bases = {name: factorize(target.read(model), target.rank, name=name) for name, target in layers.items()}
    adapt(model, spec, factor_source=lambda n, w, r: factorize(w, r, name=n), bases=bases)
    cores = [p for n, p in model.named_parameters() if p.requires_grad and ".core." in n]
    with torch.no_grad():
        for parameter in cores:
            parameter.add_(0.05 * torch.randn(parameter.shape))
    ids = torch.randint(5, 100, (4, 11))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 0, 1])}
    model(**batch).loss.backward()
    expected = [p.grad.clone() for p in cores if p.grad is not None]
    model.zero_grad()

    model.compile(backend="aot_eager", fullgraph=True)
    model(**batch).loss.backward()

    assert len(expected) == len(cores) > 0
    for parameter, gradient in zip(cores, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # what torch's own compiler imports
def test_a_compiled_run_is_an_eager_one_to_rounding(tiny_model_dir: Path, tmp_path: Path) -> None:
    data = write_table(tmp_path / "reviews.csv", reviews(60))
    words = [
        "train",
        "-m",
        tiny_model_dir,
        "-t",
        "text-classification",
        "-d",
        data,
        "--epochs",
        2,
        "--lr",
        0.1,
        "--json",
    ]
    eager = mirrortune(*words, "-o", tmp_path / "eager")
    compiled = mirrortune(*words, "-o", tmp_path / "compiled", "--compile")
    assert compiled.data["metrics"] == pytest.approx(eager.data["metrics"], abs=1e-4)
    assert mirrortune("eval", tmp_path / "compiled").exit_code == 0
