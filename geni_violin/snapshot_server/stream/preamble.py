"""Everything before the first page: header, configuration, and the setup of RAM.

Theory of operation. The grammar is a generator that yields how many bytes it wants next and is sent exactly these. So
it reads like a parser of whole files, yet stops wherever the bytes do; who drives it keeps the bytes. It never wants
more than :data:`~.layout.MACHINE_NAME_BYTES` at a time.
"""

import struct
from collections.abc import Generator

from geni_violin.core.errors import InvalidInput
from geni_violin.snapshot_server.stream import layout
from geni_violin.snapshot_server.stream.events import PAGE_BYTES, Preamble, RamBlock

_RAM, _RAM_VERSION = b"ram", 4


class NotUnderstood(Exception):
    """The stream is of a form that this package does not know.

    :ivar reason: what was not understood, in words for people.
    :ivar position: where, in the buffer that was to be taken.
    """

    def __init__(self, reason: str, position: int = 0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.position = position


class PreambleParser:
    """Takes a preamble in any portions.

    :ivar data: all bytes taken so far.
    """

    def __init__(self) -> None:
        self.data = bytearray()
        self._blocks: list[RamBlock] = []
        self._section_id = 0
        self._grammar = self._stream()
        self._end_of_wanted = next(self._grammar)
        self._start_of_wanted = 0

    def take(self, view: memoryview) -> tuple[int, Preamble | None]:
        """The next bytes: how many of them are of the preamble, and the preamble if they end it.

        :raise NotUnderstood: it is of an unknown form; all bytes up to there are in :attr:`data`.
        :raise InvalidInput: it contradicts itself.
        """
        used = 0
        while used < len(view):
            portion = view[used : used + self._end_of_wanted - len(self.data)]
            self.data += portion
            used += len(portion)
            if len(self.data) < self._end_of_wanted:
                break
            wanted = bytes(self.data[self._start_of_wanted :])
            self._start_of_wanted = len(self.data)
            try:
                self._end_of_wanted += self._grammar.send(wanted)
            except StopIteration:
                return used, Preamble(bytes(self.data), tuple(self._blocks), self._section_id)
            except NotUnderstood as unknown:
                unknown.position = used
                raise
        return used, None

    def could_be_a_stream(self) -> bool:
        """Whether the bytes so far could begin a stream that is understood."""
        return layout.MAGIC.startswith(self.data[: len(layout.MAGIC)])

    # --- the grammar --------------------------------------------------------------------------------------------------

    def _stream(self) -> Generator[int, bytes, None]:
        if (yield len(layout.MAGIC)) != layout.MAGIC:
            raise NotUnderstood("it does not begin with the magic number and version 3 of a migration stream")
        kind = yield from _number(1)
        if kind == layout.CONFIGURATION:
            yield from _configuration()
            kind = yield from _number(1)
        if kind != layout.START:
            raise NotUnderstood(f"section type {kind} before the setup of RAM")
        yield from self._ram_section()

    def _ram_section(self) -> Generator[int, bytes, None]:
        self._section_id = yield from _number(4)
        name = yield from _name()
        instance, version = struct.unpack(">II", (yield 8))
        if (name, instance, version) != (_RAM, 0, _RAM_VERSION):
            raise NotUnderstood(f"section {name!r} of version {version} at the place of RAM's")
        yield from self._block_list()
        if (yield layout.HEADER_BYTES) != layout.EOS.to_bytes(layout.HEADER_BYTES, "big"):
            raise NotUnderstood("RAM's setup has more than a list of blocks")
        if (yield 1) != bytes((layout.FOOTER,)):
            raise NotUnderstood("sections have no footers")
        check_section_id((yield from _number(4)), self._section_id)

    def _block_list(self) -> Generator[int, bytes, None]:
        header = yield from _number(layout.HEADER_BYTES)
        if header & layout.FLAGS != layout.MEM_SIZE:
            raise NotUnderstood("RAM's setup does not begin with the size of memory")
        rest = header - layout.MEM_SIZE
        if not 0 < rest <= layout.RAM_BYTES:
            raise InvalidInput(f"the stream is of {rest} bytes of RAM", f"expected 1 to {layout.RAM_BYTES}")
        names: set[bytes] = set()
        while rest > 0:
            name = yield from _name()
            length = yield from _number(8)
            if name in names or not name or not name.isascii() or len(names) == layout.BLOCKS:
                raise InvalidInput(f"the stream lists RAM block {name!r} as number {len(names) + 1}", _BLOCKS_HINT)
            if length % PAGE_BYTES or not 0 < length <= rest:
                raise InvalidInput(f"RAM block {name.decode()} has {length} bytes, of {rest} that are left", _SIZE_HINT)
            names.add(name)
            self._blocks.append(RamBlock(name.decode(), length))
            rest -= length


_BLOCKS_HINT = f"expected at most {layout.BLOCKS} blocks with different names"
_SIZE_HINT = f"expected whole pages of {PAGE_BYTES} bytes, and as many in all blocks as the stream says"


def parse_preamble(data: bytes) -> Preamble:
    """The preamble of these bytes, which must be no more and no less; what was once given out is taken.

    :raise InvalidInput: it is none.
    """
    try:
        used, preamble = PreambleParser().take(memoryview(data))
    except NotUnderstood as error:
        raise InvalidInput(f"this is no preamble of a migration stream: {error}") from error
    if preamble is None or used != len(data):
        raise InvalidInput(f"the preamble of a migration stream does not end with its {len(data)} bytes")
    return preamble


def check_section_id(seen: int, expected: int) -> None:
    """Check the number in a header or footer of the RAM section.

    :raise InvalidInput: it is another one's.
    """
    if seen != expected:
        raise InvalidInput(f"a section of the stream has the number {seen}", f"expected RAM's, {expected}")


def _configuration() -> Generator[int, bytes, None]:
    """The machine type. Subsections behind it, as of unusual page sizes, make the next section type unknown."""
    length = yield from _number(4)
    if not 0 < length <= layout.MACHINE_NAME_BYTES:
        raise InvalidInput(
            f"the name of the stream's machine type has {length} bytes", f"expected 1 to {layout.MACHINE_NAME_BYTES}"
        )
    yield length


def _number(length_bytes: int) -> Generator[int, bytes, int]:
    return int.from_bytes((yield length_bytes), "big")


def _name() -> Generator[int, bytes, bytes]:
    length = yield from _number(1)
    return (yield length) if length else b""
