"""A small stand-in for the Hugging Face Hub, on this machine: what an upload of a folder asks.

It takes every file within the commit. The real one takes large files through its own storage
(xet), which `huggingface_hub` speaks to; it lists their hashes, as this one does.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Repository:
    """files: name -> bytes, of the newest commit. commits: their titles."""

    private: bool
    files: dict = field(default_factory=lambda: {".gitattributes": b"*.bin filter=lfs\n"})
    commits: list = field(default_factory=list)


@dataclass
class StubHub:
    """url: address. repositories: (kind, name) -> Repository. failing: answers of the next
    requests, as (part of the path, status); status None breaks the connection. requests: what
    was asked, in order."""

    url: str = ""
    repositories: dict = field(default_factory=dict)
    failing: list = field(default_factory=list)
    requests: list = field(default_factory=list)
    token: str = "hf_stub"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=None):
        content = json.dumps({} if body is None else body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def refuse(self, status, code, message):
        content = json.dumps({"error": message}).encode()
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def handle_request(self):
        hub = self.server.hub
        path = self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.requests.append((self.command, path))
        for number, (part, status) in enumerate(hub.failing):
            if part in path:
                del hub.failing[number]
                if status is None:
                    self.close_connection = True
                    self.connection.close()
                else:
                    self.answer(status, {"error": "the stub fails as asked"})
                return None
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        found = re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)(/.*)?", path)
        if found is None:
            return self.refuse(404, "", f"no stub of {path}")
        kind, name, rest = found.groups()
        repository = hub.repositories.get((kind, name))
        if repository is None:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        if (rest or "").startswith("/preupload/"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if (rest or "").startswith("/commit/"):
            return self.commit(kind, name, repository, body)
        if (rest or "").startswith("/tree/"):
            return self.answer(200, self.tree(repository))
        return self.answer(200, self.info(name, repository))

    do_GET = do_POST = do_PUT = handle_request

    def create(self, asked):
        hub = self.server.hub
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        kind = asked.get("type") or "model"
        private = asked.get("private") or asked.get("visibility") == "private"
        hub.repositories.setdefault((kind, name), Repository(bool(private)))
        prefix = "datasets/" if kind == "dataset" else ""
        self.answer(200, {"url": f"{hub.url}/{prefix}{name}", "name": name})

    def commit(self, kind, name, repository, body):
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                repository.commits.append(value["summary"])
            elif entry["key"] == "file":
                assert value["encoding"] == "base64"
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "deletedFile":
                del repository.files[value["path"]]
        prefix = "datasets/" if kind == "dataset" else ""
        url = f"{self.server.hub.url}/{prefix}{name}/commit/{'0' * 40}"
        self.answer(200, {"commitUrl": url, "commitOid": "0" * 40, "success": True})

    def tree(self, repository):
        return [
            {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
            for name, content in repository.files.items()
        ]

    def info(self, name, repository):
        siblings = []
        for file, content in repository.files.items():
            digest = hashlib.sha256(content).hexdigest()
            lfs = {"size": len(content), "sha256": digest, "pointerSize": 134}
            is_large = file.endswith((".safetensors", ".parquet"))
            siblings.append(
                {"rfilename": file, "size": len(content), **({"lfs": lfs} if is_large else {})}
            )
        return {
            "id": name,
            "sha": "0" * 40,
            "private": repository.private,
            "tags": [],
            "siblings": siblings,
        }


@contextlib.contextmanager
def stub_hub(monkeypatch):
    """A hub that `huggingface_hub` in this process talks to, with a token that may write."""
    from huggingface_hub import constants

    hub = StubHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub, server.daemon_threads = hub, True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
