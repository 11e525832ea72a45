"""Images of a real QEMU are read, written anew, and loaded into another, in which the guest runs on. Needs root.

What is written is what a store would make of the events: each page once, in its last version, in order. Before the new
VM runs its image is taken again: its memory must be the same, page by page.
"""

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

import numpy as np

from geni_violin.hostagent.qemu import QemuVm
from geni_violin.snapshot_server.cut_clock import clock_at_stop_ns
from geni_violin.snapshot_server.stream.events import Event, FillRun, Opaque, PageRun, Preamble, Tail
from geni_violin.snapshot_server.stream.layout import RUN_PAGES
from geni_violin.snapshot_server.stream.reader import StreamReader
from geni_violin.snapshot_server.stream.writer import write_stream
from mininet_tests.hypervisor_harness import Bench, Scenario, image_of_paused, load, snapshot, ticks, ticks_on

STRATEGIES = ("background", "precopy", "stop")
PORTION_BYTES = 100_003

Page = tuple[int, int]
"""A page's block and number."""


def read(image: bytes) -> list[Event]:
    """An image's events."""
    reader = StreamReader()
    events: list[Event] = []
    for start in range(0, len(image), PORTION_BYTES):
        events += reader.feed(memoryview(image)[start : start + PORTION_BYTES])
    return events + reader.finish()


def last_versions(events: Sequence[Event]) -> dict[Page, bytes | int]:
    """Each page's bytes, or the one that it is full of."""
    pages: dict[Page, bytes | int] = {}
    for event in events:
        if isinstance(event, PageRun):
            for page, row in zip(event.pages.tolist(), event.data, strict=True):
                pages[event.block, page] = row.tobytes()
        elif isinstance(event, FillRun):
            pages |= {(event.block, page): event.fill for page in event.pages.tolist()}
    return pages


def runs_of(pages: dict[Page, bytes | int], block: int) -> Iterator[PageRun | FillRun]:
    """The runs of one block, in order."""
    contents = sorted((page, content) for (its, page), content in pages.items() if its == block)
    full = [(page, content) for page, content in contents if isinstance(content, bytes)]
    for start in range(0, len(full), RUN_PAGES):
        part = full[start : start + RUN_PAGES]
        rows = np.frombuffer(b"".join(content for _, content in part), np.uint8).reshape(len(part), -1)
        yield PageRun(block, np.array([page for page, _ in part], np.int64), rows)
    for fill in {content for _, content in contents if isinstance(content, int)}:
        yield FillRun(block, np.array([page for page, content in contents if content == fill], np.int64), fill)


def written(events: Sequence[Event]) -> bytes:
    """The image that a store would give back."""
    preamble = events[0]
    assert isinstance(preamble, Preamble)
    pages = last_versions(events)
    runs = (run for block in range(len(preamble.blocks)) for run in runs_of(pages, block))
    rest = [event.data for event in events if isinstance(event, Tail | Opaque)]
    return b"".join(write_stream(preamble, runs, rest))


async def check_copy(copy: QemuVm, image: bytes, ticked: int) -> list[Event]:
    """Load what is written of an image's events, compare its memory, let it run; the events."""
    events = read(image)
    await load(copy, written(events))
    again = read(await image_of_paused(copy, "stop"))
    await ticks_on(copy, 20.0)
    assert ticked <= ticks(copy)[0] <= ticked + 20
    tail = events[-1]
    if isinstance(tail, Tail):
        assert last_versions(again) == last_versions(events)
        assert clock_at_stop_ns(tail.data) == clock_at_stop_ns(image) is not None
    return events


@contextlib.asynccontextmanager
async def waiting(own: Bench) -> AsyncIterator[QemuVm]:
    """A VM that waits for an image; deleted at the end."""
    vm = await own.hypervisor.create(own.definition(incoming=True))
    try:
        yield vm
    finally:
        await vm.delete()


def test_images_of_every_strategy_are_read_written_and_run_on(play: Callable[[Scenario], None]) -> None:
    async def scenario(own: Bench) -> None:
        images = []
        async with own.booted() as vm:
            for strategy in STRATEGIES:
                ticked = ticks(vm)[-1]
                images.append((ticked, (await snapshot(vm, strategy))[0]))
        for ticked, image in images:
            async with waiting(own) as copy:
                events = await check_copy(copy, image, ticked)
            assert {type(event) for event in events} == {Preamble, PageRun, FillRun, Tail}

    play(scenario)


def test_what_is_not_understood_is_loaded_behind_what_is(play: Callable[[Scenario], None]) -> None:
    """Compressed pages go on with the block of the page before them, which is not compressed."""
    compress = [{"capability": "compress", "state": True}]

    async def scenario(own: Bench) -> None:
        async with own.booted() as vm:
            await vm._execute("migrate-set-capabilities", capabilities=compress)
            ticked = ticks(vm)[-1]
            image, _ = await snapshot(vm, "precopy")
        async with waiting(own) as copy:
            await copy._execute("migrate-set-capabilities", capabilities=compress)
            events = await check_copy(copy, image, ticked)
        assert isinstance(events[0], Preamble)
        reasons = {event.reason for event in events if isinstance(event, Opaque)}
        assert reasons == {"a record of pages has the flags 0x120"}

    play(scenario)
