"""These tests need root. Here is also what those of a single VM are played on."""

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from geni_violin.hostagent.cleanup import clean_up
from mininet_tests.hypervisor_harness import Scenario, bench, guest_initrd


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without root they are skipped, and the report says so."""
    if os.geteuid() != 0:
        for item in items:
            item.add_marker(pytest.mark.skip(reason="needs root"))


@pytest.fixture(scope="module")
def initrd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guest of the tests of one VM."""
    return guest_initrd(tmp_path_factory.mktemp("guest"))


@pytest.fixture
def play(tmp_path: Path, initrd: Path) -> Iterator[Callable[[Scenario], None]]:
    """Plays a scenario on a bench of its own; what it leaves, whatever happened, is cleaned up."""

    async def on_bench(scenario: Scenario) -> None:
        async with bench(tmp_path / "state", initrd) as own:
            try:
                await scenario(own)
            finally:
                await clean_up(own.settings)

    yield lambda scenario: asyncio.run(on_bench(scenario))
