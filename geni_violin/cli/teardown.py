"""``down``: nothing of an installation is left, whatever became of it before.

Theory of operation. First the orderly way: the coordinator deletes its slices, the parts end on SIGTERM. Then, always,
what a crash may have left: the host agent's cleanup ends the VMs of its ledger and removes this installation's taps and
bridges. If the coordinator was not there to delete the slices, its database still has them; their VMs are gone, so they
are struck out there too. Snapshots stay. Doing it twice is the same as once.
"""

import asyncio
from dataclasses import dataclass

from geni_violin.cli.machine import forget_installation, require_root
from geni_violin.cli.parts import Parts, Say, exclusive
from geni_violin.core.errors import MachineFault
from geni_violin.runtime.settings import Settings

DATABASE = "coordinator.sqlite"


@dataclass(frozen=True)
class TakenDown:
    """An installation that has nothing running any more."""

    state_dir: str
    processes: tuple[str, ...] = ()
    bridges: tuple[str, ...] = ()
    taps: tuple[str, ...] = ()
    """What a crash had left, by name."""


def take_down(settings: Settings, say: Say) -> TakenDown:
    """Delete all slices, stop all parts, remove what a crash left. Idempotent.

    :raise Conflict: another up or down is at work.
    :raise MachineFault: not root.
    """
    if not settings.state_dir.exists():
        return TakenDown(str(settings.state_dir))
    require_root("stopping what runs")
    with exclusive(settings):
        parts = Parts(settings, say)
        deleted = parts.delete_slices()
        parts.stop()
        left = _remove_leftovers(settings)
        if not deleted:
            _forget_slices(settings)
        forget_installation(settings)
    return left


def _remove_leftovers(settings: Settings) -> TakenDown:
    from geni_violin.hostagent.cleanup import clean_up  # noqa: PLC0415  (only here is it needed)

    left = asyncio.run(clean_up(settings))
    return TakenDown(str(settings.state_dir), left.processes, left.bridges, left.taps)


def _forget_slices(settings: Settings) -> None:
    """Strike the slices out of the database of a coordinator that does not run.

    :raise MachineFault: the database cannot be read.
    """
    if not (settings.state_dir / DATABASE).exists():
        return
    from sqlalchemy.exc import SQLAlchemyError  # noqa: PLC0415  (slow to import)

    from geni_violin.coordinator.journal import Journal  # noqa: PLC0415

    try:
        journal = Journal(settings.state_dir / DATABASE)
        try:
            for record in journal.slices():
                journal.delete_slice(record.name)
        finally:
            journal.close()
    except SQLAlchemyError as error:
        raise MachineFault(
            f"the coordinator's database {settings.state_dir / DATABASE} cannot be read: {error}",
            "everything is stopped; move that file away if it is damaged",
        ) from error
