"""The VMs' part of a transaction: its commands to the host agents, carried out.

A VM is armed and cut with one and the same request, so that the cut joins what was armed; from then on the agent and
the snapshot server are asked side by side how far its image is. What undoes a cut is asked for until it is done, or for
as long as an agent takes to do it by itself.
"""

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable

import structlog

from geni_violin.coordinator.ongoing import Ongoing
from geni_violin.coordinator.patience import both, for_a_while
from geni_violin.coordinator.peers import HostAgent, Peers
from geni_violin.core.errors import Conflict, NotFound
from geni_violin.core.messages import CutProgress, CutRequest, EdgeReport, PrepareCut, SettleRequest
from geni_violin.core.transaction import Phase
from geni_violin.core.transaction_events import (
    ArmVm,
    CancelVm,
    CutVm,
    ImageStored,
    PrepareVm,
    SettleVm,
    VmArmed,
    VmCut,
    VmPrepared,
    VmReleased,
    VmSettled,
    VmStreamed,
)

CANCEL_PATIENCE_MS = 25_000.0
"""How long an agent may take to answer a cancellation: it waits for its hypervisor meanwhile."""
FOLLOW_AFTER_S = 0.1
"""How long after its cut a VM's image is first asked about: others of the slice may be in their cuts, and go first."""
SETTLE_PATIENCE_MS = 60_000.0
"""How long an agent may take to bring what an edge recorded to the snapshot server."""

log = structlog.get_logger()


class VmPart:
    """See the module's theory of operation."""

    def __init__(self, ongoing: Ongoing, peers: Peers) -> None:
        self._ongoing = ongoing
        self._peers = peers
        self._slice = ongoing.record.slice.name
        self._transaction = ongoing.record.id

    def _agent(self, vm: str) -> HostAgent:
        return self._peers.agent(self._ongoing.record.slice.vm(vm).host)

    async def prepare(self, command: PrepareVm) -> None:
        """Ask for the promise; where the network takes no part, no frame is held either."""
        options = self._ongoing.state.options
        network = options.network if options.colored else "drop"
        request = PrepareCut(self._transaction, options.strategy, network)
        promise = await self._agent(command.vm).prepare_cut(self._slice, command.vm, request)
        self._ongoing.post(VmPrepared(promise))

    def _cut_request(self, vm: str, epoch: int, strategy: str, network: str) -> CutRequest:
        """What a VM is armed and cut with.

        :raise Conflict: an earlier coordinator staged the images.
        :raise NotFound: the slice is gone.
        """
        staged, record, options = self._ongoing.staged, self._ongoing.slice_record, self._ongoing.state.options
        if staged is None:
            raise Conflict("the images were staged by an earlier coordinator", "take the snapshot again")
        if record is None:
            raise NotFound(f"the slice {self._slice!r} is gone")
        return CutRequest(
            transaction=self._transaction,
            epoch=epoch,
            strategy=strategy,
            coordination=options.coordination,
            network=network,
            vlan_id=record.network.vlan_id,
            cut_deadline_ms=options.cut_deadline_ms,
            stream_deadline_ms=options.stream_deadline_ms,
            ingest_host=staged.ingest_host,
            ingest_port=staged.ingest_port,
            token=staged.tokens[vm],
            delay_ms=options.delays_ms.get(vm, 0.0),
            second_trigger=self._ongoing.record.request.second_trigger,
        )

    async def arm(self, command: ArmVm) -> None:
        """Have a VM's edge keep every frame of the new color."""
        vm = command.vm
        request = self._cut_request(vm, command.epoch, command.strategy, "hold")
        timeout_s = self._ongoing.state.options.prepare_deadline_ms / 1000.0
        progress = await self._agent(vm).arm(self._slice, vm, request, timeout_s)
        if progress.failure:
            raise Conflict(progress.failure)
        self._ongoing.post(VmArmed(vm))

    async def cut(self, command: CutVm) -> None:
        """Cut a VM and follow its image until it is durable."""
        vm, options = command.vm, self._ongoing.state.options
        request = self._cut_request(vm, command.epoch, command.strategy, command.network)
        timeout_s = (command.delay_ms + 2 * options.stream_deadline_ms) / 1000.0
        progress = await self._agent(vm).cut(self._slice, vm, request, timeout_s)
        self._on_progress(vm, progress)
        await asyncio.sleep(FOLLOW_AFTER_S)
        await both(self._follow_cut(vm, progress), self._follow_image(vm))

    async def _follow_cut(self, vm: str, progress: CutProgress) -> None:
        while progress.streamed is None:
            progress = await self._agent(vm).cut_progress(self._slice, vm, self._transaction)
            self._on_progress(vm, progress)

    def _on_progress(self, vm: str, progress: CutProgress) -> None:
        """Post what is new.

        :raise Conflict: the cut failed.
        """
        state = self._ongoing.state
        if progress.failure:
            raise Conflict(progress.failure)
        if progress.cut is not None and vm not in state.cuts:
            self._ongoing.post(VmCut(progress.cut))
        if progress.streamed is not None and vm not in state.streams:
            self._ongoing.post(VmStreamed(progress.streamed))

    async def _follow_image(self, vm: str) -> None:
        """Ask the snapshot server until it has the image.

        :raise Conflict: it could not take it; in the agent's words, if that knows why.
        """
        while True:
            status = await self._peers.snapshot_server.image(self._transaction, vm)
            self._ongoing.received_bytes[vm] = status.received_bytes
            await self._ongoing.has_changed()
            if status.state == "durable":
                self._ongoing.post(ImageStored(status))
                return
            if status.state == "failed":
                self._on_progress(vm, await self._agent(vm).cut_progress(self._slice, vm, self._transaction))
                raise Conflict(f"the snapshot server lost the image: {status.reason}")

    async def settle(self, command: SettleVm) -> None:
        """Have a VM's edge step aside, and its record brought to the snapshot server if it is wanted."""
        vm, patience_ms = command.vm, self._ongoing.state.options.cut_deadline_ms
        request = SettleRequest(self._peers.snapshot_server.peer.base_url, command.keep)
        agent, timeout_s = self._agent(vm), SETTLE_PATIENCE_MS / 1000.0

        async def attempt() -> EdgeReport:
            return await agent.settle(self._slice, vm, self._transaction, request, timeout_s)

        if command.keep:
            in_time = functools.partial(self._is_in, Phase.STREAMING)
            self._ongoing.post(VmSettled(vm, await for_a_while("settle", attempt, patience_ms, in_time)))
            return

        async def undo() -> None:
            with contextlib.suppress(Conflict, NotFound):  # a VM that is dead or gone has no edge any more
                await attempt()

        await self._undo("settle", vm, undo)
        self._ongoing.post(VmSettled(vm, None))

    def _is_in(self, phase: Phase) -> bool:
        return self._ongoing.state.phase is phase

    async def cancel(self, command: CancelVm) -> None:
        """Have a VM's cut undone."""
        vm, timeout_s = command.vm, CANCEL_PATIENCE_MS / 1000.0
        await self._undo(
            "cancel", vm, lambda: self._agent(vm).cancel_cut(self._slice, vm, self._transaction, timeout_s)
        )
        self._ongoing.post(VmReleased(vm))

    async def _undo(self, what: str, vm: str, attempt: Callable[[], Awaitable[None]]) -> None:
        """Ask until it is done. An agent that is out of reach for the cut deadline has let its VM go by then."""
        patience_ms = self._ongoing.state.options.cut_deadline_ms
        try:
            await for_a_while(what, attempt, patience_ms, again_on=(Exception,))
        except Exception as error:
            log.warning("given up", what=what, slice=self._slice, vm=vm, reason=str(error))
