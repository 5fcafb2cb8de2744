"""Servers as they are met: a redirect, slow bytes, a tar that is missing or goes away half-way."""

import http.server
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from scale_smog.data import TarDataset
from scale_smog.data.loaders.stream import read_tar
from scale_smog.errors import UserError

pytestmark = pytest.mark.skipif(not shutil.which("curl"), reason="webdataset fetches with curl")
TAR = "train-000000.tar"


class Handler(http.server.BaseHTTPRequestHandler):
    """`/moved/X` leads to `/X`, `/slow/X` comes in pieces, `/gone/X` breaks and then is missing."""

    folder: Path
    requests: Counter[str]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.requests[self.path] += 1
        kind, _, name = self.path.strip("/").rpartition("/")
        path = self.folder / name
        if kind == "moved":
            self.send_response(302)
            self.send_header("Location", f"/{name}")
            self.end_headers()
            return
        if not path.exists() or (kind == "gone" and self.requests[self.path] > 1):
            self.send_error(404)
            return
        self._send(path.read_bytes(), kind)

    def _send(self, content: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        content = content[: len(content) // 2] if kind == "gone" else content
        piece = len(content) // 10 + 1 if kind == "slow" else len(content)
        for start in range(0, len(content), piece):
            self.wfile.write(content[start : start + piece])
            time.sleep(0.05 * (kind == "slow"))


@pytest.fixture
def url(tars: Path) -> Iterator[str]:
    """Of a real server of the tars."""
    handler = type("Own", (Handler,), {"folder": tars, "requests": Counter()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("kind", ["moved", "slow"])
def test_a_redirect_is_followed_and_slow_bytes_are_waited_for(tars, url, kind):
    expected = [TarDataset(tars, "train").read(i) for i in range(16)]
    assert [sample.encoded for sample in read_tar(f"{url}/{kind}/{TAR}")] == expected


@pytest.mark.parametrize("name", [f"gone/{TAR}", "train-999999.tar"])
def test_a_tar_that_is_not_there_or_goes_away_is_named(url, name):
    with pytest.raises(UserError, match=rf"data\.stream: cannot read {url}/{name}"):
        list(read_tar(f"{url}/{name}"))
