"""This host's ends of links with a delay or a loss: each a TAP device on a switch and a process of its own.

Theory of operation. The kernel has no such links (no netem), so ``link_process`` carries their frames, through a UDP
tunnel to the far end, on whichever host that is. Neither end can be finished before the other's address is known, so
one of them is asked for twice: without the far end's address it binds its socket and tells its own; with it, its
process starts, with that socket. Asked again, an end that runs stays as it is, unless its far end has moved.

An end's definition is on disk before anything else of it exists. So an agent that starts finds every end again: it
watches the processes that run, and starts the others anew, at their old address, which the far end knows. A process
that dies is started anew too. Without one the device has no carrier, and the switch sees a link that is down. An end
goes when its switch does; what is in its line then is gone with it.
"""

import asyncio
import contextlib
import hashlib
import json
import math
import secrets
import socket
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from geni_violin.core.errors import GeniViolinError, InvalidInput, MachineFault
from geni_violin.core.model import MAX_LINK_DELAY_MS
from geni_violin.hostagent import link_child, ports
from geni_violin.hostagent.link_child import LinkEnd
from geni_violin.hostagent.link_counters import Counters, read_counters
from geni_violin.hostagent.ovs import OpenVSwitch
from geni_violin.hostagent.qemu_process import QemuProcess
from geni_violin.runtime import processes, wire
from geni_violin.runtime.processes import Ledger, write_atomically
from geni_violin.runtime.settings import Settings

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 30.0

log = structlog.get_logger()


def folder_of(settings: Settings) -> Path:
    """Where the definitions and the counters of an installation's ends are."""
    return settings.run_dir / "links"


def check_manner(delay_ms: float, loss: float) -> None:
    """See that there can be a link with these.

    :raise InvalidInput: there cannot.
    """
    if not (math.isfinite(delay_ms) and 0 <= delay_ms <= MAX_LINK_DELAY_MS):
        raise InvalidInput(f"a link cannot have a delay of {delay_ms} ms", f"expected 0 to {MAX_LINK_DELAY_MS}")
    if not 0 <= loss <= 1:
        raise InvalidInput(f"a link cannot lose {loss} of its frames", "expected a share from 0 to 1")


def seed_of(link_seed: int, tap: str) -> int:
    """What decides which frames an end loses: its own for each end, the same each time unless ``link_seed`` is 0."""
    if link_seed == 0:
        return secrets.randbits(32)
    return int.from_bytes(hashlib.sha256(f"{link_seed}\0{tap}".encode()).digest()[:4], "big")


@dataclass
class _Held:
    """An end as it is now: with a bound socket, then with a process, then (until it is started anew) with neither."""

    end: LinkEnd
    tunnel: socket.socket | None = None
    process: QemuProcess | None = None


class LinkEnds:
    """The ends of one host.

    :param tunnel_host: the address of this host that the others reach its ends at.
    """

    def __init__(self, settings: Settings, host: str, tunnel_host: str, switches: OpenVSwitch, ledger: Ledger) -> None:
        self._host, self._tunnel_host = host, tunnel_host
        self._switches, self._ledger = switches, ledger
        self._link_seed = settings.link_seed
        self._folder, self._log_dir = folder_of(settings), settings.log_dir
        self._held: dict[str, _Held] = {}
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._revivals: set[asyncio.Task[None]] = set()

    # the agent's start and end

    def take_over(self) -> None:
        """Watch the processes of this host's ends that run, and have the others started anew."""
        for path in sorted(self._folder.glob("*.json")):
            end = wire.decode(LinkEnd, json.loads(path.read_bytes()))
            if end.host == self._host:
                self._take_over(self._held.setdefault(end.tap, _Held(end)))

    def _take_over(self, held: _Held) -> None:
        record = self._ledger.get(held.end.record_name)
        if record is not None and processes.is_alive(record):
            self._watch(held, QemuProcess(record, None))
        elif held.end.peer_address:
            self._have_revived(held)

    def detach(self) -> None:
        """Let everything go on without the agent."""
        for task in self._revivals:
            task.cancel()
        for held in self._held.values():
            if held.process is not None:
                held.process.forget()
            if held.tunnel is not None:
                held.tunnel.close()

    def counters(self) -> list[tuple[LinkEnd, Counters]]:
        """Every end and its counters."""
        ends = (held.end for held in self._held.values())
        in_order = sorted(ends, key=lambda end: (end.switch, end.peer_switch, end.number, end.tap))
        return [(end, read_counters(self._counters_path(end))) for end in in_order]

    # making and removing

    async def put(self, wanted: LinkEnd) -> tuple[int, str]:
        """Have an end exist; without ``peer_address`` in it, up to its address. An end that fails is not left behind.

        :param wanted: without seed and address, which are found here.
        :return: its OpenFlow port number, and its address.
        :raise MachineFault: Open vSwitch or the kernel refused, or the process does not start.
        """
        async with self._locks[wanted.tap]:
            is_new = wanted.tap not in self._held
            held = self._reserve(wanted) if is_new else self._held[wanted.tap]
            try:
                return await self._put(held, wanted.peer_address), held.end.address
            except BaseException:
                await asyncio.shield(self._give_up(held, is_new))
                raise

    def _reserve(self, wanted: LinkEnd) -> _Held:
        tunnel = _bind(f"{self._tunnel_host}:0")
        seed = seed_of(self._link_seed, wanted.tap)
        end = replace(wanted, seed=seed, address=_address_of(tunnel), peer_address="")
        self._held[end.tap] = _Held(end, tunnel)
        return self._held[end.tap]

    async def _put(self, held: _Held, peer_address: str) -> int:
        end = replace(held.end, peer_address=peer_address or held.end.peer_address)
        if not self._definition_path(end).exists() or end != held.end:
            await asyncio.to_thread(self._write, end)
        has_moved, held.end = end.peer_address != held.end.peer_address, end
        port = await ports.plug(self._switches, end.bridge, end.tap)
        if has_moved:
            await self._stop(held)
        if end.peer_address and held.process is None:
            await self._start(held)
        return port.port_no

    async def _give_up(self, held: _Held, is_new: bool) -> None:
        """An end that was there before may be another slice's too: it stays."""
        if not is_new:
            self._have_revived(held)
            return
        with contextlib.suppress(GeniViolinError):
            await self._remove(held)

    async def remove_all(self, bridge: str) -> None:
        """Remove every end on a bridge: processes, ports and devices are gone when this returns.

        :raise MachineFault: something refuses to go.
        """
        for tap in [held.end.tap for held in self._held.values() if held.end.bridge == bridge]:
            async with self._locks[tap]:
                if tap in self._held:
                    await self._remove(self._held[tap])

    async def _remove(self, held: _Held) -> None:
        end = held.end
        await self._stop(held)
        if held.tunnel is not None:
            held.tunnel.close()
        await ports.unplug(self._switches, end.bridge, end.tap)
        for path in (self._definition_path(end), self._counters_path(end)):
            path.unlink(missing_ok=True)
        del self._held[end.tap]

    # processes

    async def _start(self, held: _Held) -> None:
        end = held.end
        tunnel, held.tunnel = held.tunnel or _bind(end.address), None
        with tunnel:
            counters, log_path = self._counters_path(end), self._log_dir / f"link-{end.tap}.log"
            process = await link_child.start(end, tunnel, counters, log_path, self._ledger)
        self._watch(held, process)

    def _watch(self, held: _Held, process: QemuProcess) -> None:
        held.process = process
        process.observe(lambda: self._died(held, process))

    def _died(self, held: _Held, process: QemuProcess) -> None:
        if held.process is process:
            held.process = None
            log.warning("a link's process has ended; it is started anew", link=held.end.tap, pid=process.record.pid)
            self._have_revived(held)

    async def _stop(self, held: _Held) -> None:
        process, held.process = held.process, None
        if process is not None:
            process.forget()
            await process.kill()
            self._ledger.remove(held.end.record_name)

    def _have_revived(self, held: _Held) -> None:
        task = asyncio.get_running_loop().create_task(self._revive(held))
        self._revivals.add(task)
        task.add_done_callback(self._revivals.discard)

    async def _revive(self, held: _Held) -> None:
        """Try until the end has a process, or is not wanted any more."""
        pause_s, done = _FIRST_PAUSE_S, False
        while not done:
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            done = await self._try_to_revive(held)

    async def _try_to_revive(self, held: _Held) -> bool:
        end = held.end
        async with self._locks[end.tap]:
            if self._held.get(end.tap) is not held or held.process is not None or not end.peer_address:
                return True
            try:
                await ports.plug(self._switches, end.bridge, end.tap)
                await self._start(held)
            except GeniViolinError as error:
                log.warning("a link's process does not start", link=end.tap, reason=str(error))
                return False
            return True

    # files

    def _definition_path(self, end: LinkEnd) -> Path:
        return self._folder / f"{end.tap}.json"

    def _counters_path(self, end: LinkEnd) -> Path:
        return self._folder / f"{end.tap}.counters"

    def _write(self, end: LinkEnd) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._definition_path(end), json.dumps(wire.encode(end)).encode())


def _bind(address: str) -> socket.socket:
    """A UDP socket at an address; its port may be 0, for any.

    :raise MachineFault: it is taken, or none of this machine's.
    """
    host, _, port = address.rpartition(":")
    tunnel = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        tunnel.bind((host, int(port)))
    except OSError as error:
        tunnel.close()
        raise MachineFault(f"cannot take UDP address {address} for a link: {error.strerror}") from error
    return tunnel


def _address_of(tunnel: socket.socket) -> str:
    host, port = tunnel.getsockname()
    return f"{host}:{port}"
