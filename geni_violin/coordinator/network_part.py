"""The network's part of a transaction: its commands to the controller, carried out.

Theory of operation. Every request here may be repeated, so one that finds no controller is: for a while where that can
save the snapshot, for ever where an abort must come to its end. A controller that has forgotten the slice is told it
first, as it should be at that moment (:meth:`NetworkPart.network`); it keeps any newer color that it finds on the
switches.

*The old color's end* (Mattern's): frames that entered the network in the old color, less those that came to an end,
are alive. Nobody colors frames so any more, so once the difference is 0 it stays 0. The caches are purged before, lest
a switch go on by an old rule. Where the counters do not balance (a link lost frames, a switch is away), the maximum
frame lifetime stands in.
"""

import asyncio
import functools
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TypeVar

import structlog

from geni_violin.coordinator.ongoing import Ongoing
from geni_violin.coordinator.patience import for_a_while, until_known
from geni_violin.coordinator.peers import Controller, Peers
from geni_violin.core.color import color_of
from geni_violin.core.errors import GeniViolinError, NotFound
from geni_violin.core.messages import ArmRequest, DisarmRequest, RecolorRequest
from geni_violin.core.model import NetworkSlice
from geni_violin.core.transaction import FINAL, Phase, TransactionState
from geni_violin.core.transaction_events import (
    AdvanceNetwork,
    ArmNetwork,
    ColorRetired,
    DisarmNetwork,
    FramesCounted,
    NetworkAdvanced,
    NetworkArmed,
    NetworkDisarmed,
    NetworkPrepared,
    RetireColor,
)
from geni_violin.runtime.clock import monotonic_ms

PREPARE_SHARE = 3
"""The part of the prepare deadline that a controller or a switch that is not there yet is waited for."""
COUNT_PAUSE_S = 0.02
"""Between two looks at the counters of the old color."""

log = structlog.get_logger()
T = TypeVar("T")


class NetworkPart:
    """See the module's theory of operation.

    :param max_frame_lifetime_ms: how long a frame may be alive that no counter tells of.
    """

    def __init__(self, ongoing: Ongoing, peers: Peers, max_frame_lifetime_ms: float) -> None:
        self._ongoing = ongoing
        self._peers = peers
        self._max_frame_lifetime_ms = max_frame_lifetime_ms
        self._name = ongoing.record.slice.name
        self._armed = _armed_before(ongoing.state)
        """The VMs whose ports may be armed, kept here because the state is written down only after an answer: from
        before the request that arms them to before the one that disarms them."""

    @property
    def _controller(self) -> Controller:
        return self._peers.controller

    def network(self) -> NetworkSlice:
        """The slice as the controller should have it now, as far as is known: a port may be further.

        :raise NotFound: the slice is gone.
        """
        record, state = self._ongoing.slice_record, self._ongoing.state
        if record is None:
            raise NotFound(f"the slice {self._name!r} is gone")
        if not state.options.colored:
            return record.network_at(record.epoch)
        epoch = state.options.epoch
        done = {port.vm for port in record.network.ports} if state.network_advanced else state.cuts.keys()
        ports = (
            replace(
                port, epoch=epoch if port.vm in done else record.epoch, armed=epoch if port.vm in self._armed else 0
            )
            for port in record.network.ports
        )
        return replace(record.network, ports=tuple(ports))

    async def _tell(self, request: Callable[[], Awaitable[T]]) -> T:
        """Send one request; a controller that has forgotten the slice is told it before."""
        async with self._controller.gate.shared():
            try:
                return await request()
            except NotFound:
                await self._controller.put_slice(self.network())
                return await request()

    async def prepare(self) -> None:
        """Have the slice's rules installed as they should be. A controller that has just started is waited for."""

        async def attempt() -> None:
            async with self._controller.gate.shared():
                await self._controller.put_slice(self.network())

        patience_ms = self._ongoing.state.options.prepare_deadline_ms / PREPARE_SHARE
        await for_a_while("prepare", attempt, patience_ms, lambda: self._ongoing.state.phase is Phase.PREPARING)
        self._ongoing.post(NetworkPrepared(await self._frames_dropped()))

    async def _frames_dropped(self) -> int:
        return await self._tell(lambda: self._controller.frames_dropped(self._name))

    async def arm(self, command: ArmNetwork) -> None:
        """Arm the ports of the VMs whose edges are armed; the switches of the others answer a barrier."""
        state = self._ongoing.state
        others = tuple(vm for vm in state.options.vms if vm not in command.vms)

        async def attempt() -> None:
            if others:
                await self._tell(
                    lambda: self._controller.recolor(self._name, RecolorRequest(command.epoch - 1, others))
                )
            if command.vms:
                self._armed = frozenset(command.vms)
                await self._tell(lambda: self._controller.arm(self._name, ArmRequest(command.epoch, command.vms)))

        patience_ms = state.options.cut_deadline_ms
        await for_a_while("arm", attempt, patience_ms, functools.partial(self._is_in, Phase.ARMED))
        try:
            await self._purge_switches()
        except GeniViolinError as error:  # then a frame may be lost, and no more than that
            log.warning("switches may drop a first frame of the new color", slice=self._name, reason=str(error))
        self._ongoing.post(NetworkArmed())

    async def retire(self, command: RetireColor) -> None:
        """Wait for the end of the old color's last frame."""
        self._ongoing.post(ColorRetired(await self._retired(command.epoch)))

    async def _retired(self, epoch: int) -> bool:
        """Return when no frame of the color before ``epoch`` is alive: True if the counters said so."""
        end_ms = monotonic_ms() + self._max_frame_lifetime_ms
        while (left_ms := end_ms - monotonic_ms()) > 0:
            try:
                async with asyncio.timeout(left_ms / 1000.0):
                    if await self._alive(color_of(epoch - 1)) == 0:
                        return True
                    await asyncio.sleep(COUNT_PAUSE_S)
            except TimeoutError:
                break
            except GeniViolinError as error:
                log.debug("the counters cannot be had", slice=self._name, reason=str(error))
                await asyncio.sleep(COUNT_PAUSE_S)
        log.info("the old color is retired by the maximum frame lifetime", slice=self._name)
        return False

    async def _alive(self, color: int) -> int | None:
        """How many frames of a color are on their way; None if the controller does not tell."""
        await self._purge_switches()
        counters = await self._tell(lambda: self._controller.colors(self._name))
        return next((counter.alive for counter in counters if counter.color == color), None)

    async def _purge_switches(self) -> None:
        """Have every switch forget its cached flows: one of an earlier cut could still drop the color to come."""
        hosts = {switch.host for switch in self._ongoing.record.slice.switches}
        await asyncio.gather(*(self._peers.agent(host).purge_switches() for host in sorted(hosts)))

    async def disarm(self, command: DisarmNetwork) -> None:
        """Have all ports get frames without a tag again."""

        patience_ms = self._ongoing.state.options.cut_deadline_ms
        wanted = functools.partial(self._is_in, Phase.STREAMING)
        await for_a_while("disarm", lambda: self._disarm(command.epoch), patience_ms, wanted)
        self._ongoing.post(NetworkDisarmed())

    async def _disarm(self, epoch: int) -> None:
        self._armed = frozenset()
        await self._tell(lambda: self._controller.disarm(self._name, DisarmRequest(epoch)))

    def _is_in(self, phase: Phase) -> bool:
        return self._ongoing.state.phase is phase

    async def count(self) -> None:
        """Read the count of dropped frames; a snapshot does not fail for the want of it."""
        try:
            self._ongoing.post(FramesCounted(await self._frames_dropped()))
        except GeniViolinError as error:
            log.warning("dropped frames could not be counted", slice=self._name, reason=str(error))
            self._ongoing.post(FramesCounted(None))

    async def advance(self, command: AdvanceNetwork) -> None:
        """After an abort: one color everywhere and alive, and no port armed. A slice that is gone has none."""
        await until_known("advance", lambda: self._advance(command.epoch))
        self._ongoing.post(NetworkAdvanced())

    async def _advance(self, epoch: int) -> None:
        if self._ongoing.slice_record is None:
            return
        await self._tell(lambda: self._controller.recolor(self._name, RecolorRequest(epoch)))
        await self._retired(epoch)
        if self._ongoing.state.holding:
            await self._disarm(epoch)


def _armed_before(state: TransactionState) -> frozenset[str]:
    """The VMs whose ports an earlier coordinator may have armed."""
    asked = ArmNetwork.__name__ in state.asked
    over = state.disarmed or state.network_advanced or state.phase in (Phase.COMMITTING, *FINAL)
    return frozenset(state.holding) if asked and not over else frozenset()
