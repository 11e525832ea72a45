"""Which images are awaited, and how far each is. In memory only, used from the event loop only.

Each awaited image has a token, good for one connection. Its state only ever advances::

    waiting --claim--> receiving --complete--> durable
       └──────────────────┴───────fail───────> failed

A second try needs a second snapshot: the VM's cut belongs to one instant, so there is nothing to send again. Tokens do
not outlive the process; what is durable does, in the store.
"""

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

from geni_violin.core.errors import Conflict, NotFound
from geni_violin.core.messages import ImageStatus, StageRequest
from geni_violin.snapshot_server.store import StoredImage

WAITING, RECEIVING, DURABLE, FAILED = "waiting", "receiving", "durable", "failed"


@dataclass
class Reception:
    """One awaited image. ``received_bytes`` counts while it is being received."""

    snapshot_id: str
    vm: str
    expected_bytes: int
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    state: str = WAITING
    received_bytes: int = 0
    stored: StoredImage | None = None
    reason: str = ""
    settled: asyncio.Event = field(default_factory=asyncio.Event)

    def complete(self, stored: StoredImage) -> None:
        """The image is durable."""
        self.state, self.stored = DURABLE, stored
        self.settled.set()

    def fail(self, reason: str) -> None:
        """The image will not come; nothing of it is kept."""
        self.state, self.reason = FAILED, reason
        self.settled.set()

    def status(self) -> ImageStatus:
        """What the coordinator is told."""
        if self.stored is not None:
            return durable_status(self.stored)
        return ImageStatus(self.vm, self.state, self.received_bytes, reason=self.reason)


def durable_status(image: StoredImage) -> ImageStatus:
    """The status of an image that is in the store."""
    return ImageStatus(image.vm, DURABLE, image.received_bytes, image.stored_bytes, image.blake3, note=image.note)


class Desk:
    """All awaited images, by snapshot and by token."""

    def __init__(self) -> None:
        self._by_snapshot: dict[str, dict[str, Reception]] = {}
        self._by_token: dict[str, Reception] = {}

    def open(self, request: StageRequest, find_stored: Callable[[str], StoredImage | None]) -> dict[str, str]:
        """Await a snapshot's images; once more gives the same tokens.

        :param find_stored: what the store has of a VM, from before a restart.
        :returns: tokens by VM name.
        """
        if request.snapshot_id not in self._by_snapshot:
            receptions = [Reception(request.snapshot_id, image.vm, image.expected_bytes) for image in request.images]
            for reception in receptions:
                if (stored := find_stored(reception.vm)) is not None:
                    reception.complete(stored)
            self._by_snapshot[request.snapshot_id] = {reception.vm: reception for reception in receptions}
            self._by_token |= {reception.token: reception for reception in receptions}
        return {vm: reception.token for vm, reception in self._by_snapshot[request.snapshot_id].items()}

    def find(self, snapshot_id: str, vm: str) -> Reception | None:
        """The awaited image of that VM, if any."""
        return self._by_snapshot.get(snapshot_id, {}).get(vm)

    def claim(self, token: str) -> Reception:
        """A connection carries this token's image from now on.

        :raise NotFound: nothing is awaited under this token.
        :raise Conflict: a connection claimed it before.
        """
        reception = self._by_token.get(token)
        if reception is None:
            raise NotFound("no image is awaited under this token", "its snapshot may have been discarded")
        if reception.state != WAITING:
            raise Conflict(f"the image of VM {reception.vm} is {reception.state} already", "a token is good for once")
        reception.state = RECEIVING
        return reception

    def close(self, snapshot_id: str) -> None:
        """Await nothing more of this snapshot; who waits for one of its images is told so."""
        for reception in self._by_snapshot.pop(snapshot_id, {}).values():
            del self._by_token[reception.token]
            if not reception.settled.is_set():
                reception.fail("the snapshot was discarded")
