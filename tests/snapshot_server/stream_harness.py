"""Migration streams made by hand, and what QEMU would load from one: slow, plain, and apart from the tested code.

Beside the records that the reader knows, :class:`Loader` knows one more, as a stand-in for all that it does not: a
*patch* changes some bytes of a page, so it builds on what was loaded before, and on the block of the record before.
"""

import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from geni_violin.snapshot_server.stream.events import Event, FillRun, PageRun, Preamble, RamBlock, Tail
from geni_violin.snapshot_server.stream.reader import StreamReader
from geni_violin.snapshot_server.stream.writer import write_stream

ZERO, MEM_SIZE, PAGE, EOS, CONTINUE, PATCH = 0x02, 0x04, 0x08, 0x10, 0x20, 0x40
PAGE_BYTES = 4096
SECTION_ID = 2
BLOCKS = (RamBlock("pc.ram", 600 * PAGE_BYTES), RamBlock("/rom@etc/acpi/tables", 2 * PAGE_BYTES))

Memory = dict[tuple[str, int], bytes]
"""What each page is full of, by the name of its block and its number. Pages that never came are not there."""


@dataclass(frozen=True)
class Record:
    """A page in a stream: its bytes, or the one byte that it is full of, or a patch of its beginning."""

    block: int
    page: int
    content: bytes | int
    patch: bool = False


def page_of(seed: int) -> bytes:
    """A page that is not full of one byte, and has headers of records in it."""
    return (struct.pack(">QQ", seed << 12 | PAGE | CONTINUE, seed << 12 | ZERO | CONTINUE) * 256)[:PAGE_BYTES]


# --- making -----------------------------------------------------------------------------------------------------------


def name_of(text: str) -> bytes:
    return bytes((len(text),)) + text.encode()


def opening(machine: str = "pc-i440fx-7.2") -> bytes:
    """Header and configuration."""
    return b"QEVM\0\0\0\3" + b"\x07" + struct.pack(">I", len(machine)) + machine.encode()


def setup(blocks: Sequence[RamBlock] = BLOCKS, total: int | None = None, section_id: int = SECTION_ID) -> bytes:
    """The section that sets RAM up."""
    size = sum(block.length_bytes for block in blocks) if total is None else total
    listed = b"".join(name_of(block.name) + struct.pack(">Q", block.length_bytes) for block in blocks)
    content = struct.pack(">Q", size | MEM_SIZE) + listed + struct.pack(">Q", EOS)
    return (
        b"\x01"
        + struct.pack(">I", section_id)
        + name_of("ram")
        + struct.pack(">II", 0, 4)
        + content
        + footer(section_id)
    )


def footer(section_id: int = SECTION_ID) -> bytes:
    return b"\x7e" + struct.pack(">I", section_id)


def section(content: bytes, kind: int = 2, section_id: int = SECTION_ID) -> bytes:
    """A section of records that goes on or ends RAM."""
    number = struct.pack(">I", section_id)
    return bytes((kind,)) + number + content + struct.pack(">Q", EOS) + footer(section_id)


@dataclass
class Recorder:
    """Writes records as QEMU does: a block's name only where it changes, also across sections."""

    blocks: Sequence[RamBlock] = BLOCKS
    _block: int | None = field(default=None, init=False)

    def bytes_of(self, records: Iterable[Record]) -> bytes:
        return b"".join(map(self._one, records))

    def _one(self, record: Record) -> bytes:
        name = b"" if record.block == self._block else name_of(self.blocks[record.block].name)
        self._block = record.block
        flags = 0 if name else CONTINUE
        if record.patch:
            assert isinstance(record.content, bytes)
            flags, data = flags | PATCH, bytes((len(record.content),)) + record.content
        elif isinstance(record.content, int):
            flags, data = flags | ZERO, bytes((record.content,))
        else:
            flags, data = flags | PAGE, record.content
        return struct.pack(">Q", record.page << 12 | flags) + name + data


def devices(state: bytes = b"state of a device") -> bytes:
    """A section of a device, the end, and QEMU's description."""
    text = json.dumps({"page_size": PAGE_BYTES, "devices": [{"name": "timer"}]}).encode()
    one = b"\x04" + struct.pack(">I", 7) + name_of("timer") + struct.pack(">II", 0, 2) + state + footer(7)
    return one + b"\0" + b"\x06" + struct.pack(">I", len(text)) + text


def stream_of(sections: Iterable[Sequence[Record]], tail: bytes | None = None) -> bytes:
    """A whole stream."""
    recorder = Recorder()
    parts = b"".join(section(recorder.bytes_of(records)) for records in sections)
    return opening() + setup() + parts + (devices() if tail is None else tail)


# --- loading ----------------------------------------------------------------------------------------------------------


class Loader:
    """Loads a stream record by record.

    :ivar memory: the pages.
    :ivar rest: all bytes behind RAM's last section.
    """

    def __init__(self, stream: bytes) -> None:
        self.memory: Memory = {}
        self._data, self._at = stream, 0
        self._name = ""
        assert self._take(8) == b"QEVM\0\0\0\3"
        if self._data[self._at] == 7:
            self._at += 1
            self._take(self._number(4))
        while self._data[self._at : self._at + 1] in (b"\1", b"\2", b"\3"):
            self._section(self._number(1))
        self.rest = self._data[self._at :]

    def _take(self, length: int) -> bytes:
        piece = self._data[self._at : self._at + length]
        assert len(piece) == length, "the stream is cut short"
        self._at += length
        return piece

    def _number(self, length: int) -> int:
        return int.from_bytes(self._take(length), "big")

    def _text(self) -> str:
        return self._take(self._number(1)).decode()

    def _section(self, kind: int) -> None:
        number = self._take(4)
        if kind == 1:
            self._text()
            self._take(8)
        while (header := self._number(8)) != EOS:
            self._record(header & 0xFFF, header >> 12)
        assert self._take(5) == b"\x7e" + number

    def _record(self, flags: int, page: int) -> None:
        if flags == MEM_SIZE:
            left = page << 12
            while left:
                self._text()
                left -= self._number(8)
            return
        if not flags & CONTINUE:
            self._name = self._text()
        assert self._name, "a record goes on with a block, but there was none"
        key = (self._name, page)
        match flags & ~CONTINUE:
            case 0x02:
                self.memory[key] = self._take(1) * PAGE_BYTES
            case 0x08:
                self.memory[key] = self._take(PAGE_BYTES)
            case 0x40:
                piece = self._take(self._number(1))
                self.memory[key] = piece + self.memory[key][len(piece) :]
            case _:
                raise AssertionError(f"flags {flags:#x}")


# --- reading and writing ----------------------------------------------------------------------------------------------


def pieces_of(stream: bytes, sizes: Iterable[int]) -> Iterator[bytes]:
    """The stream in pieces of these sizes, again and again."""
    at = 0
    while at < len(stream):
        for size in sizes:
            yield stream[at : at + size]
            at += size


def read(stream: bytes, sizes: Sequence[int] = (1 << 20,)) -> list[Event]:
    """All events, fed from one buffer that is overwritten each time, as the server's is."""
    reader = StreamReader()
    events: list[Event] = []
    for piece in pieces_of(stream, sizes):
        buffer = bytearray(piece)
        events += reader.feed(memoryview(buffer))
        buffer[:] = b"\xa5" * len(buffer)
    return events + reader.finish()


def plain(events: Iterable[Event]) -> list[tuple[object, ...]]:
    """Events as values that can be compared; opaque pieces as one, because their number is that of the portions."""
    values: list[tuple[object, ...]] = []
    opaque = b""
    for event in events:
        match event:
            case PageRun():
                values.append(("pages", event.block, event.pages.tolist(), event.data.tobytes()))
            case FillRun():
                values.append(("fills", event.block, event.pages.tolist(), event.fill))
            case Preamble() | Tail():
                values.append((event,))
            case _:
                opaque += event.data
    return [*values, ("opaque", opaque)] if opaque else values


def memory_of(events: Iterable[Event]) -> Memory:
    """What the runs amount to."""
    memory: Memory = {}
    blocks: tuple[RamBlock, ...] = ()
    for event in events:
        match event:
            case Preamble():
                blocks = event.blocks
            case PageRun():
                for page, row in zip(event.pages.tolist(), event.data, strict=True):
                    memory[blocks[event.block].name, page] = row.tobytes()
            case FillRun():
                for page in event.pages.tolist():
                    memory[blocks[event.block].name, page] = bytes((event.fill,)) * PAGE_BYTES
            case _:
                pass
    return memory


def rewritten(events: Sequence[Event]) -> bytes:
    """The stream that the writer makes of these events."""
    preamble = events[0]
    if not isinstance(preamble, Preamble):
        return b"".join(rest_of(events))
    runs = [event for event in events if isinstance(event, PageRun | FillRun)]
    return b"".join(write_stream(preamble, runs, rest_of(events)))


def rest_of(events: Iterable[Event]) -> list[bytes]:
    """What follows the pages."""
    return [event.data for event in events if not isinstance(event, Preamble | PageRun | FillRun)]
