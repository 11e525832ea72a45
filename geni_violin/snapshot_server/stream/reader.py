"""Bytes to events.

Theory of operation. The reader is always in one of these states, each a method that takes what it can of a buffer:

.. code-block:: text

    preamble -> section <-> records -> footer -> section
                section -> tail
    any of them -> opaque

What cannot be taken because its end is not there yet is shorter than :data:`~.layout.ITEM_BYTES`. It is *carried*:
the next buffer's beginning is put behind it, that is taken, and then the rest of the buffer where it lies. Thus no
buffer is copied as a whole, and pages are copied once, from the buffer into their event.

What the reader holds between two calls: a preamble (1.1 MiB at most) or a run of pages and fills (1.5 MiB), the carried
bytes, and the tail (16 MiB at most).
What a call gives out is about as long as what it was fed. In the worst case it is an event for each record of nine
bytes: pages that are each full of another byte than the one before. So what is fed at once should have a bound too.
"""

from collections.abc import Callable

from geni_violin.core.errors import InvalidInput
from geni_violin.snapshot_server.stream import layout
from geni_violin.snapshot_server.stream.ending import check_ending, check_no_end
from geni_violin.snapshot_server.stream.events import Event, Opaque, Preamble, Tail
from geni_violin.snapshot_server.stream.preamble import NotUnderstood, PreambleParser, check_section_id
from geni_violin.snapshot_server.stream.records import Records

_State = Callable[[memoryview, int], int]


class StreamReader:
    """Reads one stream. After an error it is of no more use.

    :ivar taken_bytes: how many bytes it was fed.
    """

    def __init__(self) -> None:
        self.taken_bytes = 0
        self._events: list[Event] = []
        self._state: _State = self._in_preamble
        self._carried = b""
        self._parser = PreambleParser()
        self._records = Records(())
        self._section_id = 0
        self._section_type = layout.PART
        self._tail = bytearray()
        self._reason = ""

    def feed(self, data: bytes | bytearray | memoryview) -> list[Event]:
        """The next bytes, in any portions, large ones best (1 MiB); what they complete.

        ``data`` may be reused when this returns: all that is given out is a copy.

        :raise InvalidInput: the stream contradicts itself, or goes on after its end.
        """
        view = memoryview(data).cast("B")
        self.taken_bytes += len(view)
        start = 0
        if self._carried:
            joined = self._carried + view[: layout.ITEM_BYTES]
            used = self._advance(memoryview(joined))
            if used == 0:  # all of the view is in it: with so many bytes more, something would have been complete
                self._carried = joined
                return self._given_out()
            start = used - len(self._carried)
        used = start + self._advance(view[start:])
        self._carried = bytes(view[used:])
        return self._given_out()

    def finish(self) -> list[Event]:
        """There are no more bytes; what that completes.

        :raise InvalidInput: the stream broke off, or went on after its end.
        """
        if self._state == self._in_preamble and not self._parser.could_be_a_stream():
            self._leave("it does not begin with a migration stream's magic number")
        elif self._state == self._in_tail:
            check_ending(self._tail)
            self._events.append(Tail(bytes(self._tail)))
        elif self._state != self._opaque:
            raise InvalidInput(
                f"the stream broke off after {self.taken_bytes} bytes, {self._where()}",
                "expected the state of the devices at its end",
            )
        return self._given_out()

    def _where(self) -> str:
        return "before its first page" if self._state == self._in_preamble else "in the guest's memory"

    def _given_out(self) -> list[Event]:
        events = self._events
        self._events = []
        return events

    def _advance(self, view: memoryview) -> int:
        """Take what is complete; how many bytes that is."""
        position = 0
        while position < len(view):
            state = self._state
            try:
                used = state(view, position)
            except NotUnderstood as unknown:
                used = unknown.position
                self._leave(unknown.reason)
            if used == position and self._state == state:
                break
            position = used
        self._collect()
        return position

    def _collect(self) -> None:
        self._events += self._records.batch.events
        self._records.batch.events.clear()

    # --- states -------------------------------------------------------------------------------------------------------

    def _in_preamble(self, view: memoryview, position: int) -> int:
        try:
            used, preamble = self._parser.take(view[position:])
        except NotUnderstood as unknown:
            unknown.position += position
            raise
        if preamble is not None:
            self._begin(preamble)
        return position + used

    def _begin(self, preamble: Preamble) -> None:
        self._events.append(preamble)
        self._section_id = preamble.section_id
        self._records = Records(preamble.blocks)
        self._state = self._at_section

    def _at_section(self, view: memoryview, position: int) -> int:
        kind = view[position]
        if kind in (layout.PART, layout.END):
            return self._header(view, position, kind, self._in_records)
        if kind == layout.EOF or (kind == layout.FULL and self._records.block is not None):
            self._flush()
            self._state = self._in_tail
            return position
        # A device before the first page is one that QEMU sends early; RAM follows, at a place that nothing tells.
        raise NotUnderstood(f"a section of type {kind} among those of RAM", position)

    def _in_records(self, view: memoryview, position: int) -> int:
        position = self._records.take(view, position)
        if self._records.ended:
            self._state = self._at_footer
        return position

    def _at_footer(self, view: memoryview, position: int) -> int:
        if view[position] != layout.FOOTER:
            raise InvalidInput(f"RAM's section goes on with the byte {view[position]:#x} after its end")
        return self._header(view, position, layout.FOOTER, self._at_section)

    def _header(self, view: memoryview, position: int, kind: int, state: _State) -> int:
        """A section's header or footer."""
        end = position + layout.SECTION_BYTES
        if end > len(view):
            return position
        check_section_id(int.from_bytes(view[position + 1 : end], "big"), self._section_id)
        self._section_type, self._state = kind, state
        return end

    def _in_tail(self, view: memoryview, position: int) -> int:
        self._tail += view[position:]
        if len(self._tail) > layout.TAIL_BYTES:
            check_no_end(self._tail)
            raise NotUnderstood(f"there is more than {layout.TAIL_BYTES} bytes of device state", len(view))
        return len(view)

    def _opaque(self, view: memoryview, position: int) -> int:
        self._events.append(Opaque(bytes(view[position:]), self._reason))
        return len(view)

    def _flush(self) -> None:
        self._records.batch.flush()
        self._collect()

    def _leave(self, reason: str) -> None:
        """Leave what is understood: bring the receiving QEMU to where the rest can follow."""
        self._flush()
        self._reason = reason
        if self._state == self._in_preamble:
            rest = bytes(self._parser.data)
        elif self._state == self._in_tail:
            rest = bytes(self._tail)
            self._tail.clear()
        else:
            rest = self._reopened()
        self._state = self._opaque
        if rest:
            self._events.append(Opaque(rest, reason))

    def _reopened(self) -> bytes:
        number = self._section_id.to_bytes(4, "big")
        record = self._records.reopening()
        if self._state == self._in_records:
            return bytes((self._section_type,)) + number + record
        if not record:
            return b""
        end = layout.EOS.to_bytes(layout.HEADER_BYTES, "big") + bytes((layout.FOOTER,)) + number
        return bytes((layout.PART,)) + number + record + end
