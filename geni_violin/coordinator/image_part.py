"""The images' part of a transaction: its commands to the snapshot server, carried out.

Publishing and discarding must not give up: both are idempotent, and are asked for until their outcome is known.
"""

import asyncio

from geni_violin.coordinator.ongoing import Ongoing
from geni_violin.coordinator.patience import CERTAIN, for_a_while, until_known
from geni_violin.coordinator.peers import SnapshotServer
from geni_violin.coordinator.views import manifest_of
from geni_violin.core.messages import ExpectedImage, SealChannels, StageRequest
from geni_violin.core.transaction import Phase
from geni_violin.core.transaction_events import (
    ChannelsSealed,
    ImagesDiscarded,
    ImagesStaged,
    ManifestPublished,
    StageImages,
)

IMAGE_SLACK_BYTES = 64 * 1024 * 1024
"""How much an image may have beyond the VM's memory: device state and page headers."""
PRECOPY_FACTOR = 4
"""How often precopy may send the memory, because it sends pages again that were written meanwhile."""


class ImagePart:
    """See the module's theory of operation."""

    def __init__(self, ongoing: Ongoing, server: SnapshotServer) -> None:
        self._ongoing = ongoing
        self._server = server
        self._staging = asyncio.Lock()

    async def stage(self, command: StageImages) -> None:
        """Have room made for every image."""
        record, state = self._ongoing.record, self._ongoing.state
        factors = {vm: PRECOPY_FACTOR if p.strategy == "precopy" else 1 for vm, p in state.promises.items()}
        images = tuple(
            ExpectedImage(vm, factors[vm] * size + IMAGE_SLACK_BYTES) for vm, size in command.memory_bytes.items()
        )
        timeout_s = 3 * state.options.prepare_deadline_ms / 1000.0
        async with self._staging:
            request = StageRequest(record.id, record.name, images, record.slice.name)
            self._ongoing.staged = await self._server.stage(request, timeout_s)
        self._ongoing.post(ImagesStaged())

    async def seal(self) -> None:
        """Have the channel state put together."""
        record, state = self._ongoing.record, self._ongoing.state
        request = SealChannels({vm.name: vm.mac for vm in record.slice.vms})
        summaries = await for_a_while(
            "seal",
            lambda: self._server.seal_channels(record.id, request),
            state.options.cut_deadline_ms,
            lambda: self._ongoing.state.phase is Phase.STREAMING,
        )
        self._ongoing.post(ChannelsSealed(tuple(summaries)))

    async def publish(self) -> None:
        """Commit."""
        manifest = manifest_of(self._ongoing.record)
        await until_known("publish", lambda: self._server.publish(manifest), give_up_on=CERTAIN)
        self._ongoing.post(ManifestPublished())

    async def discard(self) -> None:
        """Throw away whatever there is; a staging that is on its way comes to its end first, lest it come after."""

        async def attempt() -> None:
            async with self._staging:
                await self._server.discard(self._ongoing.record.id)

        await until_known("discard", attempt)
        self._ongoing.post(ImagesDiscarded())
