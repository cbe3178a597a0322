# SPDX-License-Identifier: Apache-2.0
"""Arrays of text and of flags are those that Arrow itself makes."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirrortune.data.files import arrow_arrays
from mirrortune.data.files.arrow_arrays import flag_array, text_array

CELLS = st.lists(st.none() | st.text(st.characters(exclude_categories=["Cs"])), max_size=40)


@given(CELLS)
def test_arrays_are_arrows_own(cells: list[str | None]) -> None:
    found = text_array(cells)

    found.validate(full=True)
    assert found.equals(pa.array(cells, pa.string()))


@given(CELLS)
def test_more_than_32_bits_can_count_is_large(cells: list[str | None]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrow_arrays, "_MOST", -1)
        found = text_array(cells)

    found.validate(full=True)
    assert found.equals(pa.array(cells, pa.large_string()))


@given(st.lists(st.booleans(), max_size=40))
def test_flags_are_arrows_own(flags: list[bool]) -> None:
    found = flag_array(np.array(flags, np.bool_))

    found.validate(full=True)
    assert found.equals(pa.array(flags, pa.bool_()))


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(UnicodeEncodeError):
        text_array(["\ud800"])
