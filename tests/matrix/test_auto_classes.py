# SPDX-License-Identifier: Apache-2.0
"""Auto classes through the Python interface (``auto_walk.py``), without a task and without any processor beside the
base.
"""

from __future__ import annotations

import pytest

from tests.matrix.auto_walk import check

CORE = {
    ("AutoBackbone", "bit"), ("AutoModel", "bert"), ("AutoModel", "t5"), ("AutoModel", "clip"), ("AutoModel", "beit"),
    ("AutoModel", "whisper"), ("AutoModel", "siglip"), ("AutoModel", "swin"), ("AutoModel", "resnet"),
    ("AutoModelForAudioClassification", "audio-spectrogram-transformer"), ("AutoModelForCTC", "wav2vec2"),
    ("AutoModelForCausalLM", "mixtral"), ("AutoModelForDocumentQuestionAnswering", "layoutlm"),
    ("AutoModelForImageClassification", "convnext"), ("AutoModelForMaskedImageModeling", "deit"),
    ("AutoModelForMaskedLM", "modernbert"), ("AutoModelForMultipleChoice", "bert"),
    ("AutoModelForQuestionAnswering", "bart"), ("AutoModelForSeq2SeqLM", "t5"),
    ("AutoModelForSpeechSeq2Seq", "whisper"), ("AutoModelForTextEncoding", "t5"),
    ("AutoModelForZeroShotImageClassification", "clip"),
}  # fmt: skip


@pytest.mark.parametrize(("auto", "model_type"), sorted(CORE))
def test_an_auto_class_goes_the_whole_way(auto: str, model_type: str) -> None:
    found = check(auto, model_type)
    assert found["status"] == "passed", found.get("reason")
    assert found["compared"]
    assert found["effect"] > 100 * found["merge_error"]
