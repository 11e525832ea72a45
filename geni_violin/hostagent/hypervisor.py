"""The contract between the host agent and whatever runs VMs.

Theory of operation. The host agent's state machine decides *when* a VM stops, streams, resumes and when its frames are
held; an adapter behind this contract knows *how*. :mod:`geni_violin.hostagent.qemu` speaks to QEMU itself; an adapter
for libvirt fits behind the same two protocols. Nothing here decides anything about consistency.

Errors of all methods: :class:`~geni_violin.core.errors.Conflict` when the VM's process is gone,
:class:`~geni_violin.core.errors.MachineFault` with the hypervisor's own words when it refuses a command or does not
answer in time.
"""

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from geni_violin.core.errors import InvalidInput
from geni_violin.core.model import IN_HYPERVISOR, IN_SWITCH
from geni_violin.hostagent.edge import Edge
from geni_violin.hostagent.vm_events import Watch

RUNNING = "running"
PAUSED = "paused"
FAILED = "failed"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_MAC = re.compile(r"([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}")


@dataclass(frozen=True)
class Nic:
    """A network interface: the TAP device on the host's side and the MAC address on the guest's.

    With a ``hold_tap`` its frames are held there, in the switch, and not in the hypervisor.
    """

    tap: str
    mac: str
    hold_tap: str = ""

    def __post_init__(self) -> None:
        if not _MAC.fullmatch(self.mac):
            raise InvalidInput(
                f"{self.mac!r} is not a MAC address", "write six pairs of hexadecimal digits with colons"
            )


@dataclass(frozen=True)
class VmDefinition:
    """All that is needed to start a VM's process, now or again after a crash. Paths are absolute.

    ``switch`` is the name of the switch that its interfaces are on.

    With ``vhost`` the kernel moves its frames; all its interfaces need a ``hold_tap`` then.

    ``accel`` is QEMU's name of the accelerator. With ``incoming`` the VM waits for an image instead of booting.

    :raise InvalidInput: a name that cannot be a file name, or a size that is not positive.
    """

    slice: str
    name: str
    host: str
    kernel: str
    initrd: str
    append: str
    memory_mib: int
    vcpus: int
    nics: tuple[Nic, ...]
    switch: str = ""
    accel: str = "tcg"
    incoming: bool = False
    vhost: bool = False

    def __post_init__(self) -> None:
        for name in (self.slice, self.name):
            if not _NAME.fullmatch(name):
                raise InvalidInput(
                    f"{name!r} cannot name a slice or a VM", "use 1 to 63 letters, digits, dots, dashes or underscores"
                )
        if self.memory_mib < 1 or self.vcpus < 1:
            raise InvalidInput(f"VM {self.name} has {self.memory_mib} MiB and {self.vcpus} CPUs", "both start at 1")
        if self.vhost and not all(nic.hold_tap for nic in self.nics):
            raise InvalidInput(f"VM {self.name} uses vhost-net and has no hold port", "QEMU never sees its frames")

    @property
    def held_in(self) -> str:
        """Where its edge is."""
        return IN_SWITCH if any(nic.hold_tap for nic in self.nics) else IN_HYPERVISOR

    @property
    def memory_bytes(self) -> int:
        """The size of the guest's memory in bytes."""
        return self.memory_mib << 20


@dataclass(frozen=True)
class MigrationProgress:
    """How far an outgoing migration is. ``status`` as in :class:`~.vm_events.MigrationStatus`; sizes in bytes.

    ``error`` is the hypervisor's own words when it failed, else empty.
    """

    status: str
    transferred_bytes: int
    total_bytes: int
    error: str = ""


class Vm(Protocol):
    """A handle on one VM. Dropping it (:meth:`detach`) does not touch the VM."""

    @property
    def definition(self) -> VmDefinition:
        """What the VM was created from."""

    @property
    def edge(self) -> Edge:
        """Where the VM's frames are held."""

    @property
    def pid(self) -> int:
        """The id of the VM's process, also after its death."""

    @property
    def console_path(self) -> Path:
        """The file that the guest's serial console is appended to."""

    def watch(self) -> AbstractContextManager[Watch]:
        """Follow what happens to the VM from now to the end of the block."""

    async def status(self) -> str:
        """:data:`RUNNING`, :data:`PAUSED` or :data:`FAILED` (the process is gone). Never raises for a dead VM."""

    async def run(self) -> None:
        """Let the VM run. Returns when it does; nothing happens if it did already.

        :raise Conflict: the VM waits for an image, or its process is gone.
        """

    async def pause(self) -> float:
        """Stop the VM's processors. Returns when they stand still.

        :return: the hypervisor's time stamp of the stop, in seconds since 1970.
        :raise Conflict: the VM is not running.
        """

    async def ensure_running(self) -> bool:
        """Let the VM run if it does not, whatever has become of a migration: one that prevents it is cancelled.

        :return: whether that was necessary.
        """

    async def kill(self) -> None:
        """SIGKILL. Returns when the process is gone."""

    async def delete(self, keep_console: bool = False) -> None:
        """Kill the VM and remove all that was recorded about it; ``keep_console`` spares the console log."""

    async def detach(self) -> None:
        """Let go of the VM, which goes on as it is."""

    async def refusal(self, strategy: str) -> str:
        """Why a cut with this strategy cannot work, in the hypervisor's own words; empty if it can.

        Not to be asked while a migration is under way. After a failed snapshot it may take as long as a snapshot: the
        VM is then made fit for the strategy.
        """

    async def prepare_migration(self, fd: int, strategy: str) -> None:
        """Do what :meth:`start_migration` needs and the guest does not notice, so that it takes less time later."""

    async def start_migration(self, fd: int, strategy: str) -> None:
        """Start to send the VM's image into a connected socket. Returns at once; follow by :meth:`watch`.

        The hypervisor gets a duplicate of ``fd``: the caller closes its own, or the receiver never sees the end.
        Strategy ``stop`` expects that the VM was paused before.
        """

    async def continue_migration(self) -> None:
        """Go on after status ``pre-switchover`` (strategy ``precopy``).

        :raise MachineFault: the migration is not there.
        """

    async def cancel_migration(self, timeout_s: float = 10.0) -> str:
        """Cancel, wait for the end, and give the final status (``completed`` if the cancellation came too late).

        :raise MachineFault: the migration does not end in time.
        """

    async def migration_progress(self) -> MigrationProgress:
        """How far the latest outgoing migration is; status ``none`` if there was none."""

    async def load(self, fd: int, timeout_s: float = 600.0) -> None:
        """Load an image from a connected socket into a VM created with ``incoming``; it stays paused.

        :raise MachineFault: the image is damaged or ends early; the VM's process is then gone.
        """


class Hypervisor(Protocol):
    """Makes VMs, and finds again those that it made in an earlier life."""

    async def create(self, definition: VmDefinition) -> Vm:
        """Start a VM's process; the VM is paused. Leaves nothing behind when it fails.

        :raise AlreadyExists: a VM of that slice and name is there.
        :raise MachineFault: a file is missing, or the hypervisor did not start; with its own words.
        """

    async def attach(self, slice_name: str, vm_name: str) -> Vm:
        """A handle on a VM that was created before, dead or alive.

        :raise NotFound: there is none.
        """

    async def attach_all(self) -> Sequence[Vm]:
        """Handles on all VMs of this host that were created before, dead or alive."""
