"""A stand-in for the Hugging Face hub: the part of its HTTP interface that huggingface_hub asks for experts.

It keeps repositories in memory as commits of {path: bytes}, hands large files over by git's LFS protocol, knows tokens
with and without the right to write, gated and private models, and collections. What it answers, headers included, is
after the hub; what it does not know it answers with 404. `FakeHub.fail` makes it fail on purpose.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from helpers_hub_repo import Refused, Repo, is_large, oid

WRITER, READER = "hf_writerTokenNobodyMaySee", "hf_readerTokenNobodyMaySee"  # of the account "user"


class FakeHub:
    """The server and what it holds. ``url``: its address. ``requests``: (method, path, status) as they came."""

    writer, reader = WRITER, READER

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.collections: dict[str, list[tuple[str, str]]] = {}
        self.tokens = {WRITER: ("user", True), READER: ("user", False)}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, int]] = []
        self.failures: list[tuple[re.Pattern, int, bool]] = []
        self.open: set[socket.socket] = set()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        """As if the network were gone: connections that clients keep open end too."""
        self.server.shutdown()
        self.server.server_close()
        for connection in self.open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def fail(self, pattern: str, status: int, echo: bool = False) -> None:
        """Answer requests whose "METHOD path" matches with a status; ``echo``: send their token back with it."""
        self.failures.append((re.compile(pattern), status, echo))

    def add(self, name: str, files: dict[str, bytes], private: bool = False) -> Repo:
        """A model that somebody else made."""
        self.repos[name] = Repo(name, private)
        self.repos[name].commit(files)
        return self.repos[name]

    def collect(self, slug: str, *models: str) -> str:
        """A collection of models; "dataset:user/name" is a data set."""
        self.collections[slug] = [(one.split(":")[-1], "dataset" if ":" in one else "model") for one in models]
        return slug

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        return self.repos[name].commits[self.repos[name].at(revision)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: two wait for each other
    hub: FakeHub

    # ------------------------------------------------------------------ HTTP

    def setup(self) -> None:
        super().setup()
        self.hub.open.add(self.connection)

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        headers: dict[str, str] = {}
        try:
            for pattern, status, echo in self.hub.failures:
                if pattern.search(f"{self.command} {path}"):
                    raise Refused(status, "", f"not today, {self.headers.get('Authorization') if echo else 'sorry'}")
            status, content, headers = self._route(path, body)
        except Refused as error:
            # a client error keeps its words in a header too, as the hub does
            status, content = error.status, json.dumps({"error": str(error)}).encode()
            headers = {"X-Error-Message": str(error), **({"X-Error-Code": error.code} if error.code else {})}
        self.hub.requests.append((self.command, path, status))
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), "X-Request-Id": "1", **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _route(self, path: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        name = r"(?P<name>[^/]+/[^/]+?)"
        routes: list[tuple[str, str, Callable]] = [
            ("POST", "/api/repos/create", self._create),
            ("POST", "/api/validate-yaml", self._yaml),
            ("POST", rf"/api/models/{name}/preupload/(?P<revision>.+)", self._preupload),
            ("POST", rf"/api/models/{name}/commit/(?P<revision>.+)", self._commit),
            ("POST", rf"/api/models/{name}/branch/(?P<branch>.+)", self._branch),
            ("POST", rf"/{name}\.git/info/lfs/objects/batch", self._batch),
            ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", self._put),
            ("GET", rf"/api/models/{name}/revision/(?P<revision>.+)", self._info),
            ("GET", rf"/api/models/{name}/tree/(?P<revision>.+)", self._tree),
            ("GET", rf"/api/models/{name}", self._info),
            ("GET", r"/api/collections/(?P<slug>.+)", self._collection),
            ("GET", rf"/{name}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", self._resolve),
        ]
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, handler in routes:
            if method == wanted and (match := re.fullmatch(pattern, path)):
                fake = handler(body=body, **match.groupdict())
                return fake if isinstance(fake, tuple) else (200, json.dumps(fake).encode(), {})
        raise Refused(404, "", "no such page")

    # ------------------------------------------------------------------ who may what

    def _who(self) -> tuple[str, bool] | None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given not in self.hub.tokens:
            raise Refused(401, "", "Invalid credentials in Authorization header")
        return self.hub.tokens.get(given)

    def _repo(self, name: str) -> Repo:
        who, repo = self._who(), self.hub.repos.get(name)
        if repo is None or (repo.private and (who is None or who[0] != name.split("/")[0])):
            raise Refused(404 if who else 401, "RepoNotFound", "Repository not found")
        return repo

    def _may_write(self, name: str) -> None:
        who = self._who()
        if who is None:
            raise Refused(401, "", "Invalid username or password.")
        if who != (name.split("/")[0], True):
            raise Refused(403, "", f"You don't have the rights to write under {name}")

    # ------------------------------------------------------------------ pages

    def _create(self, body: bytes):
        request = json.loads(body)
        name = f"{request['organization'] or 'user'}/{request['name']}"
        self._may_write(name)
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repos:
            content = json.dumps({"error": "You already created this model repo", "url": url}).encode()
            return 409, content, {}
        self.hub.repos[name] = Repo(name, request.get("visibility") == "private" or bool(request.get("private")))
        return {"url": url, "name": name, "id": "1"}

    def _yaml(self, body: bytes):
        text = json.loads(body)["content"]
        try:
            header = yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))
            wrong = [] if isinstance(header, dict) else ["no metadata"]
        except yaml.YAMLError as error:
            wrong = [str(error)]
        if not wrong and header.get("license", "mit") != header.get("license", "mit").lower():
            wrong = ['"license" must be one of those in the list']
        content = json.dumps({"errors": [{"message": one} for one in wrong], "warnings": []}).encode()
        return (400 if wrong else 200), content, {}

    def _preupload(self, name: str, revision: str, body: bytes):
        self._may_write(name)
        there = self._repo(name).commits[self._repo(name).at(revision)]
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                    "shouldIgnore": False,
                    "oid": oid(file["path"], there[file["path"]]) if file["path"] in there else None,
                }
                for file in json.loads(body)["files"]
            ]
        }

    def _batch(self, name: str, body: bytes):
        self._may_write(name)
        objects = []
        for one in json.loads(body)["objects"]:
            to = {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}}
            objects.append({"oid": one["oid"], "size": one["size"]} | ({} if one["oid"] in self.hub.blobs else to))
        return {"transfer": "basic", "objects": objects}

    def _put(self, oid: str, body: bytes):
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        return 200, b"", {"ETag": '"x"'}

    def _commit(self, name: str, revision: str, body: bytes):
        self._may_write(name)
        lines = [json.loads(line) for line in body.splitlines()]
        changes: dict[str, bytes | None] = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "deletedFile":
                changes[value["path"]] = None
                continue
            large = line["key"] == "lfsFile"
            changes[value["path"]] = self.hub.blobs[value["oid"]] if large else base64.b64decode(value["content"])
        repo = self._repo(name)
        head = repo.at(revision)
        if lines[0]["value"].get("parentCommit") not in (None, head):
            raise Refused(412, "", "A commit has happened since. Please refresh and try again.")
        sha = repo.commit(changes, revision, lines[0]["value"]["summary"])
        return {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha}

    def _branch(self, name: str, branch: str, body: bytes):
        self._may_write(name)
        repo = self._repo(name)
        if branch in repo.branches:
            raise Refused(409, "", "Reference already exists")
        repo.branches[branch] = json.loads(body or b"{}").get("startingPoint") or repo.branches["main"]
        return {}

    def _info(self, name: str, body: bytes, revision: str = "main"):
        repo = self._repo(name)
        sha = repo.at(revision)
        files = [{"rfilename": path, "size": len(content)} for path, content in repo.commits[sha].items()]
        return {"id": name, "modelId": name, "sha": sha, "private": repo.private, "siblings": files, "tags": []}

    def _tree(self, name: str, revision: str, body: bytes):
        repo = self._repo(name)
        rows = []
        for path, content in repo.commits[repo.at(revision)].items():
            large = {"oid": oid(path, content), "size": len(content), "pointerSize": 130}
            row = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            rows.append(row | ({"lfs": large} if is_large(path) else {"oid": oid(path, content)}))
        return rows

    def _resolve(self, name: str, revision: str, file: str, body: bytes):
        repo = self._repo(name)
        sha = repo.at(revision)
        if repo.gated:
            raise Refused(403, "GatedRepo", f"Access to model {name} is restricted")
        if file not in repo.commits[sha]:
            raise Refused(404, "EntryNotFound", "Entry not found")
        content = repo.commits[sha][file]
        return 200, content, {"ETag": f'"{oid(file, content)}"', "X-Repo-Commit": sha}

    def _collection(self, slug: str, body: bytes):
        self._who()
        if slug not in self.hub.collections:
            raise Refused(404, "", "Collection not found")
        items = [
            {"_id": str(place), "id": item, "type": kind, "position": place}
            for place, (item, kind) in enumerate(self.hub.collections[slug])
        ]
        return {
            "slug": slug, "title": "Skills", "owner": {"name": "user"}, "items": items, "position": 0, "theme": "green",
            "lastUpdated": "2026-01-01T00:00:00.000Z", "private": False, "upvotes": 0,
        }  # fmt: skip


@pytest.fixture
def hub(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A fresh stand-in that huggingface_hub asks in this process, with an empty cache; nobody is logged in."""
    from huggingface_hub import constants

    fake = FakeHub()
    for name in ("SIGMIX_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    # what the environment sets is read when huggingface_hub is imported
    monkeypatch.setattr(constants, "ENDPOINT", fake.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", fake.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("SIGMIX_CACHE", str(tmp_path / "sigmix-cache"))
    yield fake
    fake.close()
