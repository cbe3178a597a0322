# SPDX-License-Identifier: Apache-2.0
"""Real weights all the way: SmolLM2-135M (plain, from GGUF, in 4 and 8 bits) and DINOv2-small, trained for a few steps,
merged with verification and scored again.

Needs weights and data from the package registries; ``MIRRORTUNE_ASSETS`` names a folder that keeps them.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from tests.bench.real_models import CASES, run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", CASES)
def test_it_learns_and_its_merged_model_is_the_same(name: str, tmp_path: Path) -> None:
    needed = "gguf" if "GGUF" in name else "bitsandbytes" if "bitsandbytes" in name else "mirrortune"
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"no {needed} here")
    assets = Path(os.environ.get("MIRRORTUNE_ASSETS", tmp_path / "assets"))
    found = run(name, assets, tmp_path / "case")
    metrics, merged = found["metrics"], found["merged_metrics"]
    assert found["merge"]["passed"]
    if "accuracy" in metrics:
        assert metrics["accuracy"] > 0.5, "a tenth by chance"
        assert merged["accuracy"] == pytest.approx(metrics["accuracy"], abs=0.02)
        return
    assert metrics["perplexity"] < 0.7 * found.get("before", {"perplexity": 36})["perplexity"]
    # bitsandbytes computes in 8 bits what it holds in 8; the merged model does not.
    assert merged["perplexity"] == pytest.approx(metrics["perplexity"], rel=0.1 if "8bit" in name else 0.01)
    assert found.get("merge --base", {"passed": True})["passed"]
