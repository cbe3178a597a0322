# SPDX-License-Identifier: Apache-2.0
"""Code that a configuration requests without `auto_map`."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from mirrortune.errors import ConfigError
from mirrortune.models.remote_code import refuse_kernels


@pytest.mark.parametrize("asked", ["evil/kernel", {"": "evil/kernel"}, {"text_config": "evil/kernel"}])
@pytest.mark.parametrize("key", ["attn_implementation", "experts_implementation"])
def test_kernels_of_a_part_of_the_model_are_refused(key: str, asked: Any) -> None:
    config = LlavaConfig(text_config=LlamaConfig(), vision_config=CLIPVisionConfig(), **{key: asked})

    with pytest.raises(ConfigError, match="asks for code from 'evil/kernel'"):
        refuse_kernels("x", config)


def test_known_implementations_are_taken() -> None:
    refuse_kernels("x", LlavaConfig(attn_implementation={"": "eager", "text_config": "sdpa"}))
