# SPDX-License-Identifier: Apache-2.0
"""Columns that could not be read. They stand in a table as nulls, with the problem in the metadata of their field, and
are refused only where a task uses them: most tables have columns that training does not need.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import pyarrow as pa

from mirrortune.errors import DataError

_KEY = b"mirrortune.problem"


def problem_field(name: str, where: str, problem: str, fix: str) -> pa.Field:
    """The field of a column that could not be read; ``where``, ``problem`` and ``fix`` as of an error."""
    return pa.field(name, pa.null(), metadata={_KEY: json.dumps([where, problem, fix])})


def is_unreadable(field: pa.Field) -> bool:
    """Whether the column could not be read."""
    return _KEY in (field.metadata or {})


def refuse_unreadable(table: pa.Table, columns: Iterable[str]) -> None:
    """Raise the DataError of the first of ``columns`` that could not be read; those that are not there are passed."""
    wanted = set(columns)
    for field in table.schema:
        if field.name in wanted and is_unreadable(field):
            where, problem, fix = json.loads(field.metadata[_KEY])
            raise DataError(where, problem, fix=fix)
