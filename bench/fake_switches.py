"""Many fake switches in a process of their own, each with a connection to the controller, as switches have.

Theory of operation. The process runs one asyncio loop with one connection a switch. The benchmark asks it over a pipe
what the switches have counted; a question is answered between two messages, so counts are never half of something.
"""

import asyncio
import functools
import multiprocessing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from bench.fake_switch import FakeSwitch

Ports = Mapping[int, tuple[int, ...]]
"""By datapath id, the numbers of a switch's ports."""


@dataclass(frozen=True)
class Totals:
    """All switches together."""

    rules: int
    meters: int
    flow_mods: int
    flow_mod_bytes: int
    barriers: int
    refused: int

    def since(self, earlier: "Totals") -> "Totals":
        """What came after; ``rules``, ``meters`` and ``refused`` stay as they are now."""
        return Totals(
            self.rules,
            self.meters,
            self.flow_mods - earlier.flow_mods,
            self.flow_mod_bytes - earlier.flow_mod_bytes,
            self.barriers - earlier.barriers,
            self.refused,
        )


class FakeSwitches:
    """The benchmark's end of the pipe."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def totals(self) -> Totals:
        """What all switches have counted so far.

        :raise EOFError: their process has ended.
        """
        self._pipe.send("totals")
        totals = self._pipe.recv()
        assert isinstance(totals, Totals)
        return totals


@contextmanager
def running_switches(openflow_port: int, ports: Ports) -> Iterator[FakeSwitches]:
    """Fake switches that connect to a controller on this machine, until the block ends."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(openflow_port, dict(ports), there))
    process.start()
    there.close()
    try:
        yield FakeSwitches(here)
    finally:
        process.terminate()
        process.join()
        here.close()


# --- in the switches' process -----------------------------------------------------------------------------------------


class _Wire(asyncio.Protocol):
    """A switch and its connection. When the connection ends, so does the process: its counts would be wrong."""

    def __init__(self, switch: FakeSwitch, ended: "asyncio.Future[None]") -> None:
        self._switch, self._ended = switch, ended
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._transport.write(self._switch.greeting())

    def data_received(self, data: bytes) -> None:
        answer = self._switch.receive(data)
        if answer:
            self._transport.write(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._ended.done():
            reason = exc or "closed by the controller"
            self._ended.set_exception(ConnectionError(f"switch {self._switch.dpid:#x}: {reason}"))


def _totals(switches: list[FakeSwitch]) -> Totals:
    counts = [switch.counts for switch in switches]
    return Totals(
        rules=sum(len(switch.rules) for switch in switches),
        meters=sum(len(switch.meters) for switch in switches),
        flow_mods=sum(count.flow_mods for count in counts),
        flow_mod_bytes=sum(count.flow_mod_bytes for count in counts),
        barriers=sum(count.barriers for count in counts),
        refused=sum(count.refused for count in counts),
    )


async def _serve(openflow_port: int, ports: dict[int, tuple[int, ...]], pipe: Connection) -> None:
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    switches = [FakeSwitch(dpid, numbers) for dpid, numbers in ports.items()]

    def answer() -> None:
        try:
            pipe.recv()
        except EOFError:
            ended.cancel()
            return
        pipe.send(_totals(switches))

    loop.add_reader(pipe.fileno(), answer)
    for switch in switches:
        await loop.create_connection(functools.partial(_Wire, switch, ended), "127.0.0.1", openflow_port)
    await ended


def _run(openflow_port: int, ports: dict[int, tuple[int, ...]], pipe: Connection) -> None:
    asyncio.run(_serve(openflow_port, ports, pipe))
