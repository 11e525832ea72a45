"""Removing all that an installation's host agents have on this machine, whatever they left when they died.

Theory of operation. The agents themselves are stopped before, by whoever started them. Three kinds of things outlive
an agent: processes of VMs and of links (in the agents' ledger; a QEMU that was not recorded yet is named by its pid
file), bridges (marked in Open vSwitch's database) and TAP devices (by their names). They go in that order, users before
what they use.
Nothing depends on what an earlier call did, so it can be repeated. Images, logs and the database stay.
"""

import asyncio
import os
import shutil
from dataclasses import dataclass

from geni_violin.hostagent import link_ends, ovs, ports, qemu_process
from geni_violin.hostagent.ovs import OpenVSwitch
from geni_violin.runtime import processes
from geni_violin.runtime.processes import Ledger, ProcessRecord
from geni_violin.runtime.settings import Settings

_PATIENCE_S = 5.0


@dataclass(frozen=True)
class CleanedUp:
    """What was there and is gone: processes and bridges and taps, by name."""

    processes: tuple[str, ...]
    bridges: tuple[str, ...]
    taps: tuple[str, ...]


def ledger_of(settings: Settings) -> Ledger:
    """The ledger of what the host agents of an installation started."""
    return Ledger(settings.run_dir / "processes")


async def clean_up(settings: Settings) -> CleanedUp:
    """Stop every process and delete every bridge and TAP device of this installation.

    :raise MachineFault: Open vSwitch or the kernel refused to delete something.
    """
    stopped = await _stop_processes(settings)
    bridges = await _delete_bridges(settings)
    taps = await _delete_taps(settings)
    return CleanedUp(tuple(stopped), tuple(bridges), tuple(taps))


async def _stop_processes(settings: Settings) -> list[str]:
    ledger = ledger_of(settings)
    folders = qemu_process.folders(settings.run_dir)
    machines = [record for folder in folders if (record := folder.find_process(ledger)) is not None]
    others = [record for record in ledger.all() if record.pid != os.getpid() and record not in machines]
    alive = [record for record in [*others, *machines] if processes.is_alive(record)]
    await asyncio.gather(*(asyncio.to_thread(_stop, record) for record in alive))
    for record in [*others, *machines]:
        ledger.remove(record.name)
    for folder in (settings.run_dir / "vms", link_ends.folder_of(settings)):
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
    return sorted(record.name for record in alive)


def _stop(record: ProcessRecord) -> None:
    """Guests are not asked to shut down: there is nothing in them to save that a snapshot has not."""
    processes.stop(record, patience_s=0.0 if record.name.startswith(qemu_process.RECORD_PREFIX) else _PATIENCE_S)


async def _delete_bridges(settings: Settings) -> list[str]:
    if not await ovs.is_running():
        return []
    return await OpenVSwitch(settings.installation_id).flush()


async def _delete_taps(settings: Settings) -> list[str]:
    taps = ports.taps_of(settings.installation_id)
    for tap in taps:
        await ports.delete_tap(tap)
    return taps
