"""A server that speaks as much of the Hugging Face hub's language as its library needs here."""

import hashlib
import json
import threading
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

REVISION = "0123456789abcdef0123456789abcdef01234567"


FACTS = {"size": 1, "oid": REVISION}  # nobody looks at these


class HubServer:
    """Repositories of models, as folders below `folder` (`with`)."""

    def __init__(self, folder: Path) -> None:
        handler = type("Handler", (_Handler,), {"folder": folder})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    folder: Path

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlparse(self.path).path
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(x for x in (asked.get("organization"), asked["name"]) if x)
            (self.folder / name).mkdir(parents=True, exist_ok=True)
            self._answer({"url": f"http://{self.headers['Host']}/{name}"})
        elif path.endswith("/preupload/main"):
            files = [x["path"] for x in json.loads(body)["files"]]
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            self._answer({"files": [{"path": x, **plain} for x in files]})
        elif path.endswith("/commit/main"):
            repository = path.removeprefix("/api/models/").removesuffix("/commit/main")
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    file = self.folder / repository / line["value"]["path"]
                    file.write_bytes(b64decode(line["value"]["content"]))
                if line["key"] == "deletedFile":
                    (self.folder / repository / line["value"]["path"]).unlink()
            self._answer({"commitUrl": self._url(repository), "commitOid": REVISION})
        else:
            self._answer({}, status=200 if path.endswith("/validate-yaml") else 404)

    def do_GET(self) -> None:
        parts = urlparse(self.path).path.strip("/").split("/")
        if "resolve" in parts:
            place = parts.index("resolve")
            file = self.folder.joinpath(*parts[:place], *parts[place + 2 :])
            if file.is_file():
                return self._answer_file(file.read_bytes())
            return self._answer({}, 404, {"X-Error-Code": "EntryNotFound"})
        repository = "/".join(parts[2:4])  # of api/models/USER/NAME
        if parts[4:5] == ["tree"]:
            files = (self.folder / repository).iterdir()
            return self._answer([{"type": "file", "path": x.name, **FACTS} for x in files])
        if parts[:2] == ["api", "models"] and (self.folder / repository).is_dir():
            return self._answer({"id": repository, "sha": REVISION, "siblings": []})
        return self._answer({}, 404, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _url(self, repository: str) -> str:
        return f"http://{self.headers['Host']}/{repository}/commit/{REVISION}"

    def _answer_file(self, content: bytes) -> None:
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": REVISION}
        self._send(content, 200, headers)

    def _answer(self, value: object, status: int = 200, headers: dict[str, str] = {}) -> None:  # noqa: B006
        self._send(json.dumps(value).encode(), status, headers)

    def _send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
