"""Tells a controller that has (re)started what slices there are.

The controller keeps nothing, and says by its ``instance`` that it is a new one. What it is told is put together from
the journal and from the transactions under way at one instant, while nobody else speaks to it: a slice in the middle of
a cut is told with the ports that are known to be cut in their new epoch, and armed if it was. A port may be further
than that; the controller keeps a newer color that it finds on its switch.
"""

import asyncio

import structlog

from geni_violin.coordinator.journal import Journal
from geni_violin.coordinator.peers import Peers
from geni_violin.coordinator.snapshots import Snapshots
from geni_violin.core.errors import GeniViolinError
from geni_violin.core.model import NetworkSlice

IDLE_PAUSE_S = 1.0
BUSY_PAUSE_S = 0.1
"""While a snapshot is under way: frames may be waiting for a recolor that the controller has forgotten how to do."""

log = structlog.get_logger()


class Reconciler:
    """See the module's theory of operation."""

    def __init__(self, journal: Journal, peers: Peers, snapshots: Snapshots) -> None:
        self._journal = journal
        self._peers = peers
        self._snapshots = snapshots
        self._told_instance = ""

    async def run(self) -> None:
        """Look after the controller for ever."""
        while True:
            try:
                await self._look()
            except GeniViolinError as error:
                log.warning("the controller could not be told the slices yet", reason=str(error))
            except Exception:
                log.exception("the controller could not be told the slices: a defect")
            await asyncio.sleep(BUSY_PAUSE_S if self._snapshots.any_under_way else IDLE_PAUSE_S)

    async def _look(self) -> None:
        controller = self._peers.controller
        instance = (await controller.health()).get("instance", "")
        if instance == self._told_instance:
            return
        async with controller.gate.alone():
            await controller.put_slices(self._networks())
        self._told_instance = instance

    def _networks(self) -> list[NetworkSlice]:
        """The slices that have ports, as they are now; one that is being made is installed by whoever makes it."""
        records = self._journal.slices()  # no awaiting from here on: a transaction could end in between
        return [self._snapshots.network(record) for record in records if record.network.ports]
