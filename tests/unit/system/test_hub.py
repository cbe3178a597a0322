# SPDX-License-Identifier: Apache-2.0
"""Every way in which the Hub's clients fail becomes one HubError with advice; what is not the Hub's is let through.

The clients' own exception classes are raised here; that a real client raises them is tested over a socket in tests/e2e.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from mirrortune.errors import DataError, HubError
from mirrortune.system.hub import hub_errors


def exception(name: str, *arguments: object) -> BaseException:
    """An instance of ``package.module.Class``, without its constructor's demands."""
    module, _, class_name = name.rpartition(".")
    kind: Any = getattr(importlib.import_module(module), class_name)
    made = kind.__new__(kind)
    Exception.__init__(made, *arguments)
    assert isinstance(made, BaseException)
    return made


class AnsweredError(Exception):
    """A client's error with the Hub's answer."""

    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP {status}")
        self.response = type("Response", (), {"status_code": status})()


FAILURES: list[tuple[Any, str]] = [
    ("huggingface_hub.errors.GatedRepoError", "gated and this account has no access. Ask for access on its page"),
    (
        "huggingface_hub.errors.RepositoryNotFoundError",
        "no such repository on the Hub, or it is private. Check the spell",
    ),
    ("huggingface_hub.errors.RevisionNotFoundError", "no such revision. Check --revision"),
    (
        "huggingface_hub.errors.RemoteEntryNotFoundError",
        "a file is missing from the repository. Check that it is a model",
    ),
    ("huggingface_hub.errors.LocalEntryNotFoundError", "the Hub cannot be reached. Check the network and HF_ENDPOINT"),
    ("huggingface_hub.errors.OfflineModeIsEnabled", "HF_HUB_OFFLINE forbids the network. Run prepare online first"),
    ("datasets.exceptions.DatasetNotFoundError", "no such data set on the Hub, or it is private or gated. Check the"),
    ("httpx2.RemoteProtocolError", "the connection failed (RemoteProtocolError: x). Check the network"),
    (AnsweredError(401), "access denied (HTTP 401). Set HF_TOKEN"),
    (AnsweredError(403), "access denied (HTTP 403). Set HF_TOKEN"),
    (AnsweredError(503), "the Hub answered HTTP 503. Try again later"),
    (ConnectionError("Couldn't reach"), "the connection failed (ConnectionError: Couldn't reach)"),
    (TimeoutError("too slow"), "the connection failed"),
    (OSError("We couldn't connect to 'x' to load this file"), "the Hub cannot be reached"),
]


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize(("failure", "says"), FAILURES, ids=lambda value: str(value)[:40])
def test_a_failure_is_explained_however_deep_it_is_wrapped(
    monkeypatch: pytest.MonkeyPatch, failure: Any, says: str, depth: int
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    error = exception(failure, "x") if isinstance(failure, str) else failure
    for _ in range(depth):
        wrapper = ValueError("something went wrong")
        wrapper.__cause__ = error
        error = wrapper

    with pytest.raises(HubError) as caught, hub_errors("model 'owner/name'", flag="--model"):
        raise error

    assert str(caught.value).startswith("model 'owner/name': ")
    assert says in str(caught.value)
    assert "{" not in str(caught.value)
    assert caught.value.exit_code == 6


def test_what_is_not_cached_is_the_users_own_wish_when_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    with pytest.raises(HubError, match="HF_HUB_OFFLINE forbids the network"), hub_errors("model 'x'", flag="--model"):
        raise exception("huggingface_hub.errors.LocalEntryNotFoundError", "x")


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        ("huggingface_hub.errors.OfflineModeIsEnabled", "HF_HUB_OFFLINE forbids the network. Unset HF_HUB_OFFLINE"),
        ("huggingface_hub.errors.LocalEntryNotFoundError", "HF_HUB_OFFLINE forbids the network. Unset HF_HUB_OFFLINE"),
        ("huggingface_hub.errors.RepositoryNotFoundError", "set HF_TOKEN to a token that may write there."),
        (AnsweredError(403), "Set HF_TOKEN to a token that may write it."),
        ("httpx2.RemoteProtocolError", "then run the same command again."),
    ],
)
def test_a_failure_to_send_is_not_explained_as_one_to_download(
    monkeypatch: pytest.MonkeyPatch, failure: Any, says: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError) as caught, hub_errors("repository 'a/b'", flag="the repository's id", sends=True):
        raise exception(failure, "x") if isinstance(failure, str) else failure
    assert says in str(caught.value)
    for word in ("prepare", "cache", "local", "{"):
        assert word not in str(caught.value)


@pytest.mark.parametrize("error", [ValueError("x"), OSError("disk"), KeyError("x"), DataError("a", "b")])
def test_what_is_not_the_hubs_is_let_through(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, hub_errors("model 'x'", flag="--model"):
        raise error

    assert caught.value is error
