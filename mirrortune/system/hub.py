# SPDX-License-Identifier: Apache-2.0
"""Access the Hugging Face Hub: resolve commits, download adapters, upload files, and translate errors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mirrortune import __version__
from mirrortune.errors import ConfigError, HubError, MirrortuneError, first_line
from mirrortune.system.outputs import restore
from mirrortune.system.paths import hub_place, local_path, looks_like_path

ADAPTER_FILES = ("adapter.json", "adapter.safetensors", "adapter_config.json", "adapter_model.safetensors")
"""All files that an adapter may consist of: mirrortune's format, or PEFT's with mirrortune's ``adapter.json``."""
# Looked up by class name along the chain of causes: transformers and datasets wrap exceptions of the Hub's client in
# OSError, ConnectionError or their own classes, and keep the original as the cause.
_CAUSES: dict[str, tuple[str, str]] = {
    "GatedRepoError": (
        "the repository is gated and this account has no access",
        "Ask for access on its page, then set HF_TOKEN",
    ),
    "RepositoryNotFoundError": (
        "no such repository on the Hub, or it is private",
        "Check the spelling of {flag}; for a private one set HF_TOKEN; for a local folder check that it exists",
    ),
    "DatasetNotFoundError": (
        "no such data set on the Hub, or it is private or gated",
        "Check the spelling of {flag}; for a private or gated one set HF_TOKEN; for a local file check that it exists",
    ),
    "RevisionNotFoundError": ("no such revision", "Check --revision"),
    "LocalTokenNotFoundError": ("there is no token", "Set HF_TOKEN to one that may write, or run: hf auth login"),
    # Before its base class EntryNotFoundError.
    "LocalEntryNotFoundError": (
        "not in the local cache, and the Hub cannot be reached",
        "Check the network and HF_ENDPOINT",
    ),
    "EntryNotFoundError": ("a file is missing from the repository", "Check that it is a {what} repository"),
    "OfflineModeIsEnabled": (
        "not in the local cache, and HF_HUB_OFFLINE forbids the network",
        "Run prepare online first; if {flag} is a local file or folder, check that it exists",
    ),
}
_SENDING: dict[str, tuple[str, str]] = {
    "RepositoryNotFoundError": (
        "no such repository on the Hub, or this token may not write to it",
        "Check the spelling of {flag}; set HF_TOKEN to a token that may write there",
    ),
    "LocalEntryNotFoundError": ("the Hub cannot be reached", "Check the network and HF_ENDPOINT"),
    "OfflineModeIsEnabled": (
        "nothing was sent, because HF_HUB_OFFLINE forbids the network",
        "Unset HF_HUB_OFFLINE, then run the same command again",
    ),
}
"""Explanations in place of those of ``_CAUSES`` when files are uploaded."""
# fmt: off
_NETWORK = frozenset((
    "RevisionResolutionError", "ConnectError", "ConnectTimeout", "ReadTimeout", "ReadError", "WriteError",
    "RemoteProtocolError", "ProtocolError", "ConnectionError", "ChunkedEncodingError", "IncompleteRead",
    "ClientConnectorError", "ServerDisconnectedError", "ClientPayloadError", "TimeoutException", "FSTimeoutError",
    "TransportError", "NetworkError", "TimeoutError",
))
# fmt: on


@contextmanager
def hub_errors(where: str, *, flag: str, sends: bool = False) -> Iterator[None]:
    """Turn errors of the Hub and the network that the block raises into errors of mirrortune.

    Args:
        where: description of the download, such as ``"model 'roberta-base'"``.
        flag: command-line flag that named it; used in the advice.
        sends: the block uploads files, so that advice about downloads does not apply.

    Raises:
        ConfigError: the name is not a valid repository id.
        HubError: any other failure.
    """
    try:
        yield
    except MirrortuneError:
        raise
    except Exception as error:
        if type(error).__name__ == "HFValidationError":
            problem = f"{where} is neither a local path nor a valid Hub id"
            raise ConfigError(flag, problem, allowed="what exists here, or owner/name", fix="Check the path") from error
        explained = _explain(error, sends=sends)
        if explained is None:
            raise
        problem, fix = explained
        raise HubError(where, problem, fix=fix.format(flag=flag, what=where.split(" '", maxsplit=1)[0])) from error


def resolve_commit(where: str, repository: str, revision: str | None, kind: str, flag: str) -> str:
    """Resolve a revision of a Hub repository to its commit; if the Hub cannot be reached, from the local cache.

    All later calls use the commit, so that a run never mixes two states of a repository and cached files need no
    request.
    """
    import huggingface_hub  # noqa: PLC0415

    with hub_errors(f"{'data set' if kind == 'dataset' else kind} '{where}'", flag=flag):
        return str(huggingface_hub.resolve_revision(repository, revision=revision, repo_type=kind).resolved)


def local_adapter(name: str | Path, *, revision: str | None = None, subfolder: str | None = None) -> Path:
    """Return the local folder of an adapter, downloading it if it is on the Hub.

    Args:
        name: folder of the adapter or of a run, or ``owner/name@revision:subfolder`` on the Hub.
        revision: branch, tag or commit of a Hub repository.
        subfolder: subfolder of the folder or the repository.

    Raises:
        ConfigError: ``revision`` was given for a local folder, or ``subfolder`` leads out of its parent.
        HubError: the download failed.
    """
    folder = restore(local_path(name))
    repository, own_revision, own_subfolder = hub_place(str(name))
    if folder.is_dir() or looks_like_path(repository):
        if revision is not None:
            raise ConfigError("revision", f"'{name}' is a folder and has none", fix="Remove it")
        folder = restore(folder / path_inside(subfolder))
        within = restore(folder / "adapter")
        return within if (within / "adapter.json").is_file() else folder
    for given, own in ((revision, own_revision), (subfolder, own_subfolder)):
        if given is not None and own not in (None, given):
            raise ConfigError(str(name), f"it says '{own}', and '{given}' was given", fix="Give one of the two")
    import huggingface_hub  # noqa: PLC0415

    inside = path_inside(subfolder or own_subfolder)
    commit = resolve_commit(str(name), repository, revision or own_revision, "model", "the adapter")
    with hub_errors(f"adapter '{name}'", flag="the adapter"):
        patterns = [str(inside / file) for file in ADAPTER_FILES]
        return Path(huggingface_hub.snapshot_download(repository, revision=commit, allow_patterns=patterns)) / inside


def holds_adapter(place: str) -> bool:
    """Return whether the Hub has an adapter at ``owner/name@revision:subfolder``."""
    from transformers.utils.hub import cached_file  # noqa: PLC0415

    repository, revision, subfolder = hub_place(place)
    commit = resolve_commit(place, repository, revision, "model", "the model")
    with hub_errors(f"model '{place}'", flag="the model"):
        found = cached_file(
            repository, str(path_inside(subfolder) / ADAPTER_FILES[0]), revision=commit,
            _raise_exceptions_for_missing_entries=False,
        )  # fmt: skip
    return found is not None


def check_repository(repository: str) -> None:
    """Raise ConfigError if ``repository`` is not a valid repository id."""
    from huggingface_hub.errors import HFValidationError  # noqa: PLC0415
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # noqa: PLC0415

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(
            "ID", f"'{repository}' is not the id of a repository",
            allowed="name or owner/name, of letters, digits, '-', '_' and '.', at most 96 characters, without '-' or "
            "'.' at the ends, and without '--', '..' or '.git' at the end",
        ) from error  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """A commit made by :func:`upload`.

    Attributes:
        repository: full id of the repository.
        url: URL of the commit.
        kept: files of the repository that were kept instead of being replaced.
        deleted: files of the repository that were deleted.
        untouched: the other files in the same folder of the repository.
    """

    repository: str
    url: str
    kept: list[str]
    deleted: list[str]
    untouched: list[str]


def upload(
    files: Mapping[str, Path],
    repository: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    private: bool = False,
    keep: Mapping[str, Callable[[bytes], bool]] | None = None,
    is_outdated: Callable[[str], bool] = lambda _: False,
) -> Upload:
    """Upload files to a model repository on the Hub, which is created if it does not exist.

    Args:
        files: path in the repository -> local file.
        repository: ``name`` or ``owner/name``.
        revision: existing branch.
        subfolder: subfolder of the repository.
        private: create a private repository, and upload nothing to a public one.
        keep: by path in the repository, says of the content of an existing file whether it is kept.
        is_outdated: says whether an existing file that is not among ``files`` is deleted in the same commit.

    Raises:
        ConfigError: the id is not valid, the subfolder leads out of the repository, or ``private`` was given for a
            repository that is public.
        HubError: the upload failed.
    """
    import huggingface_hub  # noqa: PLC0415

    check_repository(repository)
    inside = path_inside(subfolder)
    with hub_errors(f"repository '{repository}'", flag="the repository's id", sends=True):
        api = huggingface_hub.HfApi(library_name="mirrortune", library_version=__version__)
        full = api.create_repo(repository, private=private or None, exist_ok=True).repo_id
        # Creating a repository that exists does not change its visibility.
        if private and api.repo_info(full).private is not True:
            raise ConfigError(
                "--private", f"repository '{full}' is public, nothing was sent",
                fix="Make it private on its page, choose another name, or leave out --private",
            )  # fmt: skip
        sent = {str(inside / name): path for name, path in files.items()}
        there = set(api.list_repo_files(full, revision=revision))
        kept = []
        for name in sorted(sent.keys() & there & (keep or {}).keys()):
            held = Path(api.hf_hub_download(full, name, revision=revision)).read_bytes()
            if held != sent[name].read_bytes() and (keep or {})[name](held):
                kept.append(name)
        deleted = sorted(name for name in there - sent.keys() if is_outdated(name))
        others = there - sent.keys() - {*deleted}
        untouched = sorted(name for name in others if PurePosixPath(name).parent == inside)
        operations: list[Any] = [
            huggingface_hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=path)
            for name, path in sent.items() if name not in kept
        ]  # fmt: skip
        operations += [huggingface_hub.CommitOperationDelete(path_in_repo=name) for name in deleted]
        message = f"mirrortune {__version__}"
        done = api.create_commit(repo_id=full, operations=operations, revision=revision, commit_message=message)
    return Upload(repository=str(full), url=str(done.commit_url), kept=kept, deleted=deleted, untouched=untouched)


def path_inside(subfolder: str | None) -> PurePosixPath:
    """Return a subfolder as a relative path.

    Raises:
        ConfigError: it leads out of its parent.
    """
    inside = PurePosixPath(subfolder or ".")
    if inside.is_absolute() or ".." in inside.parts:
        raise ConfigError("subfolder", f"got '{subfolder}'", allowed="a folder inside the repository")
    return inside


def _explain(error: BaseException, *, sends: bool) -> tuple[str, str] | None:
    causes = {**_CAUSES, **_SENDING} if sends else _CAUSES
    chain = list(_chain(error))
    by_class = {cls.__name__: e for e in chain for cls in type(e).__mro__}
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    for name, explained in causes.items():
        if name in by_class:
            if name == "LocalEntryNotFoundError" and offline:
                return causes["OfflineModeIsEnabled"]
            return explained
    status = next((s for e in chain if (s := _status(e)) is not None), None)
    if status in (401, 403):
        return f"access denied (HTTP {status})", f"Set HF_TOKEN to a token that may {'write' if sends else 'read'} it"
    if status is not None:
        return f"the Hub answered HTTP {status}", "Try again later"
    failed = next((name for name in by_class if name in _NETWORK), None)
    if failed is not None:
        kept = "" if sends else ": finished files are kept"
        return (
            f"the connection failed ({failed}: {first_line(by_class[failed], 120)})",
            f"Check the network and HF_ENDPOINT, then run the same command again{kept}",
        )
    if any("couldn't connect" in str(e).lower() or "offline" in str(e).lower() for e in chain):
        return causes["OfflineModeIsEnabled" if offline else "LocalEntryNotFoundError"]
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None
