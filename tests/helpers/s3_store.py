"""An S3 server on this machine, and a proxy before it that is slow or fails as it is told."""

import http.client
import http.server
import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from scale_smog.runtime.stores import Store

BUCKET = "images"
KEEP = {"content-length", "content-range", "content-type", "etag", "last-modified"}
Fault = Callable[["Handler"], str | None]


class Proxy(http.server.ThreadingHTTPServer):
    """Hands requests to an S3 server, but for those that `fault(handler)` names.

    What it may name: "slow down", "expired", "reset", "reset half-way", "truncate", "wrong byte".
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, own_port: int):
        super().__init__(("127.0.0.1", own_port), Handler)
        self.to, self.latency_s = port, 0.0
        self.fault: Fault = lambda *_: None
        self.requests: Counter[tuple[str, str]] = Counter()  # by method and file name
        self.faults: Counter[str] = Counter()
        self.num_bytes = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # the other side is gone


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy
    access_key = ""

    def log_message(self, *_):
        pass

    def handle_any(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        name = self.path.partition("?")[0].rpartition("/")[2]
        self.server.requests[self.command, name] += 1
        credential = self.headers.get("Authorization", "").partition("Credential=")[2]
        self.access_key = credential.partition("/")[0]
        time.sleep(self.server.latency_s)
        kind = self.server.fault(self)
        if kind:
            self.server.faults[kind] += 1
        if kind == "slow down":
            return self._refuse(503, "SlowDown", "Please reduce your request rate.")
        if kind == "expired":
            return self._refuse(403, "ExpiredToken", "The provided token has expired.")
        if kind == "reset":
            return self._reset()
        connection = http.client.HTTPConnection("127.0.0.1", self.server.to)
        headers = {k: v for k, v in self.headers.items() if k.lower() != "transfer-encoding"}
        headers["Content-Length"] = str(len(body))
        connection.request(self.command, self.path, body, headers)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        self._answer(response, content, kind)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

    def _answer(self, response, content, kind):
        sent = dict(response.getheaders())
        if kind == "wrong byte" and content:
            content = content[:-1] + bytes([content[-1] ^ 1])
        if kind == "truncate":
            content = content[: len(content) // 2]
        if self.command != "HEAD":
            sent["Content-Length"] = str(len(content))
        self.send_response(response.status)
        for key, value in sent.items():
            if key.lower() in KEEP or key.lower().startswith("x-amz-meta"):
                self.send_header(key, value)
        self.end_headers()
        if kind == "reset half-way":
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            return self._reset()
        self.server.num_bytes += len(content)
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, status, code, message):
        body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _reset(self):
        linger = b"\1\0\0\0\0\0\0\0"
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _chunks(self) -> bytes:
        content = b""
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content


@contextmanager
def s3_server() -> Iterator[int]:
    """The port of a server with an empty bucket."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    from moto.server import ThreadedMotoServer  # it takes a second to import

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("PUT", f"/{BUCKET}")
    assert connection.getresponse().read() is not None
    yield port
    server.stop()


@contextmanager
def proxy_of(port: int, own_port: int) -> Iterator[Proxy]:
    """A proxy before the server of a port, at a port of its own."""
    proxy = Proxy(port, own_port)
    threading.Thread(target=proxy.serve_forever, args=[0.02], daemon=True).start()
    yield proxy
    proxy.shutdown()
    proxy.server_close()


def copy_to(folder: Path, url: str) -> None:
    """Puts a folder's files into a store."""
    store = Store(url)
    for path in sorted(folder.iterdir()):
        if path.is_file():
            store.upload(path, path.name)
