"""Downloads against a server that is slow, broken, truncated, changed, forgetful or plainly hostile."""

import errno
import hashlib
import json
import random
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webserver import Page, Server, serving

from oriole.errors import ConfigError, DataError, ResourceError
from oriole.text import download as module
from oriole.text.download import Wanted, checked_path, download
from oriole.text.web import Gated, NetConfig, Stopped, Web

DATA = random.Random(0).randbytes(300_000)
OTHER = random.Random(1).randbytes(280_000)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with serving() as running:
        yield running
    while CLIENTS:
        CLIENTS.pop().__exit__()


CLIENTS: list[Web] = []
"""To be closed after a test."""


class Patience(threading.Event):
    """A wish to stop that never comes, and notes how long one would have waited."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout or 0)
        return self.is_set()


def web(**config: Any) -> Web:
    CLIENTS.append(Web(NetConfig.model_validate({"retries": 3, "timeout": 5, **config}), stop=Patience()))
    return CLIENTS[-1]


def waits(asking: Web) -> list[float]:
    assert isinstance(asking.stop, Patience)
    return asking.stop.waits


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def get(server: Server, folder: Path, asking: Web | None = None, **more: Any) -> bytes:
    """Download /f; nothing but the file may be left."""
    wanted = Wanted("f", more.pop("addresses", (f"{server.url}/f",)), **more)
    path, digest, _ = download(wanted, folder, asking or web())
    assert [p.name for p in folder.iterdir()] == ["f"]
    data = path.read_bytes()
    assert digest == hashlib.sha256(data).hexdigest()
    return data


def part(folder: Path, data: bytes, **state: Any) -> None:
    """What an earlier, killed download has left."""
    (folder / "f.part").write_bytes(data)
    (folder / "f.part.state").write_text(json.dumps({"schema": 1, **state}))


# --- what goes well --------------------------------------------------------------------------------------------------


def test_a_plain_download(server: Server, tmp_path: Path) -> None:
    server.page("/f", DATA)
    moved: list[int] = []
    wanted = Wanted("deep/er/f", (f"{server.url}/f",), len(DATA), sha256(DATA))
    path, _, address = download(wanted, tmp_path, web(), moved.append)
    assert path == tmp_path / "deep" / "er" / "f" and path.read_bytes() == DATA and address == f"{server.url}/f"
    assert sum(moved) == len(DATA) and [a.range for a in server.asked] == [""]
    assert server.asked[0].headers["accept-encoding"] == "identity"


def test_an_empty_file(server: Server, tmp_path: Path) -> None:
    server.page("/f", b"")
    assert get(server, tmp_path, size=0, checksum=sha256(b"")) == b""


def test_a_redirect_is_followed(server: Server, tmp_path: Path) -> None:
    server.page("/f", b"", (302, {"Location": "/there"}))
    server.page("/there", DATA)
    assert get(server, tmp_path) == DATA


def test_a_body_packed_for_the_way_is_unpacked(server: Server, tmp_path: Path) -> None:
    text = b"the same line\n" * 1000
    server.page("/f", text, packed=True)
    assert get(server, tmp_path, checksum=sha256(text)) == text


def test_gits_own_checksum(server: Server, tmp_path: Path) -> None:
    server.page("/f", b"hello\n")
    assert get(server, tmp_path, checksum="git:ce013625030ba8dba906f756967f9e9ca394464a") == b"hello\n"


# --- broken and truncated --------------------------------------------------------------------------------------------


def test_a_broken_download_asks_for_the_rest_only(server: Server, tmp_path: Path) -> None:
    server.page("/f", DATA, 100_000, 150_000)
    moved: list[int] = []
    path, _, _ = download(Wanted("f", (f"{server.url}/f",)), tmp_path, web(), moved.append)
    assert path.read_bytes() == DATA and sum(moved) == len(DATA)
    assert [a.range for a in server.asked] == ["", "bytes=100000-", "bytes=250000-"]
    assert [a.headers.get("if-range") for a in server.asked] == [None, '"v1"', '"v1"']
    assert sum(a.sent for a in server.asked) == len(DATA)


def test_many_breaks_are_no_failure_as_long_as_something_comes(server: Server, tmp_path: Path) -> None:
    server.page("/f", DATA, *[25_000] * 11)
    assert get(server, tmp_path, web(retries=1)) == DATA
    assert len(server.asked) == 12


@settings(max_examples=25)
@given(cuts=st.lists(st.integers(0, 3000), max_size=6), size=st.integers(0, 8000), known=st.booleans())
def test_whatever_breaks_the_file_is_whole_and_no_byte_comes_twice(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], size: int, known: bool
) -> None:
    data = DATA[:size]
    with serving() as server:
        server.page("/f", data, *cuts)
        checksum = sha256(data) if known else ""
        assert get(server, tmp_path_factory.mktemp("f"), web(retries=9), checksum=checksum) == data
        assert sum(a.sent for a in server.asked) == size
        CLIENTS.pop().__exit__()


def test_a_file_without_a_length_that_ends_too_early(server: Server, tmp_path: Path) -> None:
    server.page("/f", DATA, 1000, length=False)
    assert get(server, tmp_path, size=len(DATA)) == DATA
    assert [a.range for a in server.asked] == ["", "bytes=1000-"]


def test_a_server_that_cannot_resume_starts_again(server: Server, tmp_path: Path) -> None:
    server.page("/f", DATA, 200_000, ranges=False)
    moved: list[int] = []
    path, _, _ = download(Wanted("f", (f"{server.url}/f",)), tmp_path, web(), moved.append)
    assert path.read_bytes() == DATA and sum(moved) == len(DATA)
    assert sum(a.sent for a in server.asked) == len(DATA) + 200_000


def test_a_server_that_always_breaks_at_the_same_place_is_given_up(server: Server, tmp_path: Path) -> None:
    server.page("/f", DATA, *[1000] * 99, ranges=False)
    with pytest.raises(DataError, match=r"f could not be downloaded \(127.0.0.1:\d+: the connection broke .*4 times"):
        get(server, tmp_path)
    assert len(server.asked) == 4  # the first one brought something, three more brought nothing new
    assert (tmp_path / "f.part").stat().st_size == 1000


def test_a_stalled_connection_is_left_and_resumed(server: Server, tmp_path: Path) -> None:
    server.page("/f", DATA, "hang")
    assert get(server, tmp_path, web(timeout=0.4)) == DATA
    assert [a.range for a in server.asked] == ["", "bytes=150000-"]


def test_more_bytes_than_the_file_has(server: Server, tmp_path: Path) -> None:
    server.page("/f", DATA, length=False)
    with pytest.raises(DataError, match="sends more than the 1000 bytes of the file"):
        get(server, tmp_path, size=1000)


# --- changed ---------------------------------------------------------------------------------------------------------


def change(data: bytes) -> Callable[[Page], None]:
    """A fault: from now on the file is another one."""

    def now(page: Page) -> None:
        page.data, page.etag = data, page.etag.replace("v1", "v2")

    return now


def test_a_file_that_changes_is_fetched_whole(server: Server, tmp_path: Path) -> None:
    server.page("/f", DATA, 100_000, change(OTHER))
    assert get(server, tmp_path) == OTHER
    assert server.asked[1].range == "bytes=100000-" and server.asked[1].sent == len(OTHER)


@pytest.mark.parametrize("etag", ['"v1"', 'W/"v1"'])
@pytest.mark.parametrize("size", [len(OTHER), len(OTHER) - 1])
def test_a_changed_file_of_a_server_that_ignores_if_range(server: Server, tmp_path: Path, etag: str, size: int) -> None:
    server.page("/f", DATA[: len(OTHER)], 100_000, change(OTHER[:size]), etag=etag, if_range=False)
    assert get(server, tmp_path) == OTHER[:size]
    assert "if-range" not in server.asked[1].headers or not etag.startswith("W/")


def test_versions_told_by_date_only(server: Server, tmp_path: Path) -> None:
    date = "Wed, 01 Jan 2025 00:00:00 GMT"
    server.page("/f", DATA, 100_000, etag="", modified=date)
    assert get(server, tmp_path) == DATA
    assert server.asked[1].headers["if-range"] == date


def test_without_versions_and_checksum_nothing_is_resumed(server: Server, tmp_path: Path) -> None:
    server.page("/f", DATA, 100_000, etag="")
    assert get(server, tmp_path) == DATA and [a.range for a in server.asked] == ["", ""]


def test_without_versions_a_checksum_is_enough_to_resume(server: Server, tmp_path: Path) -> None:
    server.page("/f", DATA, 100_000, etag="")
    assert get(server, tmp_path, checksum=sha256(DATA)) == DATA
    assert [a.range for a in server.asked] == ["", "bytes=100000-"]


def test_a_part_of_which_nothing_is_known_is_not_trusted(server: Server, tmp_path: Path) -> None:
    server.page("/f", DATA)
    (tmp_path / "f.part").write_bytes(DATA[:5000])
    (tmp_path / "f.part.state").write_text("{cut sho")
    assert get(server, tmp_path) == DATA and server.asked[0].range == ""


def test_a_spoilt_part_is_found_by_the_checksum_and_fetched_again(server: Server, tmp_path: Path) -> None:
    server.page("/f", DATA)
    part(tmp_path, b"x" * 5000, address=f"{server.url}/f", etag='"v1"', size=len(DATA))
    assert get(server, tmp_path, checksum=sha256(DATA)) == DATA
    assert [a.range for a in server.asked] == ["bytes=5000-", ""]


def test_a_part_that_is_complete_or_too_long(server: Server, tmp_path: Path) -> None:
    server.page("/f", DATA)
    part(tmp_path, DATA, address=f"{server.url}/f", etag='"v1"', size=len(DATA))
    assert get(server, tmp_path) == DATA and sum(a.sent for a in server.asked) == 0
    (tmp_path / "f").unlink()
    part(tmp_path, DATA + b"more", address=f"{server.url}/f", etag='"v1"', size=len(DATA))
    assert get(server, tmp_path) == DATA and sum(a.sent for a in server.asked) == len(DATA)


def test_another_size_than_expected(server: Server, tmp_path: Path) -> None:
    server.page("/f", DATA)
    with pytest.raises(DataError, match="its file has 300000 bytes where 299999 were expected, so it is another one"):
        get(server, tmp_path, size=299_999)


# --- checksums and mirrors -------------------------------------------------------------------------------------------


def test_a_wrong_checksum_is_refused_and_leaves_nothing(server: Server, tmp_path: Path) -> None:
    server.page("/f", DATA)
    with pytest.raises(DataError, match="its checksum is wrong"):
        get(server, tmp_path, checksum=sha256(OTHER))
    assert list(tmp_path.iterdir()) == []


def test_the_second_mirror_serves_when_the_first_has_another_file(server: Server, tmp_path: Path) -> None:
    server.page("/bad", OTHER)
    server.page("/f", DATA)
    addresses = (f"{server.url}/bad", f"{server.url}/f")
    assert get(server, tmp_path, addresses=addresses, checksum=sha256(DATA)) == DATA


def test_the_second_mirror_goes_on_where_the_first_broke(server: Server, tmp_path: Path) -> None:
    server.page("/f", DATA, 100_000, *[(503, {})] * 9)
    server.page("/mirror", DATA, etag='"of another kind"')
    addresses = (f"{server.url}/f", f"{server.url}/mirror")
    assert get(server, tmp_path, addresses=addresses, size=len(DATA), checksum=sha256(DATA)) == DATA
    assert server.asked[-1].range == "bytes=100000-" and server.asked[-1].sent == 200_000


def test_without_a_checksum_the_second_mirror_begins_anew(server: Server, tmp_path: Path) -> None:
    server.page("/f", DATA, 100_000, *[(503, {})] * 9)
    server.page("/mirror", OTHER)
    assert get(server, tmp_path, addresses=(f"{server.url}/f", f"{server.url}/mirror")) == OTHER


def test_a_dead_mirror_does_not_cost_the_part(server: Server, tmp_path: Path) -> None:
    server.page("/f", DATA)
    part(tmp_path, DATA[:250_000], address=f"{server.url}/f", etag='"v1"', size=len(DATA))
    assert get(server, tmp_path, addresses=(f"{server.url}/gone", f"{server.url}/f")) == DATA
    assert server.asked[-1].sent == 50_000


def test_a_missing_file_is_looked_for_elsewhere_and_then_told(server: Server, tmp_path: Path) -> None:
    server.page("/f", DATA)
    assert get(server, tmp_path, addresses=(f"{server.url}/gone", f"{server.url}/f")) == DATA
    with pytest.raises(DataError, match=r"g could not be downloaded \(127.0.0.1:\d+: it has no such file \(404\)"):
        download(Wanted("g", (f"{server.url}/gone",)), tmp_path, web())
    assert len(server.asked) == 3  # a 404 is not tried again


def test_a_host_out_of_reach_is_asked_once_and_then_last(server: Server, tmp_path: Path) -> None:
    server.page("/f", DATA)
    dead, asking = "http://127.0.0.1:9/f", web()
    assert get(server, tmp_path, asking, addresses=(dead, f"{server.url}/f")) == DATA
    assert waits(asking) == [] and asking.unreachable == {"127.0.0.1:9"}
    with pytest.raises(DataError, match=r"127\.0\.0\.1:9: no connection"):
        download(Wanted("g", (dead,)), tmp_path, asking)
    assert len(waits(asking)) == 3  # the only address is waited for


# --- patience --------------------------------------------------------------------------------------------------------


def test_servers_in_trouble_are_asked_again_after_waits_that_double(server: Server, tmp_path: Path) -> None:
    server.page("/f", DATA, (500, {}), (503, {}), (502, {}))
    asking = web(backoff=4)
    assert get(server, tmp_path, asking) == DATA
    assert [low <= w <= 2 * low for w, low in zip(waits(asking), (2, 4, 8), strict=True)] == [True] * 3


def test_too_many_requests_waits_as_long_as_it_is_asked_to(server: Server, tmp_path: Path) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=300), usegmt=True)
    server.page("/f", DATA, (429, {"Retry-After": "17"}), (429, {"Retry-After": date}), (429, {"Retry-After": "soon"}))
    asking = web(backoff=0.001)
    assert get(server, tmp_path, asking) == DATA
    first, second, third = waits(asking)
    assert first == 17 and 200 < second <= 300 and third < 1


def test_a_server_that_asks_for_too_much_patience_is_left(server: Server, tmp_path: Path) -> None:
    server.page("/f", DATA, (429, {"Retry-After": "86400"}))
    server.page("/mirror", DATA)
    assert get(server, tmp_path, addresses=(f"{server.url}/f", f"{server.url}/mirror")) == DATA
    server.page("/f", DATA, (429, {"Retry-After": "86400"}))
    (tmp_path / "f").unlink()
    with pytest.raises(DataError, match="it asks to come back in 86400 seconds"):
        get(server, tmp_path)


def test_trouble_that_stays_is_told(server: Server, tmp_path: Path) -> None:
    server.page("/f", DATA, *[(503, {})] * 99)
    with pytest.raises(DataError, match=r"it answers 503 Service Unavailable, 4 times\); try later"):
        get(server, tmp_path)
    assert len(server.asked) == 4


def test_the_wish_to_stop_is_heard_in_a_wait_and_in_a_body(server: Server, tmp_path: Path) -> None:
    server.page("/f", DATA, (503, {}))
    asking = web(backoff=1000)
    asking.stop = threading.Event()
    threading.Timer(0.2, asking.stop.set).start()
    with pytest.raises(Stopped):
        get(server, tmp_path, asking)
    page = server.page("/f", DATA, "hang")
    asking = web()

    def moved(change: int) -> None:
        asking.stop.set()
        page.go_on.set()

    with pytest.raises(Stopped):
        download(Wanted("f", (f"{server.url}/f",)), tmp_path, asking, moved)
    assert (tmp_path / "f.part").read_bytes() == DATA[: (tmp_path / "f.part").stat().st_size] != b""


# --- hostile ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/f", "FILE:/etc/passwd", "data:,x"])
def test_redirects_lead_to_the_web_only(server: Server, tmp_path: Path, target: str) -> None:
    server.page("/f", DATA, (302, {"Location": target}))
    with pytest.raises(DataError, match=f"it redirects to {target.partition(':')[0].lower()}:, which is not followed"):
        get(server, tmp_path)
    assert len(server.asked) == 1


def test_redirects_in_a_circle_end(server: Server, tmp_path: Path) -> None:
    server.page("/f", b"", *[(302, {"Location": "/f"})] * 50)
    with pytest.raises(DataError, match="redirects"):
        get(server, tmp_path)
    assert len(server.asked) == 11


def test_an_address_that_is_none_of_the_webs(tmp_path: Path) -> None:
    for address in ("file:///etc/passwd", "ftp://127.0.0.1/x", "nonsense"):
        with pytest.raises(DataError, match="f could not be downloaded"):
            download(Wanted("f", (address,)), tmp_path, web())


@pytest.mark.parametrize("code", [401, 403])
def test_a_gated_file_says_how_to_get_a_token(server: Server, tmp_path: Path, code: int) -> None:
    server.page("/f", DATA, *[(code, {})] * 9)
    with pytest.raises(Gated, match=rf"answers {code}: the set is gated .* make a token .* export HF_TOKEN=hf_"):
        get(server, tmp_path)
    assert len(server.asked) == 1
    server.page("/open", DATA)
    assert get(server, tmp_path, addresses=(f"{server.url}/f", f"{server.url}/open")) == DATA


def test_the_token_goes_to_its_host_only_and_not_along_a_redirect(server: Server, tmp_path: Path) -> None:
    server.page("/f", DATA)
    with serving() as other:
        other.page("/f", b"", (302, {"Location": f"{server.url}/f"}))
        asking = web()
        asking.tokens[other.url.removeprefix("http://")] = "hf_secret"
        assert get(server, tmp_path, asking, addresses=(f"{other.url}/f",)) == DATA
        assert other.asked[0].headers["authorization"] == "Bearer hf_secret"
    assert "authorization" not in server.asked[0].headers


@pytest.mark.parametrize(
    "path",
    ["../x", "a/../../x", "/etc/passwd", "", ".", "..", "a\\..\\x", "C:\\x", "c:x", "a\nb", "a\0b", "x.part"],
)
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(DataError, match="cannot be written safely"):
        download(Wanted(path, ("http://127.0.0.1:9/f",)), tmp_path, web())
    assert list(tmp_path.parent.glob("x*")) == []


@given(st.text())
def test_a_path_that_is_let_through_stays_inside(path: str) -> None:
    try:
        checked = checked_path(path)
    except DataError:
        return
    assert Path("/a/b").joinpath(checked).is_relative_to("/a/b") and ".." not in checked.parts


# --- this machine ----------------------------------------------------------------------------------------------------


def test_a_full_disk_is_noticed_before(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.page("/f", DATA)
    monkeypatch.setattr(module, "free_space", lambda folder: module.ROOM + len(DATA) - 1)
    with pytest.raises(ResourceError, match=r"GB free, f needs 0\.00 GB; free some space or choose another folder"):
        get(server, tmp_path)
    assert not (tmp_path / "f.part").exists()
    monkeypatch.setattr(module, "free_space", lambda folder: module.ROOM + len(DATA))
    assert get(server, tmp_path) == DATA


def test_a_disk_that_fills_up_keeps_the_part(server: Server, tmp_path: Path) -> None:
    server.page("/f", DATA)

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.os, "fsync", full)
        patch.setattr(module, "_write_state", lambda *_: None)
        with pytest.raises(ResourceError, match=r"the disk is full while downloading .*; free some space and run the"):
            get(server, tmp_path)
    assert (tmp_path / "f.part").stat().st_size == len(DATA)
    assert get(server, tmp_path) == DATA


def test_a_proxy_is_used(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.page("/f", DATA)  # the server is the proxy: it is asked for the whole address
    address = "http://hub.invalid/f"
    assert get(server, tmp_path, web(proxy=server.url), addresses=(address,)) == DATA
    assert server.asked[-1].path == address
    (tmp_path / "f").unlink()
    monkeypatch.setenv("HTTP_PROXY", server.url)
    assert get(server, tmp_path, addresses=(address,)) == DATA
    with pytest.raises(ConfigError, match="the proxy nonsense cannot be used"):
        web(proxy="nonsense")


def test_a_folder_that_cannot_be_written(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="while downloading"):
        download(Wanted("f", (f"{server.url}/f",)), tmp_path / "file" / "below", web())
