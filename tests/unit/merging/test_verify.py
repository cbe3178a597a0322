# SPDX-License-Identifier: Apache-2.0
"""What verification refuses: files beside the weights that are missing or differ, ties, tensors of another value."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from mirrortune.errors import VerificationError
from mirrortune.merging.verify import check_contents, check_ties
from tests.tiny_models import tiny_causal, write_tiny_causal


def edit(name: str, **fields: Any) -> Callable[[Path], None]:
    """A JSON file of the folder says something else."""

    def apply(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return apply


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "other labels": (edit("config.json", id2label={"0": "yes", "1": "no"}), "id2label in config.json"),
    "no generation settings": (lambda folder: (folder / "generation_config.json").unlink(), "generation_config.json"),
    "another template": (
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}") and None,
        "chat template",
    ),
    "no template": (lambda folder: (folder / "chat_template.jinja").unlink(), "chat template"),
    "another end": (edit("tokenizer_config.json", eos_token="<|end|>"), "special tokens"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_missing_or_another_is_refused(tmp_path: Path, damage: str) -> None:
    folder = write_tiny_causal(tmp_path / "merged")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    report = check_contents(folder, model, [tokenizer])
    assert report["chat_template"] is True
    assert report["processor"] == type(tokenizer).__name__
    change, said = DAMAGE[damage]
    change(folder)
    with pytest.raises(VerificationError, match=said) as caught:
        check_contents(folder, model, [tokenizer])
    assert caught.value.exit_code == 5


def test_what_was_tied_must_be_tied_again() -> None:
    tied, loose = tiny_causal(tie_word_embeddings=True), tiny_causal(tie_word_embeddings=False)
    check_ties(tied, tied)
    for one, other in ((tied, loose), (loose, tied)):
        with pytest.raises(VerificationError, match=r"embed_tokens\.weight: it is tied to"):
            check_ties(one, other)
