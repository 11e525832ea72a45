"""Events to bytes: a stream that QEMU loads to the same state.

Theory of operation. The preamble and what follows the pages are written as they were read; all pages stand in one
section between them. The records of a run are built in one array: their headers and their contents are two views of it
that are each assigned at once. The first record of a block is longer by the block's name. It needs no array of its own:
the name is put in front of the array, the header in front of the name, where the first record's own header was.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from geni_violin.snapshot_server.stream import layout
from geni_violin.snapshot_server.stream.events import FillRun, PageRun, Preamble
from geni_violin.snapshot_server.stream.records import named


def write_stream(
    preamble: Preamble, runs: Iterable[PageRun | FillRun], rest: Iterable[bytes | memoryview]
) -> Iterator[bytes | memoryview]:
    """The pieces of a stream, in order. Each stays as it is for as long as it is kept.

    :param runs: each page once, or its last version last; block by block is shortest. They are taken one at a time, and
        only their own pieces are in memory.
    :param rest: what follows the pages: the data of a tail, or of all opaque pieces.
    """
    number = preamble.section_id.to_bytes(4, "big")
    yield preamble.data
    yield bytes((layout.PART,)) + number
    block = None
    for run in runs:
        name = b"" if run.block == block else named(preamble.blocks[run.block].name)
        block = run.block
        yield _page_records(run, name) if isinstance(run, PageRun) else _fill_records(run, name)
    yield layout.EOS.to_bytes(layout.HEADER_BYTES, "big") + bytes((layout.FOOTER,)) + number
    yield from rest


def _page_records(run: PageRun, name: bytes) -> memoryview:
    array = np.empty(len(name) + len(run.pages) * layout.PAGE_RECORD_BYTES, np.uint8)
    records = array[len(name) :].reshape(len(run.pages), layout.PAGE_RECORD_BYTES)
    records[:, layout.HEADER_BYTES :] = run.data
    return _with_headers(array, records, run.pages, layout.PAGE, name)


def _fill_records(run: FillRun, name: bytes) -> memoryview:
    array = np.empty(len(name) + len(run.pages) * layout.ZERO_RECORD_BYTES, np.uint8)
    records = array[len(name) :].reshape(len(run.pages), layout.ZERO_RECORD_BYTES)
    records[:, layout.HEADER_BYTES] = run.fill
    return _with_headers(array, records, run.pages, layout.ZERO, name)


def _with_headers(
    array: NDArray[np.uint8],
    records: NDArray[np.uint8],
    pages: NDArray[np.int64],
    flags: int,
    name: bytes,
) -> memoryview:
    headers = records[:, : layout.HEADER_BYTES].view(">i8")[:, 0]
    headers[:] = (pages << layout.PAGE_SHIFT) | (flags | layout.CONTINUE)
    if name:
        first = (int(pages[0]) << layout.PAGE_SHIFT | flags).to_bytes(layout.HEADER_BYTES, "big") + name
        array[: len(first)] = np.frombuffer(first, np.uint8)
    return array.data
