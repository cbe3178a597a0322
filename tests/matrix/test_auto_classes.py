# SPDX-License-Identifier: Apache-2.0
"""Auto classes through the Python interface (``auto_walk.py``), without a task and without any processor beside the
base: some types of some classes, chosen for their speed. The walk itself takes all of them.
"""

from __future__ import annotations

import pytest

from tests.matrix.auto_walk import check

CORE = {
    ("AutoBackbone", "resnet"), ("AutoModel", "bert"), ("AutoModel", "clip"), ("AutoModel", "t5"), ("AutoModel", "vit"),
    ("AutoModelForAudioClassification", "audio-spectrogram-transformer"), ("AutoModelForCTC", "wav2vec2"),
    ("AutoModelForDocumentQuestionAnswering", "layoutlm"), ("AutoModelForMaskedImageModeling", "deit"),
    ("AutoModelForMaskedLM", "modernbert"), ("AutoModelForMultipleChoice", "bert"),
    ("AutoModelForQuestionAnswering", "bart"), ("AutoModelForSpeechSeq2Seq", "whisper"),
    ("AutoModelForSemanticSegmentation", "segformer"), ("AutoModelForTextEncoding", "t5"),
    ("AutoModelForTimeSeriesPrediction", "timesfm"), ("AutoModelForVideoClassification", "videomae"),
}  # fmt: skip


@pytest.mark.parametrize(("auto", "model_type"), sorted(CORE))
def test_an_auto_class_goes_the_whole_way(auto: str, model_type: str) -> None:
    found = check(auto, model_type)
    assert found["status"] == "passed", found.get("reason")
    assert found["compared"]
    assert found["effect"] > 100 * found["merge_error"]
