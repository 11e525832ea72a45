"""Letting a VM run whose migration QEMU says is completed, but is not quite done with."""

import asyncio

import pytest

from geni_violin.hostagent import qemu
from geni_violin.hostagent.qemu_monitor import CommandRefused

NOT_FINALIZED = "Migration is not finalized yet"


def _resumed_after(*refusals: str, for_ever: bool = False) -> int:
    """How often ``cont`` was asked for, of a QEMU that refuses with these words, one after the other."""
    asked: list[str] = []

    async def execute(command: str) -> None:
        asked.append(command)
        if for_ever or len(asked) <= len(refusals):
            raise CommandRefused("a", command, refusals[(len(asked) - 1) % len(refusals)])

    asyncio.run(qemu.resume(execute))
    assert set(asked) == {"cont"}
    return len(asked)


def test_a_migration_that_is_not_quite_done_is_waited_for() -> None:
    assert _resumed_after() == 1
    assert _resumed_after(NOT_FINALIZED, NOT_FINALIZED) == 3


def test_another_refusal_is_told_at_once() -> None:
    with pytest.raises(CommandRefused, match="needs a reset"):
        _resumed_after("the VM needs a reset", for_ever=True)


def test_it_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "_FINALIZING_PATIENCE_S", 0.05)
    with pytest.raises(CommandRefused, match=NOT_FINALIZED):
        _resumed_after(NOT_FINALIZED, for_ever=True)
