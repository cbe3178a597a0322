# SPDX-License-Identifier: Apache-2.0
"""token_scores: the same numbers in pieces as at once, and in the memory of a piece."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from mirrortune.data.examples import IGNORE_INDEX
from mirrortune.tasks import token_scores
from mirrortune.tasks.token_scores import score_tokens, summed_loss


@pytest.fixture(params=[1, 70, 10**9])
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The largest number of logits in a piece: less than one place of the vocabulary, a few places, everything."""
    monkeypatch.setattr(token_scores, "_LARGEST_PIECE", request.param)
    return int(request.param)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (3, 11, 23) in bfloat16 and targets, of which a third is left out, and one row as a whole."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 11, 23, generator=generator).bfloat16()
    targets = torch.randint(23, (3, 11), generator=generator)
    targets[torch.rand(3, 11, generator=generator) < 1 / 3] = IGNORE_INDEX
    targets[1] = IGNORE_INDEX
    return logits, targets


def test_pieces_add_up(piece: int) -> None:
    logits, targets = batch()
    found = score_tokens(logits, targets)
    for row, (loss, right, count) in enumerate(found.tolist()):
        mask = targets[row] != IGNORE_INDEX
        whole = F.cross_entropy(logits[row][mask].float(), targets[row][mask], reduction="sum")
        assert loss == pytest.approx(float(whole), rel=1e-6)
        assert right == int((logits[row][mask].float().argmax(dim=-1) == targets[row][mask]).sum())
        assert count == int(mask.sum())
        assert piece < 10**9 or loss == float(whole), "in one piece to the last bit"


def test_the_loss_is_the_same_with_and_without_a_gradient(piece: int) -> None:
    logits, targets = batch()
    trained, items = summed_loss(logits, targets)
    with torch.no_grad():
        scored, scored_items = summed_loss(logits, targets)
    assert float(scored) == pytest.approx(float(trained), rel=1e-6)
    assert int(items) == int(scored_items) == int((targets != IGNORE_INDEX).sum())


def test_no_more_than_a_piece_is_ever_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_scores, "_LARGEST_PIECE", 70)
    sizes = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            found = func(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found.dtype == torch.float32:
                sizes.append(found.numel())
            return found

    logits, targets = batch()
    with torch.no_grad(), Watch():
        summed_loss(logits, targets)
        score_tokens(logits, targets)
    assert sizes
    assert max(sizes) <= 70
