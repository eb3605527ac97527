"""A Hub on 127.0.0.1, in memory: the endpoints that `huggingface_hub` uses, and faults to order at each of them.

    with HubServer() as hub:
        hub.fault("commit", status=429, times=2)
        HfApi(endpoint=hub.url, token=TOKEN).create_repo("model")

It speaks the protocol of regular files and of git LFS's basic transfer; clients must set HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


# A planted secret: it may be in the requests' Authorization header, and nowhere else
TOKEN = "hf_PlantedTokenThatMustNotLeak0123456789"
USER = "tester"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".parquet", ".png")

REPO = r"(?P<repo>[^/]+/[^/]+)"
API = rf"/api/(?P<type>model|dataset)s/{REPO}"
ENDPOINTS = {
    "create": ("POST", r"/api/repos/create"),
    "whoami": ("GET", r"/api/whoami-v2"),
    "validate": ("POST", r"/api/validate-yaml"),
    "preupload": ("POST", rf"{API}/preupload/(?P<revision>[^/]+)"),
    "commit": ("POST", rf"{API}/commit/(?P<revision>[^/]+)"),
    "branch": ("POST", rf"{API}/branch/(?P<branch>[^/]+)"),
    "tag": ("POST", rf"{API}/tag/(?P<revision>[^/]+)"),
    "refs": ("GET", rf"{API}/refs"),
    "tree": ("GET", rf"{API}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?"),
    "paths": ("POST", rf"{API}/paths-info/(?P<revision>[^/]+)"),
    "info": ("GET", r"/api/(?P<type>model|dataset)s/(?P<repo>[^/]+(/[^/]+)?)(/revision/(?P<revision>[^/]+))?"),
    "batch": ("POST", rf"(/(?P<type>dataset)s)?/{REPO}\.git/info/lfs/objects/batch"),
    "put": ("PUT", r"/lfs/(?P<oid>\w+)"),
    "verify": ("POST", r"/lfs/verify"),
    "resolve": ("GET", rf"(/(?P<type>dataset)s)?/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
}
# What a push goes through, in this order
PUSH_ENDPOINTS = ("create", "branch", "info", "tree", "validate", "preupload", "batch", "put", "verify", "commit")


@dataclass
class Repo:
    private: bool = False
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> path -> content
    branches: dict[str, str] = field(default_factory=dict)  # branch -> commit
    tags: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        self.messages.append(message)
        oid = hashlib.sha1(f"{branch} {len(self.messages)} {message}".encode()).hexdigest()
        self.files[oid] = files
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str | None) -> str | None:
        revision = revision or "main"
        return (self.branches | self.tags | {oid: oid for oid in self.files}).get(revision)

    def at(self, revision: str = "main") -> dict[str, bytes]:
        """Files of a branch, tag or commit."""
        return self.files[self.resolve(revision)]


@dataclass
class Fault:
    """What an endpoint does instead of answering, `times` times (None: always), after `after` calls."""

    status: int | None = None  # 429, 500, 401, ...; None: the connection is dropped
    retry_after: int | None = None
    delay: float | None = None  # answers, but only after so many seconds
    times: int | None = None


class HubServer:
    def __init__(self):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.calls: Counter[str] = Counter()
        self.faults: dict[str, Fault] = {}
        self.lock = threading.RLock()
        self.needs_token = True
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fault(self, endpoint: str, **options) -> None:
        assert endpoint in ENDPOINTS
        self.faults[endpoint] = Fault(**options)

    def model(self, name: str) -> Repo:
        return self.repos["model", f"{USER}/{name}"]

    def dataset(self, name: str) -> Repo:
        return self.repos["dataset", f"{USER}/{name}"]

    def contents(self) -> Iterator[bytes]:
        """Everything that was ever uploaded or said in a commit."""
        yield from self.lfs.values()
        for repo in self.repos.values():
            yield from (message.encode() for message in repo.messages)
            for files in repo.files.values():
                yield from files.values()

    def environment(self) -> dict[str, str]:
        """For a process whose Hub this is to be. `huggingface_hub` reads most of it when it is imported."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self.answer(self.command)

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def answer(self, method: str) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b"".join(self.chunks())
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        matches = (
            (name, re.fullmatch(pattern, url.path))
            for name, (wanted, pattern) in ENDPOINTS.items()
            if wanted == ("GET" if method == "HEAD" else method)
        )
        name, match = next((pair for pair in matches if pair[1]), ("", None))
        if match is None:
            return self.send(404, {"error": f"no such endpoint: {method} {url.path}"})
        with self.hub.lock:
            self.hub.calls[name] += 1
            fault = self.hub.faults.get(name)
            if fault is not None and fault.times is not None:
                fault.times -= 1
                if fault.times < 0:
                    fault = None
        if fault is not None and fault.delay is not None:
            time.sleep(fault.delay)
        elif fault is not None and fault.status is None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return None
        elif fault is not None:
            headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
            return self.send(fault.status, {"error": "ordered by the test"}, headers)
        if (
            self.hub.needs_token
            and method in ("POST", "GET")
            and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        ):
            return self.send(401, {"error": "Invalid username or password."})
        arguments = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
        with self.hub.lock:
            return getattr(self, f"on_{name}")(**arguments)

    def chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def send(self, status: int, content: dict | list | bytes, headers: dict[str, str] | None = None) -> None:
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def json(self) -> dict:
        return json.loads(self.body)

    def found(self, type: str, repo: str, revision: str | None = None) -> tuple[Repo, str] | None:
        """The repository and the commit of a revision; None after having answered 404."""
        repo = repo if "/" in repo else f"{USER}/{repo}"
        if (type, repo) not in self.hub.repos:
            self.send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        found = self.hub.repos[type, repo]
        commit = found.resolve(revision)
        if commit is None:
            self.send(404, {"error": f"Invalid rev id: {revision}"}, {"X-Error-Code": "RevisionNotFound"})
            return None
        return found, commit

    # Endpoints

    def on_create(self) -> None:
        asked = self.json()
        type_ = asked.get("type", "model")
        name = f"{asked['organization'] or USER}/{asked['name']}"
        url = f"{self.hub.url}/{'datasets/' if type_ == 'dataset' else ''}{name}"
        if (type_, name) in self.hub.repos:
            return self.send(409, {"error": "You already created this repo", "url": url})
        repo = self.hub.repos[type_, name] = Repo(private=asked.get("visibility") == "private")
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return self.send(200, {"url": url, "name": name})

    def on_whoami(self) -> None:
        self.send(200, {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def on_validate(self) -> None:
        self.send(200, {"errors": [], "warnings": []})

    def on_preupload(self, type: str, repo: str, revision: str) -> None:
        if found := self.found(type, repo, revision):
            files = found[0].files[found[1]]
            answers = []
            for file in self.json()["files"]:
                is_lfs = file["path"].endswith(LFS_SUFFIXES)
                there = files.get(file["path"])
                oid = None if there is None else hashlib.sha256(there).hexdigest() if is_lfs else blob_id(there)
                mode = "lfs" if is_lfs else "regular"
                answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            self.send(200, {"files": answers})

    def on_batch(self, repo: str, type: str = "model") -> None:
        if self.found(type, repo):
            objects = []
            for asked in self.json()["objects"]:
                answer = {"oid": asked["oid"], "size": asked["size"]}
                if asked["oid"] not in self.hub.lfs:
                    upload = {"href": f"{self.hub.url}/lfs/{asked['oid']}"}
                    answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs/verify"}}
                objects.append(answer)
            self.send(200, {"transfer": "basic", "objects": objects})

    def on_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.send(400, {"error": "the content is another one"})
        self.hub.lfs[oid] = self.body
        return self.send(200, {})

    def on_verify(self) -> None:
        asked = self.json()
        good = len(self.hub.lfs.get(asked["oid"], b"")) == asked["size"]
        self.send(200 if good else 404, {})

    def on_commit(self, type: str, repo: str, revision: str) -> None:
        if not (found := self.found(type, repo, revision)):
            return
        files = dict(found[0].files[found[1]])
        message = ""
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                message = value["summary"]
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
            else:
                return self.send(400, {"error": f"unknown operation {operation['key']}"})
        oid = found[0].commit(revision, files, message)
        self.send(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True})

    def on_branch(self, type: str, repo: str, branch: str) -> None:
        if found := self.found(type, repo, self.json().get("startingPoint")):
            if branch in found[0].branches:
                return self.send(409, {"error": "Reference already exists"})
            found[0].branches[branch] = found[1]
            self.send(200, {})

    def on_tag(self, type: str, repo: str, revision: str) -> None:
        if found := self.found(type, repo, revision):
            tag = self.json()["tag"]
            if tag in found[0].tags:
                return self.send(409, {"error": "Tag reference exists already"})
            found[0].tags[tag] = found[1]
            self.send(200, {})

    def on_refs(self, type: str, repo: str) -> None:
        if found := self.found(type, repo):
            refs = {
                kind: [{"name": name, "ref": f"refs/{name}", "targetCommit": oid} for name, oid in named.items()]
                for kind, named in (("branches", found[0].branches), ("tags", found[0].tags))
            }
            self.send(200, {**refs, "converts": []})

    def on_info(self, type: str, repo: str, revision: str | None = None) -> None:
        if found := self.found(type, repo, revision):
            siblings = [{"rfilename": path} for path in found[0].files[found[1]]]
            self.send(
                200,
                {"_id": "1", "id": repo, "modelId": repo, "sha": found[1], "private": found[0].private, "tags": [],
                 "downloads": 0, "likes": 0, "siblings": siblings},
            )  # fmt: skip

    def entry(self, path: str, content: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
        if path.endswith(LFS_SUFFIXES):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry

    def on_tree(self, type: str, repo: str, revision: str, path: str = "") -> None:
        if found := self.found(type, repo, revision):
            files, folder = found[0].files[found[1]], f"{path}/" if path else ""
            recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
            entries = {}
            for name, content in files.items():
                if not name.startswith(folder):
                    continue
                parts = name.removeprefix(folder).split("/")
                for depth in range(1, len(parts)):
                    directory = folder + "/".join(parts[:depth])
                    if recursive or depth == 1:
                        entries[directory] = {"type": "directory", "path": directory, "size": 0, "oid": "0" * 40}
                if recursive or len(parts) == 1:
                    entries[name] = self.entry(name, content)
            if path and not entries:
                return self.send(404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})
            self.send(200, list(entries.values()))

    def on_paths(self, type: str, repo: str, revision: str) -> None:
        if found := self.found(type, repo, revision):
            files = found[0].files[found[1]]
            paths = parse_qs(self.body.decode()).get("paths", [])
            entries = [self.entry(path, files[path]) for path in paths if path in files]
            entries += [
                {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}
                for path in paths
                if any(name.startswith(f"{path}/") for name in files)
            ]
            self.send(200, entries)

    def on_resolve(self, repo: str, revision: str, path: str, type: str = "model") -> None:
        if found := self.found(type, repo, revision):
            content = found[0].files[found[1]].get(path)
            headers = {"X-Repo-Commit": found[1]}
            if content is None:
                return self.send(404, {"error": "Entry not found"}, headers | {"X-Error-Code": "EntryNotFound"})
            etag = hashlib.sha256(content).hexdigest() if path.endswith(LFS_SUFFIXES) else blob_id(content)
            headers |= {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
            span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if not span:
                return self.send(200, content, headers)
            start, end = int(span[1]), int(span[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            self.send(206, content[start : end + 1], headers)
