"""S3 through obstore: requests in, the project's errors out.

obstore's own errors quote the store's answer, in which parts of the credentials may be. So of an answer only its status
and its error code are passed on, and the original error is not chained.

Creating is not repeated blindly. If the answer to a create gets lost, the object may be there, and the next try is told
that it exists: then its bytes decide whether it is the one that was to be created.
"""

import contextlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import S3Store

from geni_violin.core.errors import AlreadyExists, GeniViolinError, MachineFault, NoSpace, NotFound, PeerFault

if TYPE_CHECKING:
    from obstore.store import ClientConfig, S3Credential

TRIES = 4
"""How often a request is made before the store counts as silent; with growing pauses, the first of 0.2 s."""
_FIRST_PAUSE_S = 0.2
_STATUS = re.compile(r"status code: (\d{3})\b")
_CODE = re.compile(r"<Code>(\w{1,64})</Code>")
_FULL = {"QuotaExceeded", "EntityTooLarge", "InsufficientStorage", "InsufficientCapacity", "XMinioStorageFull"}
_HINTS = {
    "403": "the store refuses these credentials for this bucket",
    "401": "the store refuses these credentials for this bucket",
    "404": "expected a bucket that exists",
}


@dataclass(frozen=True)
class Credential:
    """What signs requests. No part of it is ever shown."""

    key_id: str = field(repr=False)
    secret: str = field(repr=False)
    token: str | None = field(repr=False)


class Unanswered(PeerFault):
    """A request came to nothing, or its answer got lost: it may work in a moment, and may have worked already."""


class S3Objects:
    """Objects of a bucket whose names begin with a prefix. Names are not checked here.

    :param where: what people call it, for messages.
    :param endpoint: ``http://…`` or ``https://…``; the first sends unencrypted.
    :param prefix: without slashes around it; may be empty.
    """

    def __init__(self, where: str, endpoint: str, region: str, bucket: str, prefix: str, credential: Credential):
        self.where = where
        client: ClientConfig = {"allow_http": endpoint.startswith("http:"), "connect_timeout": "5s", "timeout": "300s"}
        signing: S3Credential = {
            "access_key_id": credential.key_id,
            "secret_access_key": credential.secret,
            "token": credential.token,
            "expires_at": None,
        }
        self._once, self._patient = (
            S3Store(
                bucket,
                prefix=prefix or None,
                endpoint=endpoint,
                region=region,
                credential_provider=lambda: signing,
                client_options=client,
                retry_config={
                    "max_retries": retries,
                    "retry_timeout": timedelta(seconds=60),
                    "backoff": {"init_backoff": timedelta(seconds=_FIRST_PAUSE_S)},
                },
            )
            for retries in (0, TRIES - 1)
        )

    def create(self, name: str, data: bytes | memoryview | Path) -> None:
        """Create an object.

        :raise AlreadyExists: there is one of that name.
        """
        for attempt in range(TRIES):
            try:
                with self._faults(f"object {name} cannot be written"):
                    obstore.put(self._once, name, data, mode="create", use_multipart=False)
                return
            except AlreadyExists:
                if attempt and self._holds(name, data):
                    return
                raise
            except Unanswered:
                if attempt == TRIES - 1:
                    raise
                time.sleep(_FIRST_PAUSE_S * 2**attempt)

    def _holds(self, name: str, data: bytes | memoryview | Path) -> bool:
        return self.get(name) == (data.read_bytes() if isinstance(data, Path) else bytes(data))

    def overwrite(self, name: str, data: bytes) -> None:
        """Create or overwrite an object."""
        with self._faults(f"object {name} cannot be written"):
            obstore.put(self._patient, name, data, mode="overwrite", use_multipart=False)

    def get(self, name: str) -> bytes:
        """All bytes of an object.

        :raise NotFound: there is none.
        """
        with self._faults(f"object {name} cannot be read"):
            return bytes(obstore.get(self._patient, name).bytes())

    def get_range(self, name: str, start: int, length: int) -> bytes:
        """Up to ``length`` bytes (at least one) from ``start`` on, fewer where the object ends.

        :raise NotFound: there is no such object.
        :raise MachineFault: it has no byte at ``start``.
        """
        with self._faults(f"object {name} cannot be read"):
            return bytes(obstore.get_range(self._patient, name, start=start, length=length))

    def size(self, name: str) -> int:
        """An object's size in bytes.

        :raise NotFound: there is none.
        """
        with self._faults(f"object {name} cannot be found"):
            return obstore.head(self._patient, name)["size"]

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Names and sizes in bytes of the objects below a prefix (empty, or ending in a slash), unordered."""
        with self._faults("the objects cannot be listed"):
            for portion in obstore.list(self._patient, prefix=prefix or None):
                yield from ((found["path"], found["size"]) for found in portion)

    def delete(self, name: str) -> None:
        """Have an object be gone; it is fine if there is none."""
        with contextlib.suppress(NotFound), self._faults(f"object {name} cannot be deleted"):
            obstore.delete(self._patient, name)

    @contextlib.contextmanager
    def _faults(self, what_failed: str) -> Iterator[None]:
        try:
            yield
        except AlreadyExistsError:
            raise AlreadyExists(f"{what_failed}: it exists already in {self.where}") from None
        except FileNotFoundError as error:  # obstore's word for 404
            code = _found(_CODE, str(error))
            if code == "NoSuchBucket":
                raise self._fault(what_failed, "404", code) from None
            raise NotFound(f"{what_failed}: there is none in {self.where}") from None
        except BaseError as error:
            raise self._fault(what_failed, _found(_STATUS, str(error)), _found(_CODE, str(error))) from None

    def _fault(self, what_failed: str, status: str, code: str) -> GeniViolinError:
        if not status:
            return Unanswered(f"{what_failed}: {self.where} does not answer", "see whether the object store runs")
        words = f"{what_failed}: {self.where} answered HTTP {status}" + (f" ({code})" if code else "")
        if status == "507" or code in _FULL:
            return NoSpace(words, "delete snapshots that are no longer needed, or give the bucket more room")
        if status == "416":
            return MachineFault(words, "the object is shorter than it should be")
        kind = Unanswered if status.startswith("5") else PeerFault
        return kind(words, _HINTS.get(status, "see the object store's log"))


def _found(pattern: re.Pattern[str], text: str) -> str:
    match = pattern.search(text)
    return match[1] if match else ""
