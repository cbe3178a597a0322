# SPDX-License-Identifier: Apache-2.0
"""Model types of transformers' registry, each through the life of an adapter (``walk.py``): a core set in every run,
all of them with ``-m slow``.
"""

from __future__ import annotations

import re

import pytest

from tests.matrix.share import PAGE, exceptions, page, sentence_of
from tests.matrix.walk import check, registry
from tests.test_docs import DOCS

CORE = {
    "albert": "sequence-classification", "bart": "seq2seq-lm", "beit": "image-classification",
    "bert": "token-classification", "bloom": "causal-lm", "clip": "image-classification",
    "convnext": "image-classification", "deberta-v2": "question-answering", "deepseek_v3": "causal-lm",
    "deit": "image-classification", "dinov2": "image-classification", "distilbert": "sequence-classification",
    "electra": "multiple-choice", "falcon": "causal-lm", "gemma2": "causal-lm", "gemma3_text": "causal-lm",
    "gpt2": "sequence-classification", "gpt_neox": "causal-lm", "hubert": "audio-classification",
    "llama": "causal-lm", "mamba": "causal-lm", "mistral": "causal-lm", "mixtral": "causal-lm",
    "modernbert": "sequence-classification", "mpnet": "sequence-classification", "opt": "causal-lm",
    "pegasus": "seq2seq-lm", "phi3": "causal-lm", "qwen2": "causal-lm", "qwen2_moe": "causal-lm",
    "qwen3": "causal-lm", "resnet": "image-classification", "roberta": "sequence-classification",
    "siglip": "image-classification", "smollm3": "causal-lm", "swin": "image-classification", "t5": "seq2seq-lm",
    "vit": "image-classification", "wav2vec2": "audio-classification", "whisper": "audio-classification",
    "xlm-roberta": "sequence-classification",
}  # fmt: skip


@pytest.mark.parametrize(("model_type", "head"), CORE.items())
def test_a_type_goes_the_whole_way(model_type: str, head: str) -> None:
    found = check(model_type, head)
    assert found["status"] == "passed", found.get("reason")
    assert found["effect"] > 100 * found["merge_error"]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", registry())
def test_every_type_does_what_the_page_says(model_type: str) -> None:
    known = exceptions(PAGE.read_text(encoding="utf-8"))
    for head in registry()[model_type]:
        found = check(model_type, head)
        assert found["status"] == known.get((model_type, head), "passed"), f"{head}: {found.get('reason')}"


def test_the_docs_state_the_share_of_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert sentence_of(text) in " ".join(DOCS["docs/models.md"].split())
    share = re.search(r"(\d+) of the (\d+) model types that can", text)
    assert share
    assert int(share[1]) >= 0.95 * int(share[2])


def test_a_page_counts_types_and_lists_exceptions() -> None:
    passed, failed, absent = ({"status": s, "reason": "why | not"} for s in ("passed", "failed", "not run"))
    results = {"a": {"x": passed, "y": absent}, "b": {"x": failed, "y": passed}, "c": {"x": absent}}
    text = page(results, "now")
    assert sentence_of(text).startswith("1 of the 2 model types")
    assert "(50.0%), with 2 heads" in text
    assert exceptions(text) == {("a", "y"): "not run", ("b", "x"): "failed", ("c", "x"): "not run"}
