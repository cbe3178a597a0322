# SPDX-License-Identifier: Apache-2.0
"""errors: several problems in one message, each of them once."""

from __future__ import annotations

import errno
from unittest.mock import Mock

import pytest
import torch

from mirrortune.errors import ConfigError, DataError, all_of, known_error


def test_several_problems_are_a_line_each() -> None:
    found = ConfigError.several([ConfigError("a", "wrong"), ConfigError("b", "wrong too", allowed="1")])
    assert str(found) == "a: wrong.\nb: wrong too. Allowed: 1."


def test_one_problem_is_itself() -> None:
    only = ConfigError("a", "wrong")
    assert ConfigError.several([only]) is only


def test_what_is_found_twice_is_said_once() -> None:
    twice = [ConfigError("a", "wrong"), ConfigError("a", "wrong")]
    assert str(ConfigError.several(twice)) == "a: wrong."
    assert str(ConfigError.several([*twice, ConfigError("b", "wrong")])) == "a: wrong.\nb: wrong."


def test_problems_that_stand_for_several_keep_their_lines() -> None:
    inner = ConfigError.several([ConfigError("a", "wrong"), ConfigError("b", "wrong")])
    assert str(ConfigError.several([inner, ConfigError("c", "wrong")])) == "a: wrong.\nb: wrong.\nc: wrong."


def test_a_name_with_line_breaks_or_without_an_end_stays_one_short_line() -> None:
    forged = DataError("a\nb.csv", "no column 'x\nerror: y'", allowed="p" * 5000, fix="Name one")
    assert str(forged).startswith(r"a\nb.csv: no column 'x\nerror: y'. Allowed: ppp")
    assert str(forged).endswith("ppp. Name one.")
    assert len(str(forged)) < 2100
    breaks = DataError("a", "1\r2\u20283", fix="Mend it")
    with pytest.raises(DataError) as caught:
        all_of(Mock(side_effect=breaks), Mock(side_effect=DataError("b", "4")))
    assert str(caught.value) == "a: 1\r2\u20283. Mend it.\nb: 4."


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"), "memory"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 17.98 GiB)"), "memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
            "memory",
        ),
        (MemoryError(), "memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "memory"),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate`"), "memory"),
        (RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile"), "device"),
        (RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCUDA kernel errors"), "device"),
        (RuntimeError("FlashAttention only support fp16 and bf16 data type"), "model.attention"),
        (RuntimeError("value cannot be converted to type at::Half without overflow"), "train.precision"),
        (RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'"), "train.precision"),
        (PermissionError(13, "Permission denied", "rows"), "rows"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "rows"), "rows"),
    ],
)
def test_what_a_device_or_a_folder_cannot_do_is_an_error_for_the_user(error: BaseException, where: str) -> None:
    found = known_error(error)
    assert found is not None
    assert (found.where, found.exit_code) == (where, 4)
    assert "\n" not in str(found)


def test_other_exceptions_are_bugs() -> None:
    for error in (
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError(),
        ValueError("out of memory"),
        PermissionError(),
        FileNotFoundError(errno.ENOENT, "No such file", "rows"),
    ):
        assert known_error(error) is None
