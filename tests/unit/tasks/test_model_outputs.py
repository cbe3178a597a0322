# SPDX-License-Identifier: Apache-2.0
"""outputs: which tensors of a forward pass two models are compared by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutput, MoeCausalLMOutputWithPast

from mirrortune.tasks.model_outputs import (
    NothingToCompareError,
    compared_outputs,
    largest_difference,
    meaningful_outputs,
)

ONE = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("outputs", "names"),
    [
        (CausalLMOutput(loss=torch.ones(1), logits=ONE, hidden_states=(ONE, ONE)), {"logits"}),
        (MoeCausalLMOutputWithPast(logits=ONE, router_logits=(ONE, ONE)), {"logits"}),
        ({"start_logits": ONE, "end_logits": ONE, "encoder_last_hidden_state": ONE}, {"start_logits", "end_logits"}),
        (
            BaseModelOutputWithPooling(last_hidden_state=ONE, pooler_output=ONE, hidden_states=(ONE,)),
            {"last_hidden_state", "pooler_output"},
        ),
        ({"logits": ONE, "pred_boxes": ONE, "last_hidden_state": ONE}, {"logits", "pred_boxes"}),
        ({"predicted_depth": ONE, "hidden_states": (ONE,)}, {"predicted_depth"}),
        ({"pred_masks": ONE, "iou_scores": ONE, "vision_hidden_states": ONE}, {"pred_masks", "iou_scores"}),
        ({"waveform": ONE, "sequence_lengths": torch.ones(2, dtype=torch.long)}, {"waveform"}),
        ({"text_embeds": ONE, "text_model_output": {"last_hidden_state": ONE}}, {"text_embeds"}),
        ({"feature_maps": (ONE, ONE), "attentions": (ONE,)}, {"feature_maps.0", "feature_maps.1"}),
        ({"something_new": ONE, "loss": ONE, "attentions": (ONE,)}, {"something_new"}),
        ((ONE, {"inner": ONE}), {"0", "1.inner"}),
        ({"loss": ONE, "audio_codes": torch.ones(2, dtype=torch.long)}, set()),
    ],
)
def test_answers_count_before_features_and_features_before_the_rest(outputs: Any, names: set[str]) -> None:
    assert meaningful_outputs(outputs).keys() == names


class Says(nn.Linear):
    """A model with these outputs."""

    def __init__(self, outputs: Any) -> None:
        super().__init__(1, 1)
        self.outputs = outputs

    def forward(self, attention_mask: Tensor) -> Any:  # type: ignore[override]
        return self.outputs


def test_padding_does_not_count_and_pooled_outputs_do_whatever_their_width() -> None:
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    states, pooled = torch.arange(12.0).reshape(2, 3, 2), torch.arange(6.0).reshape(2, 3)
    found = compared_outputs(Says({"last_hidden_state": states, "pooler_output": pooled}), {"attention_mask": mask})
    assert found.tolist() == [*range(10), *range(6)]


def test_a_model_that_says_nothing_is_named() -> None:
    with pytest.raises(NothingToCompareError, match="the outputs of Says hold no floating-point tensor"):
        compared_outputs(Says({"loss": ONE}), {"attention_mask": ONE})


def test_models_that_draw_numbers_draw_the_same() -> None:
    class Draws(Says):
        def forward(self, attention_mask: Tensor) -> Any:  # type: ignore[override]
            return {"logits": torch.rand(2, 3)}

    model = Draws(None)
    before = torch.get_rng_state()
    one, two = (compared_outputs(model, {"attention_mask": ONE}) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_masked_with_infinity_is_equal_and_what_overflowed_is_not() -> None:
    low, high, some = -torch.inf, torch.inf, 1.0
    assert largest_difference(torch.tensor([low, some]), torch.tensor([low, 1.5])) == 0.5
    assert largest_difference(torch.tensor([low, some]), torch.tensor([0.0, some])) == torch.inf
    for same in ([low, low], [high, some], [torch.nan, some]):
        assert not largest_difference(torch.tensor(same), torch.tensor(same)) <= 1.0
    assert largest_difference(torch.ones(2), torch.ones(3)) == torch.inf
