"""The command line's side of the coordinator's REST interface (docs/protocol.md), blocking.

``runtime.http`` has the parts' own client; this one is without asyncio and without the web server's imports, because a
command line must start quickly. Errors come back as the classes that the coordinator raised.
"""

import itertools
import json
import time
from collections.abc import Iterator
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote, urlencode

import httpx
from pydantic import ValidationError

from geni_violin.core.errors import InvalidInput, PeerFault
from geni_violin.core.messages import ChannelSummary, SliceView, SnapshotView, TransactionView
from geni_violin.core.transaction import FINAL
from geni_violin.runtime.problems import error_from_problem
from geni_violin.runtime.processes import Ledger, is_alive
from geni_violin.runtime.settings import Settings
from geni_violin.runtime.wire import decode

T = TypeVar("T")
SLOW_S = 900.0
"""How long creating, deleting and restoring a slice may take: the parts have deadlines of their own."""
POLL_S = 0.3
PIECE_BYTES = 1 << 20


def load_settings(**overrides: Any) -> Settings:
    """The settings from the environment.

    :raise InvalidInput: a variable has a value that does not fit.
    """
    try:
        return Settings(**overrides)
    except ValidationError as error:
        first = error.errors()[0]
        name = "GENI_VIOLIN_" + "_".join(str(part) for part in first["loc"]).upper()
        raise InvalidInput(f"the environment variable {name} is {first['input']!r}", first["msg"]) from error


def services_ledger(settings: Settings) -> Ledger:
    """The parts of this installation that run on this machine."""
    return Ledger(settings.run_dir / "services")


def find_coordinator(settings: Settings) -> str:
    """The coordinator's address: GENI_VIOLIN_COORDINATOR_URL, else that of the one that runs here.

    :raise PeerFault: none runs here.
    """
    if settings.coordinator_url:
        return settings.coordinator_url
    record = services_ledger(settings).get("coordinator")
    if record is None or not record.address or not is_alive(record):
        raise PeerFault("no coordinator runs here", "start it with geni-violin up TOPOLOGY")
    return record.address


def path(*parts: str, **query: str) -> str:
    """A path below /v1 of quoted parts, with the query's parameters that are not empty."""
    given = {key: value for key, value in query.items() if value}
    return "/v1/" + "/".join(quote(part, safe="") for part in parts) + (f"?{urlencode(given)}" if given else "")


class Coordinator:
    """The coordinator at ``url``. Every method raises what the coordinator raised, or PeerFault."""

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self._http = httpx.Client(base_url=url, timeout=30.0, trust_env=False)
        except (httpx.InvalidURL, ValueError) as error:
            raise InvalidInput(f"{url!r} is not an address", "expected http://HOST:PORT") from error

    def request(self, method: str, url_path: str, body: Any = None, timeout_s: float = 30.0) -> Any:
        """Send a request and give back the decoded JSON answer (None for an empty one)."""
        return _answer(self._exchange(method, url_path, timeout_s, json=body))

    def download(self, url_path: str) -> bytes:
        """Get what is not JSON."""
        response = self._exchange("GET", url_path, SLOW_S)
        if not response.is_success:
            _answer(response)
        return response.content

    def download_pieces(self, url_path: str) -> Iterator[bytes]:
        """Get what is too large for memory, piece by piece. It is on its way when this returns."""
        pieces = self._pieces(url_path)
        first = next(pieces, b"")
        return itertools.chain([first], pieces)

    def _pieces(self, url_path: str) -> Iterator[bytes]:
        try:
            with self._http.stream("GET", url_path, timeout=SLOW_S) as response:
                if not response.is_success:
                    response.read()
                    _answer(response)
                yield from response.iter_raw()
        except httpx.RemoteProtocolError as error:
            hint = "geni-violin snapshot verify tells whether it is damaged; see the snapshot server's log"
            raise PeerFault("the coordinator's answer broke off", hint) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._silent(error) from error

    def upload(self, url_path: str, file: BinaryIO, length: int) -> Any:
        """Send a file of ``length`` bytes, and give back the decoded JSON answer."""
        pieces = iter(lambda: file.read(PIECE_BYTES), b"")
        return _answer(
            self._exchange("POST", url_path, SLOW_S, content=pieces, headers={"Content-Length": str(length)})
        )

    def _exchange(self, method: str, url_path: str, timeout_s: float, **content: Any) -> httpx.Response:
        try:
            return self._http.request(method, url_path, timeout=timeout_s, **content)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._silent(error) from error

    def _silent(self, error: Exception) -> PeerFault:
        reason = str(error) or type(error).__name__
        return PeerFault(f"the coordinator at {self.url} does not answer: {reason}", "see geni-violin status")

    def slice(self, name: str) -> SliceView:
        """One slice."""
        return understood(SliceView, self.request("GET", path("slices", name)))

    def slices(self) -> list[SliceView]:
        """All slices."""
        return [understood(SliceView, item) for item in _list(self.request("GET", path("slices")))]

    def snapshots(self, slice_name: str = "") -> list[SnapshotView]:
        """The committed snapshots, of one slice or of all."""
        answer = self.request("GET", path("snapshots", slice=slice_name))
        return [understood(SnapshotView, item) for item in _list(answer)]

    def channels(self, snapshot: str) -> list[ChannelSummary]:
        """What was in transit to each VM at a snapshot's cut; none if that was not recorded."""
        answer = self.request("GET", path("snapshots", snapshot, "channels"))
        return [understood(ChannelSummary, item) for item in _list(answer)]

    def console(self, slice_name: str, vm: str, offset: int) -> tuple[str, int]:
        """A VM's console from ``offset`` on, and the offset to go on from."""
        answer = self.request("GET", path("slices", slice_name, "vms", vm, "console", offset=str(offset)))
        try:
            return str(answer["text"]), int(answer["next_offset"])
        except (TypeError, KeyError, ValueError) as error:
            raise PeerFault("the coordinator answered something that is no console text") from error

    def transaction(self, transaction_id: str) -> TransactionView:
        """A snapshot transaction as it is now."""
        return understood(TransactionView, self.request("GET", path("transactions", transaction_id)))

    def follow(self, transaction_id: str) -> Iterator[TransactionView]:
        """A transaction as it goes on, up to its end: pushed by the coordinator, or polled where that breaks off."""
        last: TransactionView | None = None
        try:
            for last in self._events(transaction_id):
                yield last
        except (httpx.HTTPError, json.JSONDecodeError):
            pass  # ask instead
        while last is None or last.state not in FINAL:
            last = self.transaction(transaction_id)
            yield last
            if last.state not in FINAL:
                time.sleep(POLL_S)

    def _events(self, transaction_id: str) -> Iterator[TransactionView]:
        """Server-sent events; of each only its data is of interest."""
        url_path = path("transactions", transaction_id, "events")
        with self._http.stream("GET", url_path, timeout=httpx.Timeout(30.0, read=60.0)) as response:
            if not response.is_success:
                return
            for line in response.iter_lines():
                if line.startswith("data:"):
                    yield understood(TransactionView, json.loads(line.removeprefix("data:")))

    def close(self) -> None:
        """Close all connections."""
        self._http.close()


def _answer(response: httpx.Response) -> Any:
    try:
        data = response.json() if response.content else None
    except ValueError as error:
        raise PeerFault(f"the coordinator answered HTTP {response.status_code} with a body that is not JSON") from error
    if response.is_success:
        return data
    raise error_from_problem(data if isinstance(data, dict) else {}, response.status_code)


def understood(cls: type[T], data: Any) -> T:
    """An answer of the coordinator as ``cls``.

    :raise PeerFault: it is something else; then it is not the client's input that is invalid.
    """
    try:
        return decode(cls, data)
    except InvalidInput as error:
        raise PeerFault(f"the coordinator answered something else than a {cls.__name__}: {error.message}") from error


def _list(data: Any) -> list[Any]:
    if not isinstance(data, list):
        raise PeerFault("the coordinator answered something that is no list")
    return data


def connect() -> Coordinator:
    """The coordinator that the environment and this machine's ledger name."""
    return Coordinator(find_coordinator(load_settings()))
