"""Random faults at random points, from a seed: what must hold holds whatever goes wrong (STYLE: seeded simulation).

A failure names its seed; ``pytest -k "seed-7"`` plays it again. Timing is the machine's, so a seed gives the same
faults and not always the same interleaving.
"""

import asyncio
import functools
import random
from collections.abc import Awaitable, Callable

import pytest
from coordinator_harness import VMS, World, under_a_policy, until
from fake_services import Faults, raises
from fake_vm import fails, takes

from geni_violin.core.errors import Conflict, MachineFault, NoSpace, PeerFault
from geni_violin.core.transaction import Phase

SEEDS = [("hold", seed) for seed in range(16)] + [("drop", seed) for seed in range(16, 24)]
Happening = Callable[[], Awaitable[None]]
VM_POINTS = ("hold", "start", "stopped", "middle", "pre-switchover", "end", "release", "pause", "resume", "continue")
EDGE_POINTS = ("arm", "return path")
REQUESTS = {
    "server": (
        "POST /v1/stagings",
        "GET .*/images/n[123]",
        "POST .*/publish",
        "DELETE .*",
        "PUT .*",
        "POST .*/channels",
    ),
    "controller": ("PUT .*", "POST .*/recolor", "GET .*/counters", "POST .*/(dis)?arm", "GET .*/colors"),
    "agent": (
        "POST .*/cut/prepare",
        "POST .*/cut",
        "GET .*/cut/.*",
        "DELETE .*/cut/.*",
        "POST .*/arm",
        "POST .*/settle",
        "POST .*/purge",
    ),
}
ERRORS = (Conflict("no"), MachineFault("cannot"), NoSpace("full"), PeerFault("somebody does not answer"))


class Chaos:
    """What goes wrong in one run."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.random = random.Random(seed)
        self.told: list[str] = []
        self._crashed = False
        self._restarting = asyncio.Lock()

    def arrange(self) -> None:
        """One to three faults."""
        for _ in range(self.random.choice((1, 1, 2, 3))):
            if self.random.random() < 0.5:
                self._arrange_in_vm()
            else:
                self._arrange_request()

    def _arrange_in_vm(self) -> None:
        qemu = self.world.qemu(self.random.choice(VMS))
        point = self.random.choice(VM_POINTS + EDGE_POINTS)
        what, trouble = self.random.choice(
            [
                ("fails", fails()),
                ("dies", qemu.die),
                ("is slow", takes(self.random.uniform(0.01, 0.2))),
                ("its agent vanishes", self._vanish(qemu.definition.host)),
                ("the coordinator crashes", self._crash),
            ]
        )
        self.told.append(f"{qemu.definition.name} at {point}: {what}")
        qemu.trouble(point, trouble)

    def _arrange_request(self) -> None:
        at = self.random.choice(list(REQUESTS))
        host = self.random.choice(("h1", "h2"))
        faults: Faults = {
            "server": self.world.server_faults,
            "controller": self.world.controller.app,
            "agent": self.world.agents[host].faults,
        }[at]
        what, happening = self.random.choice(
            [
                ("error", raises(self.random.choice(ERRORS))),
                ("slow", takes(self.random.uniform(0.01, 0.2))),
                ("controller restarts", self._forget),
                ("coordinator crashes", self._crash),
                ("agent vanishes", self._vanish(host)),
            ]
        )
        request, after = self.random.choice(REQUESTS[at]), self.random.random() < 0.5
        # Nothing that a commit says may be both done and denied for ever: one "no" that is a lie is not an error.
        if request.endswith("publish") and after and what == "error":
            happening = raises(PeerFault("the answer is lost"))
        self.told.append(f"{request} at {at} {host}, after={after}: {what}")
        faults.add(request, happening, after=after, times=self.random.choice((1, 1, 2)))

    def _vanish(self, host: str) -> Happening:
        return self.world.agents[host].service.vanish

    async def _forget(self) -> None:
        self.world.controller.forget()

    async def _crash(self) -> None:
        """The coordinator stops and another one starts, once; the request or migration goes on."""
        if not self._crashed:
            self._crashed = True
            async with self._restarting:
                await self.world.coordinator_service.stop()
                await self.world.start_coordinator()

    async def heal(self) -> None:
        """Everything that failed is back."""
        world = self.world
        for faults in (world.server_faults, world.controller.app, *(agent.faults for agent in world.agents.values())):
            faults.clear()
        for agent in world.agents.values():
            if not agent.service.reachable:
                await agent.service.come_back()
        for qemu in world.qemus():
            qemu.troubles.clear()
        self._crashed = True  # no crash begins any more
        async with self._restarting:
            pass


@pytest.mark.parametrize(
    ("policy", "seed"), SEEDS, ids=lambda value: f"seed-{value}" if isinstance(value, int) else value
)
@under_a_policy
async def test_whatever_goes_wrong(world: World, seed: int) -> None:
    chaos = Chaos(world, seed)
    chaos.arrange()
    world.shorten(prepare_ms=1000, cut_ms=700, stream_ms=1500)
    transaction = await _begin(world, chaos)
    if transaction is not None:
        # One that cannot end because something is away for good waits in "aborting".
        await until(functools.partial(_has_ended, world, transaction), f"the end, with {chaos.told}")
    await chaos.heal()
    if transaction is not None:
        view = await world.over(transaction)
        await world.assert_sound(view)
    if any(qemu.dead for qemu in world.qemus()):
        await world.recreate()
    view = await world.commits()
    assert view.snapshot.epoch >= 1, chaos.told


async def _begin(world: World, chaos: Chaos) -> str | None:
    """Ask for a snapshot; gives the transaction, if the coordinator took it on before it crashed."""
    strategy = chaos.random.choice(("background", "background", "precopy", "stop"))
    request = {"strategy": strategy, "network": world.policy}
    response = await world.request("POST", "/v1/slices/lab/snapshots", request)
    return str(response.json()["id"]) if response.is_success else None


def _has_ended(world: World, transaction: str) -> bool:
    phase = world.coordinator.journal.transaction(transaction).state.phase
    return phase in (Phase.COMMITTED, Phase.ABORTED, Phase.ABORTING)
