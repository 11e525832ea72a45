"""One process of a link's end: what it is for, on disk and in the ledger, and starting it.

Theory of operation. The process gets its TAP device and its socket as open descriptors, so that what cannot be opened
is known here and at once. It is in the ledger before it is told to go on; should the agent die before that, the control
socket is closed and the process ends by itself (``link_process``). So no process ever runs that nobody can find.
"""

import asyncio
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from geni_violin.core.errors import MachineFault
from geni_violin.hostagent import link_process, ports
from geni_violin.hostagent.qemu_process import QemuProcess
from geni_violin.runtime import processes
from geni_violin.runtime.processes import Ledger

RECORD_PREFIX = "link:"
START_PATIENCE_S = 15.0


@dataclass(frozen=True)
class LinkEnd:
    """One end of a link: from ``switch`` of ``host``, on ``bridge``, to ``peer_switch``.

    ``delay_ms`` and ``loss`` are those of the direction that begins here, and ``seed`` decides which frames are lost.
    ``address`` and ``peer_address`` are the tunnel's two ends, HOST:PORT; the far one is empty until it is known.
    """

    host: str
    switch: str
    bridge: str
    peer_switch: str
    number: int
    delay_ms: float
    loss: float
    tap: str
    seed: int = 0
    address: str = ""
    peer_address: str = ""

    @property
    def record_name(self) -> str:
        """Its process in the ledger."""
        return f"{RECORD_PREFIX}{self.tap}"


async def start(end: LinkEnd, tunnel: socket.socket, counters: Path, log: Path, ledger: Ledger) -> QemuProcess:
    """Start the process of an end and record it. ``tunnel`` may be closed afterwards.

    :param counters: the file that it shows its counters in.
    :param log: the file that it writes its few words to.
    :raise MachineFault: it does not start; with its last words.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            child = _spawn(end, tunnel, theirs, counters, log)
        try:
            await _until_ready(ours, log)
            record = processes.record_of(end.record_name, child.pid)
            ledger.add(record)
            ours.sendall(link_process.GO)
        except BaseException:
            child.kill()
            await asyncio.to_thread(child.wait)
            ledger.remove(end.record_name)
            raise
    return QemuProcess(record, child)


def _spawn(
    end: LinkEnd, tunnel: socket.socket, control: socket.socket, counters: Path, log: Path
) -> subprocess.Popen[bytes]:
    tap = ports.open_tap(end.tap)
    try:
        descriptors = {"tap-fd": tap, "tunnel-fd": tunnel.fileno(), "control-fd": control.fileno()}
        options = {
            **descriptors,
            "peer": end.peer_address,
            "delay-ms": end.delay_ms,
            "loss": end.loss,
            "seed": end.seed,
            "counters": counters.resolve(),
        }
        arguments = [f"--{name}={value}" for name, value in options.items()]
        with log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", link_process.__name__, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=tuple(descriptors.values()),
                cwd="/",
                start_new_session=True,
            )
    except OSError as error:
        raise MachineFault(f"cannot start the process of link {end.tap}: {error.strerror}") from error
    finally:
        os.close(tap)


async def _until_ready(control: socket.socket, log: Path) -> None:
    control.setblocking(False)
    try:
        async with asyncio.timeout(START_PATIENCE_S):
            said = await asyncio.get_running_loop().sock_recv(control, 1)
    except TimeoutError:
        raise MachineFault(f"a link's process is not ready within {START_PATIENCE_S:g} s", f"see {log}") from None
    if said != link_process.READY:
        raise MachineFault(f"a link's process has ended: {_last_line(log)}", f"see {log}")


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it says nothing"
