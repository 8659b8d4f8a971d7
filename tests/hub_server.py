"""A stand-in for the Hugging Face Hub on loopback: the calls that huggingface_hub makes to store and fetch files."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_a_test"


class Hub:
    """Repositories in memory: for each its branches, for each branch its commits, for each commit its files."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, list[dict[str, bytes]]]] = {}
        self.private: set[str] = set()
        self.messages: list[str] = []
        self.fetched: list[str] = []
        """Files whose content was fetched."""
        self.address = ""

    def add(self, name: str, files: dict[str, bytes], branch: str = "main") -> None:
        """Commit files to a branch, on top of those of its last commit."""
        commits = self.repositories.setdefault(name, {"main": [{}]}).setdefault(branch, [{}])
        commits.append({**commits[-1], **files})

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        return self.repositories[name][branch][-1]

    def commit_of(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        for branch, commits in self.repositories[name].items():
            for number, files in enumerate(commits):
                sha = hashlib.sha1(f"{name} {branch} {number}".encode()).hexdigest()
                if revision == sha or (revision == branch and number == len(commits) - 1):
                    return sha, files
        return None


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self, status: int, code: str, message: str) -> None:
        self.answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    @property
    def may_write(self) -> bool:
        return self.headers.get("authorization") == f"Bearer {TOKEN}"

    def found(self, name: str) -> bool:
        """Answer with an error where a repository is not there, or not for this user."""
        if name in self.hub.repositories and (name not in self.hub.private or self.may_write):
            return True
        self.fail(404 if self.may_write else 401, "RepoNotFound", "Repository not found")
        return False

    def found_commit(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit of a revision, or None after the answer with an error."""
        commit = self.hub.commit_of(name, revision) if (found := self.found(name)) else None
        if found and commit is None:
            self.fail(404, "RevisionNotFound", "Invalid rev id")
        return commit

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if "resolve" in parts:
            place = parts.index("resolve")
            self.send_file("/".join(parts[:place]), parts[place + 1], "/".join(parts[place + 2 :]))
        elif parts[:2] == ["api", "models"]:
            name, revision = "/".join(parts[2:4]), parts[5] if "revision" in parts else "main"
            if (commit := self.found_commit(name, revision)) is not None:
                siblings = [{"rfilename": file} for file in commit[1]]
                self.answer(200, {"id": name, "sha": commit[0], "siblings": siblings})
        else:
            self.fail(404, "NotFound", self.path)

    do_HEAD = do_GET

    def send_file(self, name: str, revision: str, file: str) -> None:
        if (commit := self.found_commit(name, revision)) is None:
            return
        sha, files = commit
        if file not in files:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        if self.command == "GET":
            self.hub.fetched.append(file)
        etag = hashlib.sha1(files[file]).hexdigest()
        self.answer(200, files[file], {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts == ["api", "validate-yaml"]:
            return self.answer(200, {"errors": [], "warnings": []})
        if not self.may_write:
            return self.answer(401, {"error": "Invalid username or password."})
        if parts == ["api", "repos", "create"]:
            return self.create(json.loads(body))
        name, action, revision = "/".join(parts[2:4]), parts[4], parts[5]
        if not self.found(name):
            return None
        if action == "branch":
            branches = self.hub.repositories[name]
            if revision in branches:
                return self.answer(409, {"error": "Reference already exists"})
            branches[revision] = [branches["main"][-1]]
            return self.answer(201, {})
        if action == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        return self.commit(name, revision, body)

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        address = f"{self.hub.address}/{name}"
        if name in self.hub.repositories:
            return self.answer(409, {"error": "You already created this model repo", "url": address})
        self.hub.repositories[name] = {"main": [{}]}
        if wanted.get("private") or wanted.get("visibility") == "private":
            self.hub.private.add(name)
        return self.answer(200, {"url": address, "name": name})

    def commit(self, name: str, revision: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        files = {v["path"]: base64.b64decode(v["content"]) for v in (x["value"] for x in lines if x["key"] == "file")}
        self.hub.messages.append(next(line["value"]["summary"] for line in lines if line["key"] == "header"))
        self.hub.add(name, files, revision)
        sha = self.hub.commit_of(name, revision)[0]  # type: ignore[index]
        address = f"{self.hub.address}/{name}/commit/{sha}"
        self.answer(200, {"commitUrl": address, "commitOid": sha, "pullRequestUrl": None, "success": True})


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers while the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
