"""Real guests whose memory is filled: their images are captured into files, and images are loaded into new ones.

A capture is QEMU's own ``background-snapshot``, as a snapshot of a slice takes it, into a file. It is kept below
``.cache/bench-store`` under a name that tells the guest's memory and the content's version (QEMU's version is part of
it), so that another run of the benchmark has the same images.
"""

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.store_content import FILLED, IMAGES, KERNEL, build_initrd, recipe
from geni_violin.hostagent.hypervisor import VmDefinition
from geni_violin.hostagent.qemu import QemuHypervisor, QemuVm
from geni_violin.hostagent.vm_events import FINAL_MIGRATION_STATUSES, Died, MigrationStatus
from geni_violin.runtime.processes import Ledger
from mininet_tests.slice_harness import REPOSITORY

CACHE = REPOSITORY / ".cache" / "bench-store"
APPEND = "console=ttyS0 quiet loglevel=1 tsc=unstable no_timer_check rootfstype=ramfs ipv6.disable=1"
SEED = 1
_BOOT_PATIENCE_S = 600.0
_STREAM_PATIENCE_S = 300.0


@dataclass(frozen=True)
class Machine:
    """A guest to be: its memory and what it boots (an image is loaded into a machine that is the same)."""

    memory_mib: int
    initrd: Path

    def definition(self, name: str, incoming: bool) -> VmDefinition:
        """The VM, without a network."""
        append = f"{APPEND} {recipe(self.memory_mib).argument(SEED)}"
        return VmDefinition(
            "bench", name, "h1", str(KERNEL), str(self.initrd), append, self.memory_mib, 1, (), incoming=incoming
        )


@asynccontextmanager
async def created(machine: Machine, incoming: bool = False) -> AsyncIterator[QemuVm]:
    """A VM's process, made by the host agent's own code; it waits to be run, or for an image. Gone at the end."""
    with tempfile.TemporaryDirectory(prefix="gvb-", dir="/tmp") as folder:
        run_dir = Path(folder)
        hypervisor = QemuHypervisor(run_dir, Ledger(run_dir / "processes"), "h1")
        vm = await hypervisor.create(machine.definition("n1", incoming))
        try:
            yield vm
        finally:
            await vm.delete()


def captured(memory_mib: int, version: str) -> Path:
    """The image of a filled guest of so much memory, from the cache if it is there.

    :raise SystemExit: the guest could not be filled, or QEMU could not take the image.
    """
    path = CACHE / f"guest-{memory_mib}-{version}.stream"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        for old in CACHE.glob(f"guest-{memory_mib}-*"):
            old.unlink()
        print(f"  taking the image of a guest of {memory_mib} MiB", flush=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            initrd, partial = Path(folder, "initrd"), Path(folder, "stream")
            build_initrd(initrd, recipe(memory_mib).files)
            asyncio.run(_capture(Machine(memory_mib, initrd), partial))
            partial.rename(path)
    return path


async def _capture(machine: Machine, path: Path) -> None:
    async with created(machine) as vm:
        await vm.run()
        await _filled(vm)
        stream = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        with vm.watch() as events:
            await vm.start_migration(stream, "background")
            os.close(stream)
            final = await events.until(
                lambda event: (
                    isinstance(event, Died)
                    or (isinstance(event, MigrationStatus) and event.status in FINAL_MIGRATION_STATUSES)
                ),
                _STREAM_PATIENCE_S,
            )
        if not (isinstance(final, MigrationStatus) and final.status == "completed"):
            raise SystemExit(f"QEMU could not take an image: {final}")


async def _filled(vm: QemuVm) -> None:
    deadline = time.monotonic() + _BOOT_PATIENCE_S
    while True:
        said = vm.console_path.read_text(errors="replace") if vm.console_path.exists() else ""
        if FILLED in said:
            return
        if "GV-FAILED" in said or time.monotonic() > deadline:
            raise SystemExit(f"the guest was not filled; its console: {said[-500:]}")
        await asyncio.sleep(0.2)


def load_s(memory_mib: int, source: AbstractContextManager[int]) -> float:
    """Seconds from the moment that an image is asked for to the one that QEMU says it is loaded.

    The VM's process is there, and waits, when the time begins.

    :param source: asks for the image when it is entered, and gives the file descriptor that it comes through.
    """
    # Nothing of the initial file system is read when an image is loaded; the project's own is always there.
    machine = Machine(memory_mib, IMAGES / "causality.initrd")

    async def measure() -> float:
        async with created(machine, incoming=True) as vm:
            began = time.monotonic()
            with source as descriptor:
                await vm.load(descriptor)
            return time.monotonic() - began

    return asyncio.run(measure())
