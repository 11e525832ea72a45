"""The connection to one QEMU's monitor (QMP): commands, file descriptors, and events translated into our words.

Theory of operation. ``qemu.qmp`` keeps the connection. Its event listener calls us for each event while it reads, so an
event is published before the answer to the command that caused it is given to whoever waits for that. QEMU's socket
has a path of any length; it is reached through the folder's descriptor in /proc/self/fd, because the address of a Unix
socket is limited to 107 bytes (unix(7)).
"""

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qemu.qmp import ConnectError, EventListener, ExecuteError, Message, QMPClient, QMPError

from geni_violin.core.errors import Conflict, MachineFault
from geni_violin.hostagent.qemu_command import MONITOR_SOCKET
from geni_violin.hostagent.vm_events import MigrationStatus, Resumed, Stopped, VmEvent

_COMMAND_TIMEOUT_S = 10.0
_CONNECT_PERIOD_S = 0.005


class CommandRefused(MachineFault):
    """QEMU refused a command; ``words`` are its own."""

    def __init__(self, vm: str, command: str, words: str) -> None:
        super().__init__(f"QEMU refused {command} for VM {vm}: {words}")
        self.words = words


class NoAnswer(MachineFault):
    """QEMU lives, but does not answer on its monitor."""


def event_of(message: Mapping[str, Any]) -> VmEvent | None:
    """What a QMP event means to us; None for those that mean nothing (qapi: run-state, migration)."""
    stamp = message["timestamp"]
    at = stamp["seconds"] + stamp["microseconds"] / 1e6
    match message["event"]:
        case "STOP":
            return Stopped(at)
        case "RESUME":
            return Resumed(at)
        case "MIGRATION":
            return MigrationStatus(str(message["data"]["status"]), at)
        case _:
            return None


class _Translator(EventListener):
    """Hands every event on while it is read, and keeps none."""

    def __init__(self, publish: Callable[[VmEvent], None]) -> None:
        super().__init__()
        self._publish = publish

    def accept(self, event: Message) -> bool:
        translated = event_of(event)
        if translated is not None:
            self._publish(translated)
        return False


class QemuMonitor:
    """A connection to QEMU's monitor.

    :param vm: the VM's name, for messages.
    :param publish: gets every event that means something.
    """

    def __init__(self, vm: str, publish: Callable[[VmEvent], None]) -> None:
        self._vm = vm
        self._client = QMPClient(vm)
        self._client.logger.setLevel(logging.CRITICAL)  # a VM that is killed is no error of the connection
        self._client.events.names = {"(none)"}  # the default listener would keep every event for ever
        self._client.register_listener(_Translator(publish))
        self._descriptor_lock = asyncio.Lock()

    async def connect(self, folder: Path, is_gone: Callable[[], bool], timeout_s: float = 15.0) -> None:
        """Connect as soon as QEMU listens.

        :param is_gone: tells that waiting is in vain.
        :raise MachineFault: the process is gone, or nothing listens in time.
        :raise NoAnswer: QEMU listens, but does not greet in time.
        """
        deadline = time.monotonic() + timeout_s
        while (connection := _connected(folder)) is None:
            if is_gone() or time.monotonic() > deadline:
                raise MachineFault(f"QEMU of VM {self._vm} does not open its monitor socket", f"see {folder}/qemu.log")
            await asyncio.sleep(_CONNECT_PERIOD_S)
        try:
            await asyncio.wait_for(self._client.connect(connection), timeout_s)
        except (ConnectError, TimeoutError) as error:
            connection.close()
            raise NoAnswer(f"QEMU of VM {self._vm} does not greet on its monitor socket: {error}") from error

    async def execute(self, command: str, timeout_s: float = _COMMAND_TIMEOUT_S, **arguments: object) -> Any:
        """Run a command and give its answer. Underscores in argument names stand for dashes.

        :raise CommandRefused: QEMU refused it.
        :raise Conflict: the connection is gone, and so is the VM.
        :raise NoAnswer: none came in time.
        """
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            async with asyncio.timeout(timeout_s):
                return await self._client.execute(command, named or None)
        except ExecuteError as error:
            raise CommandRefused(self._vm, command, str(error)) from error
        except TimeoutError as error:
            raise NoAnswer(f"QEMU of VM {self._vm} did not answer {command} within {timeout_s:g} s") from error
        except QMPError as error:
            raise Conflict(f"VM {self._vm} is gone: {error}", "delete or restore it") from error

    async def pass_descriptor(self, name: str, fd: int) -> None:
        """Give QEMU a duplicate of a file descriptor under a name; one of the same name is replaced.

        :raise Conflict, MachineFault: as :meth:`execute`.
        """
        async with self._descriptor_lock:
            try:
                self._client.send_fd_scm(fd)
            except (QMPError, OSError) as error:
                raise Conflict(f"VM {self._vm} is gone: {error}", "delete or restore it") from error
            await self.execute("getfd", fdname=name)

    async def close(self) -> None:
        """Disconnect; QEMU stays."""
        with contextlib.suppress(QMPError, OSError, EOFError):
            await self._client.disconnect()


def _connected(folder: Path) -> socket.socket | None:
    """A connection to the monitor socket in a folder; None while nothing listens there."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)
    try:
        descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY)
        try:
            connection.connect(f"/proc/self/fd/{descriptor}/{MONITOR_SOCKET}")
        finally:
            os.close(descriptor)
    except OSError:
        connection.close()
        return None
    return connection
