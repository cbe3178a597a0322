# SPDX-License-Identifier: Apache-2.0
"""A real HTTP server on loopback which speaks the Hugging Face Hub's file and dataset API.

Why: code which calls `transformers`, `datasets` and `huggingface_hub` is tested honestly only when
those libraries run unmodified, over a socket, with their own caching and retrying. Tests cannot
reach huggingface.co, so `LoopbackHub` serves a folder of repositories to a client whose
`HF_ENDPOINT` points at it. (The client is a subprocess: the libraries read their environment when
they are imported.)

What: `<root>/models/<id>/` and `<root>/datasets/<id>/` are repositories with the branch `main`. A
commit id is a hash of the files, so editing a file makes a commit; commits which were served stay
available by their id, as on the Hub. All files are plain git blobs: no LFS or xet headers are sent.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit

_ID = r"(?P<id>(?!\.)[\w.-]+(?:/(?!\.)[\w.-]+)??)"
_API_URL = re.compile(
    rf"/api/(?P<kind>models|datasets)/{_ID}"
    r"(?:/(?P<verb>revision|tree|paths-info)/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?"
)
_FILE_URL = re.compile(rf"/(?:(?P<kind>datasets)/)?{_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
_UPLOAD_URL = re.compile(
    rf"/api/(?:repos/create|validate-yaml|models/{_ID}/(?P<verb>preupload|commit)/(?P<revision>[^/]+))"
)
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class _HubError(Exception):
    """An error answer: a status, the Hub's `X-Error-Code` and a message."""

    def __init__(self, status: HTTPStatus, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message}
        self.headers |= {name.replace("_", "-"): value for name, value in headers.items()}


@dataclass(frozen=True)
class _Repo:
    """One commit of one repository.

    Attributes:
        id: The repository id, with or without an owner.
        files: The content of each file by its path inside the repository.
        blobs: The git blob id of each file by its path.
        commit: The commit id: a hash of all paths and blob ids.
    """

    id: str
    files: dict[str, bytes]
    blobs: dict[str, str]
    commit: str

    @classmethod
    def read(cls, folder: Path, repo_id: str) -> _Repo:
        """Reads the repository in `folder` as it is now."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        blobs = {name: _sha1(b"blob %d\0" % len(data) + data) for name, data in files.items()}
        return cls(repo_id, files, blobs, _sha1(json.dumps(blobs).encode()))

    def info(self, *, gated: bool, private: bool, with_blobs: bool) -> dict[str, object]:
        """Returns the description of the repository."""
        siblings: list[dict[str, object]] = [
            {"rfilename": name} | ({"blobId": self.blobs[name], "size": len(data)} if with_blobs else {})
            for name, data in self.files.items()
        ]
        return {
            "id": self.id,
            "sha": self.commit,
            "private": private,
            "gated": "manual" if gated else False,
            "tags": [],
            "siblings": siblings,
        }

    def entries(self) -> dict[str, dict[str, object]]:
        """Returns each file and each folder as the Hub lists it, by its path."""
        found: dict[str, dict[str, object]] = {}
        for name, data in self.files.items():
            for parent in Path(name).parents[:-1]:
                folder, oid = parent.as_posix(), _sha1(f"{self.commit} {parent}".encode())
                found[folder] = {"type": "directory", "oid": oid, "size": 0, "path": folder}
            oid = self.blobs[name]
            found[name] = {"type": "file", "oid": oid, "size": len(data), "path": name}
        return found

    def tree(self, folder: str, *, recursive: bool) -> list[dict[str, object]]:
        """Returns the entries below `folder`, or of the whole repository if that is empty."""
        entries = self.entries()
        if folder and entries.get(folder, {}).get("type") != "directory":
            raise self.entry_not_found(folder)
        prefix = f"{folder}/" if folder else ""
        below = [name for name in sorted(entries) if name.startswith(prefix)]
        return [entries[name] for name in below if recursive or "/" not in name[len(prefix) :]]

    def entry_not_found(self, path: str) -> _HubError:
        """Returns the error for a missing path, with the commit for the client's memory of it."""
        headers = {"X_Repo_Commit": self.commit}
        return _HubError(HTTPStatus.NOT_FOUND, "EntryNotFound", f"{path} does not exist", **headers)


class LoopbackHub:
    """A Hub on a free port of 127.0.0.1, serving in the body of a `with` statement.

    Every connection carries one request, so nothing is answered after `stop()`: clients are then
    refused, which is what being offline looks like.

    Attributes:
        endpoint: The value for `HF_ENDPOINT`, which stays set after `stop()`.
        gated: Ids whose files are refused with 401 to clients without a token and with 403 to those
            with one. As on the real Hub, their description and their file list stay public.
        private: Ids of repositories that were made private.
        drop_connections: Whether to break answers off: the full length is announced, half of the
            body is sent and the connection is closed. A number breaks off only so many answers.
        drop_methods: The methods which `drop_connections` is about. An answer to `HEAD` has no
            body; there, the connection is closed without any answer.
        requests: The method and the path (with its query) of each request, in order of arrival.
    """

    def __init__(self, root: Path) -> None:
        """Prepares a server of the folder `root`."""
        self.endpoint = ""
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.drop_connections: bool | int = False
        self.drop_methods: set[str] = {"GET", "POST"}
        self.requests: list[tuple[str, str]] = []
        self._root = root
        self._commits: dict[tuple[str, str, str], _Repo] = {}
        self._lock = threading.Lock()
        self._server: ThreadingHTTPServer | None = None

    def __enter__(self) -> Self:
        """Opens a port and serves it from a background thread."""
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Stops serving."""
        self.stop()

    def stop(self) -> None:
        """Closes the port; nothing happens if it is closed."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def find(self, kind: str, repo_id: str, revision: str) -> _Repo:
        """Returns a commit of a repository, or raises the Hub's error if there is none.

        A folder without any file of its own is an owner's folder and not a repository.
        """
        folder = self._root / kind / repo_id
        if not folder.is_dir() or not any(path.is_file() for path in folder.iterdir()):
            raise _HubError(HTTPStatus.NOT_FOUND, "RepoNotFound", "Repository not found")
        head = _Repo.read(folder, repo_id)
        self._commits[kind, repo_id, head.commit] = head
        commit = head.commit if revision in {"main", "refs/heads/main"} else revision
        if (kind, repo_id, commit) not in self._commits:
            message = f"Invalid rev id: {revision}"
            raise _HubError(HTTPStatus.NOT_FOUND, "RevisionNotFound", message)
        return self._commits[kind, repo_id, commit]

    def create(self, repo_id: str, *, private: bool = False) -> Path:
        """Makes the folder of a model's repository; one that is there keeps its visibility."""
        folder = self._root / "models" / repo_id
        if private and not folder.exists():
            self.private.add(repo_id)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".gitattributes").touch()
        return folder

    def put(self, repo_id: str, path: str, content: bytes) -> None:
        """Writes a file of a model's repository."""
        target = self._root / "models" / repo_id / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)

    def delete(self, repo_id: str, path: str) -> None:
        """Deletes a file of a model's repository."""
        (self._root / "models" / repo_id / path).unlink()

    def take_drop(self, method: str) -> bool:
        """Returns whether to break off the answer to a `method` request, and counts it."""
        with self._lock:
            if not self.drop_connections or method not in self.drop_methods:
                return False
            if self.drop_connections is not True:
                self.drop_connections -= 1
            return True


class _Handler(BaseHTTPRequestHandler):
    """Answers one request to a `LoopbackHub`."""

    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def _answer(self) -> None:
        """Answers any request."""
        self.hub.requests.append((self.command, self.path))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        try:
            if self.command == "POST" and self._answer_upload(url.path, body):
                return
            values = parse_qs(body.decode() or url.query)
            if match := _API_URL.fullmatch(url.path):
                self._answer_api(match, values)
            elif match := _FILE_URL.fullmatch(url.path):
                self._answer_file(match)
            elif url.path == "/api/whoami-v2" and self._has_token():
                self._send_json({"type": "user", "name": "loopback", "orgs": [], "auth": {}})
            elif url.path == "/api/whoami-v2":
                raise _HubError(HTTPStatus.UNAUTHORIZED, "Unauthorized", "Invalid credentials")
            else:
                raise _HubError(HTTPStatus.NOT_FOUND, "NotFound", f"No such page: {url.path}")
        except _HubError as error:
            self._send_json({"error": str(error)}, error.headers, error.status)

    do_GET = do_HEAD = do_POST = _answer  # noqa: N815

    def _answer_upload(self, path: str, body: bytes) -> bool:
        """Answers what an upload asks for, if that is what `path` means: the making of a repository, the check of a
        card, how to send each file (always inside the commit), and the commit itself.
        """
        match = _UPLOAD_URL.fullmatch(path)
        if match is None:
            return False
        if not self._has_token():
            raise _HubError(HTTPStatus.UNAUTHORIZED, "Unauthorized", "Invalid username or password.")
        if match["id"] is None and path.endswith("create"):
            asked = json.loads(body)
            repo_id = "/".join(filter(None, (asked.get("organization") or "loopback", asked["name"])))
            folder = self.hub.create(repo_id, private=asked.get("visibility") == "private")
            self._send_json({"url": f"{self.hub.endpoint}/{repo_id}", "id": repo_id, "name": folder.name})
        elif match["id"] is None:
            content = json.loads(body)["content"]
            errors = [] if content.startswith("---\n") else [{"message": "no metadata"}]
            self._send_json({"errors": errors, "warnings": []}, status=HTTPStatus(400 if errors else 200))
        elif match["verb"] == "preupload":
            files = [f["path"] for f in json.loads(body)["files"]]
            modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for p in files]
            self._send_json({"files": modes})
        else:
            repo_id = unquote(match["id"])
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    self.hub.put(repo_id, line["value"]["path"], base64.b64decode(line["value"]["content"]))
                elif line["key"] == "deletedFile":
                    self.hub.delete(repo_id, line["value"]["path"])
            commit = self.hub.find("models", repo_id, "main").commit
            url = f"{self.hub.endpoint}/{repo_id}/commit/{commit}"
            self._send_json({"commitUrl": url, "commitOid": commit, "pullRequestUrl": None, "success": True})
        return True

    def _answer_api(self, match: re.Match[str], values: Mapping[str, list[str]]) -> None:
        """Answers with a description, a file list, or what is known of some paths."""
        repo = self.hub.find(match["kind"], match["id"], unquote(match["revision"] or "main"))
        flags = {name for name, given in values.items() if given[0].lower() in {"1", "true"}}
        if match["verb"] == "tree":
            folder = unquote(match["path"] or "")
            self._send_json(repo.tree(folder, recursive="recursive" in flags))
        elif match["verb"] == "paths-info":
            entries = repo.entries()
            self._send_json([entries[path] for path in values.get("paths", []) if path in entries])
        else:
            private, gated = repo.id in self.hub.private, repo.id in self.hub.gated
            self._send_json(repo.info(gated=gated, private=private, with_blobs="blobs" in flags))

    def _answer_file(self, match: re.Match[str]) -> None:
        """Answers with a file, or with the range of it which was asked for."""
        repo = self.hub.find(match["kind"] or "models", match["id"], unquote(match["revision"]))
        if repo.id in self.hub.gated:
            status = HTTPStatus.FORBIDDEN if self._has_token() else HTTPStatus.UNAUTHORIZED
            raise _HubError(status, "GatedRepo", f"Access to {repo.id} is restricted.")
        path = unquote(match["path"])
        if path not in repo.files:
            raise repo.entry_not_found(path)
        data, size = repo.files[path], len(repo.files[path])
        headers = {"ETag": f'"{repo.blobs[path]}"', "X-Repo-Commit": repo.commit}
        headers |= {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        asked = _RANGE.fullmatch(self.headers.get("Range", ""))
        if not asked:
            self._send(data, headers)
            return
        start, end = int(asked[1]), min(int(asked[2] or size) + 1, size)
        if start >= end:
            status, limits = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, f"bytes */{size}"
            raise _HubError(status, "InvalidRange", "Invalid range", Content_Range=limits)
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        self._send(data[start:end], headers, HTTPStatus.PARTIAL_CONTENT)

    def _has_token(self) -> bool:
        """Returns whether the client sent a token; all tokens are alike."""
        return self.headers.get("Authorization", "").startswith("Bearer ")

    def _send_json(
        self,
        value: object,
        headers: Mapping[str, str] | None = None,
        status: HTTPStatus = HTTPStatus.OK,
    ) -> None:
        """Sends `value` as JSON."""
        headers = {"Content-Type": "application/json", **(headers or {})}
        self._send(json.dumps(value).encode(), headers, status)

    def _send(self, body: bytes, headers: Mapping[str, str], status: HTTPStatus = HTTPStatus.OK) -> None:
        """Sends an answer, or breaks it off, and closes the connection."""
        self.close_connection = True
        dropped = self.hub.take_drop(self.command)
        if dropped and self.command == "HEAD":
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if dropped else body)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Does nothing: `LoopbackHub.requests` is the log."""


def _sha1(data: bytes) -> str:
    """Returns the SHA-1 of `data` in hexadecimal, by which git names objects."""
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()
