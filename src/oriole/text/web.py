"""Asking servers: with patience, through proxies, with a token for the one host it is meant for.

Faults that pass (timeouts, broken connections, 429, 5xx) are met with waits that double, spread at random, or last as
long as the server's `Retry-After` says. What waiting does not mend is `Elsewhere`.
"""

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Self, TypeVar, final
from urllib.parse import urljoin, urlsplit

import httpx
from pydantic import Field

from oriole.config import Config
from oriole.errors import ConfigError, DataError

__all__ = ["Again", "Elsewhere", "Gated", "NetConfig", "Stopped", "Web", "check_status", "host"]

T = TypeVar("T")

LONGEST_WAIT_S = 60.0
"""The longest wait between two tries that no server asked for."""

CONNECT_S = 10.0
"""Seconds until a server that does not even accept a connection counts as out of reach."""

PATIENCE_S = 600.0
"""A server that asks to wait longer than this is given up."""

PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524})
"""Answers after which the same question may be answered well a little later."""


class NetConfig(Config):
    """How to speak with servers."""

    proxy: str = ""
    """Address of a proxy, such as http://127.0.0.1:7890; empty: HTTPS_PROXY, HTTP_PROXY and NO_PROXY are followed."""
    timeout: float = Field(30.0, gt=0)
    """Seconds without a single byte after which a connection counts as broken."""
    retries: int = Field(6, ge=0)
    """Tries of one address that may fail one after another without a new byte."""
    backoff: float = Field(1.0, ge=0)
    """Seconds before the second try; doubled with each further one, to at most a minute."""


class Stopped(Exception):
    """Somebody asked all downloads to stop; what has arrived stays."""


class Gated(DataError):
    """A server wants to know who is asking."""


class Again(Exception):
    """A fault that may pass; `wait`: seconds that the server asked for."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class Elsewhere(Exception):
    """A fault of this address that waiting does not mend."""


@final
@dataclass
class Web:
    """What all downloads of one call share: connections, the wish to stop, and who is asking."""

    config: NetConfig
    tokens: dict[str, str] = field(default_factory=dict)
    """Host -> token that it, and nobody else, is shown."""
    stop: threading.Event = field(default_factory=threading.Event)
    unreachable: set[str] = field(default_factory=set)
    """Hosts that did not accept a connection: they are asked last."""

    def __post_init__(self) -> None:
        try:
            self.client = httpx.Client(
                proxy=self.config.proxy or None,
                timeout=httpx.Timeout(self.config.timeout, connect=min(CONNECT_S, self.config.timeout)),
                follow_redirects=True,
                max_redirects=10,
                headers={"User-Agent": "oriole-lm", "Accept-Encoding": "identity"},
                event_hooks={"response": [_check_redirect]},
            )
        except (ValueError, ImportError, httpx.InvalidURL) as error:
            proxy = self.config.proxy or "of the environment"
            raise ConfigError(f"the proxy {proxy} cannot be used: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def headers(self, address: str) -> dict[str, str]:
        """What a request to the address carries besides: a token, if its host is the one it is meant for."""
        token = self.tokens.get(host(address))
        return {"Authorization": f"Bearer {token}"} if token else {}

    def json(self, address: str, last: bool = True) -> tuple[Any, httpx.Response]:
        """The JSON that an address gives, and the response. `DataError` when it gives none, `Gated` when it refuses."""

        def ask() -> tuple[Any, httpx.Response]:
            response = self.client.get(address, headers=self.headers(address))
            check_status(response, address)
            try:
                return response.json(), response
            except ValueError as error:
                raise Elsewhere("its answer is not JSON") from error

        try:
            return self.patiently(ask, address, last)
        except Elsewhere as fault:
            raise DataError(f"{_shown(address)}: {fault}") from fault

    def patiently(
        self, ask: Callable[[], T], address: str, last: bool = True, progress: Callable[[], int] = lambda: 0
    ) -> T:
        """The result of `ask`, which speaks with `address`, tried again after faults that may pass.

        Tries are counted from the last one that made more `progress` than any before it. A host that is out of reach
        is not waited for when another address is left, that is, unless this is the `last` one. Raises `Elsewhere` when
        the fault does not pass, `Stopped` when the wish to stop comes.
        """
        tries, best = 0, progress()
        while True:
            if self.stop.is_set():
                raise Stopped
            try:
                return ask()
            except Again as fault:
                reason, wait = str(fault), fault.wait
            except httpx.UnsupportedProtocol as error:
                raise Elsewhere(f"not an http or https address ({error})") from error
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                self.unreachable.add(host(address))
                if not last:
                    raise Elsewhere(_network_fault(error, self.config)) from error
                reason, wait = _network_fault(error, self.config), 0.0
            except httpx.TransportError as error:
                reason, wait = _network_fault(error, self.config), 0.0
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise Elsewhere(str(error).lower() or type(error).__name__) from error
            tries, best = (0, progress()) if progress() > best else (tries, best)
            tries += 1
            if tries > self.config.retries:
                raise Elsewhere(f"{reason}, {tries} times")
            if wait > PATIENCE_S:
                raise Elsewhere(f"{reason}; it asks to come back in {wait:.0f} seconds")
            own = min(LONGEST_WAIT_S, self.config.backoff * 2 ** (tries - 1)) * random.uniform(0.5, 1.0)
            if self.stop.wait(max(wait, own)):
                raise Stopped


def _check_redirect(response: httpx.Response) -> None:
    """Refuse to be sent anywhere but to http and https, and from https to http."""
    if not response.has_redirect_location:
        return
    source = str(response.request.url)
    scheme = urlsplit(urljoin(source, response.headers["Location"])).scheme.lower()
    if scheme not in ("http", "https") or (source.startswith("https:") and scheme == "http"):
        raise Elsewhere(f"it redirects to {scheme}:, which is not followed")


def check_status(response: httpx.Response, address: str) -> None:
    """Raise what a bad answer means."""
    code = response.status_code
    if code in (200, 206):
        return
    if code in PASSING:
        raise Again(f"it answers {code} {response.reason_phrase}", _retry_after(response))
    if code in (401, 403):
        raise Gated(
            f"{_shown(address)} answers {code}: the set is gated (or gone); accept its terms on its page there, make a "
            "token at https://huggingface.co/settings/tokens and set it: export HF_TOKEN=hf_…"
        )
    if code in (404, 410):
        raise Elsewhere("it has no such file (404); the set was moved or renamed")
    raise Elsewhere(f"it answers {code} {response.reason_phrase}")


def _retry_after(response: httpx.Response) -> float:
    """Seconds that `Retry-After` asks for: a number or a date."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())


def _network_fault(error: httpx.TransportError, config: NetConfig) -> str:
    match error:
        case httpx.ConnectTimeout():
            return "no connection (no answer)"
        case httpx.TimeoutException():
            return f"no byte came for {config.timeout:g} seconds"
        case httpx.ProxyError():
            return f"the proxy refuses ({error})"
        case httpx.ConnectError():
            return f"no connection ({error})"
        case _:
            return f"the connection broke ({error})" if str(error) else "the connection broke"


def host(address: str) -> str:
    """`https://huggingface.co/datasets/…` -> `huggingface.co`, with the port where it is not the usual one."""
    return urlsplit(address).netloc.rpartition("@")[2].lower()


def _shown(address: str) -> str:
    """An address as it may be printed: without passwords and signatures."""
    parts = urlsplit(address)
    return f"{parts.scheme}://{host(address)}{parts.path}"
