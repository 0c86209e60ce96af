"""A web server on loopback that misbehaves on demand, and remembers every request."""

import gzip
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LONGEST_S = 120.0
"""Nothing waits longer than this, so that a failing test ends."""


@dataclass
class Page:
    """A file of the server, and what goes wrong with it: one fault for each request, in order."""

    data: bytes = b""
    etag: str = '"v1"'
    modified: str = ""
    ranges: bool = True
    if_range: bool = True
    """Whether the server compares `If-Range`; some ignore it."""
    length: bool = True
    headers: Mapping[str, str] = field(default_factory=dict)
    packed: bool = False
    """Whether the body is sent with gzip although nobody asked for it."""
    pause: float = 0.0
    """Seconds between two portions of 64 kB: a slow line."""
    faults: deque[Any] = field(default_factory=deque)
    """An int: the connection breaks after so many bytes. (status, headers): that answer. "hang": waits after half of
    the body until `go_on`. A function: called with the page before it is sent."""
    go_on: threading.Event = field(default_factory=threading.Event)


@dataclass
class Asked:
    """A request."""

    path: str
    headers: dict[str, str]
    sent: int = 0
    """Bytes of the body that were sent, or of which the last piece was about to be."""

    @property
    def range(self) -> str:
        return self.headers.get("range", "")


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves is no news here."""


class Server:
    """`pages` by path; `asked` in order."""

    def __init__(self) -> None:
        self.pages: dict[str, Page] = {}
        self.asked: list[Asked] = []
        self.http = _Http(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def page(self, path: str, data: bytes | str = b"", *faults: Any, **more: Any) -> Page:
        """Put a page on the server."""
        body = data.encode() if isinstance(data, str) else data
        self.pages[path] = Page(body, faults=deque(faults), **more)
        return self.pages[path]

    def _handler(server) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = LONGEST_S

            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                asked = Asked(self.path, {k.lower(): v for k, v in self.headers.items()})
                server.asked.append(asked)
                # A proxy is asked for a whole address.
                path = self.path.partition("//")[2].partition("/")[2] if "://" in self.path else self.path[1:]
                page = server.pages.get("/" + path) or server.pages.get("/" + path.partition("?")[0])
                if page is None:
                    self.answer(404)
                    return
                fault = page.faults.popleft() if page.faults else None
                if callable(fault):
                    fault = fault(page)
                if isinstance(fault, tuple):
                    self.answer(fault[0], fault[1])
                else:
                    self.body(page, asked, fault)

            def answer(self, status: int, headers: Mapping[str, str] | None = None) -> None:
                self.send_response(status)
                for key, value in (headers or {}).items():
                    self.send_header(key, value)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def body(self, page: Page, asked: Asked, fault: Any) -> None:
                data = gzip.compress(page.data) if page.packed else page.data
                start = 0
                condition = asked.headers.get("if-range")
                same = not page.if_range or condition in (None, page.etag, page.modified)
                if page.ranges and asked.range and same:
                    start = int(asked.range.removeprefix("bytes=").removesuffix("-"))
                if start >= len(data) and start:
                    self.answer(416, {"Content-Range": f"bytes */{len(data)}"})
                    return
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                for key, value in {"ETag": page.etag, "Last-Modified": page.modified, **page.headers}.items():
                    if value:
                        self.send_header(key, value)
                if page.packed:
                    self.send_header("Content-Encoding", "gzip")
                if page.length:
                    self.send_header("Content-Length", str(len(data) - start))
                else:
                    self.send_header("Connection", "close")
                self.end_headers()
                rest = data[start:]
                cut = len(rest) // 2 if fault == "hang" else fault if isinstance(fault, int) else len(rest)
                self.write(rest[:cut], asked, page.pause)
                if fault == "hang":
                    page.go_on.wait(LONGEST_S)
                    self.write(rest[cut:], asked, page.pause)
                if isinstance(fault, int) or not page.length:
                    self.close_connection = True

            def write(self, data: bytes, asked: Asked, pause: float) -> None:
                try:
                    for i in range(0, len(data), 1 << 16):
                        time.sleep(pause)
                        asked.sent += len(data[i : i + (1 << 16)])  # before the client can know of it
                        self.wfile.write(data[i : i + (1 << 16)])
                    self.wfile.flush()
                except OSError:  # the client has left
                    self.close_connection = True

        return Handler


@contextmanager
def serving() -> Iterator[Server]:
    """A server that runs inside the block."""
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        for page in server.pages.values():
            page.go_on.set()
        server.http.shutdown()
        server.http.server_close()
        thread.join(LONGEST_S)
