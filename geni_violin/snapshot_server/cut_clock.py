"""The guest's clock at its cut, read from its image. Pure: it is given the end of a stream.

Theory of operation. Where a VM is stopped QEMU freezes its virtual clock (``QEMU_CLOCK_VIRTUAL``), and keeps the value
in the device state named ``timer``. In a migration stream device state comes after the memory, each device in a section
of its own (QEMU, docs/devel/migration, "Stream structure"), all numbers big-endian; ``timer`` in version 2, without the
subsection that only deterministic instruction counting (icount) adds::

    04 | section id (4) | 05 "timer" | instance (4) = 0 | version (4) = 2 |
    ticks offset (8) | unused (8) = 0 | clock (8), in ns | 7e | section id (4)

``mininet_tests/test_cut_clock.py`` compares it with the clock that QEMU itself stamps frames with. The same bytes may
be in the guest's memory, as in a guest that keeps streams of others; so the last ones count.
"""

import re

TAIL_BYTES = 16 << 20
"""How much of a stream's end is looked at. Device state is some 160 KB for a small VM, and 10 KB more for each CPU."""

_SECTION = re.compile(rb"\x04(?P<id>.{4})\x05timer\0{4}\0\0\0\x02.{8}\0{8}(?P<clock>.{8})\x7e(?P=id)", re.DOTALL)


def clock_at_stop_ns(tail: bytes) -> int | None:
    """The guest's clock when it was stopped, in nanoseconds; None if it is not there.

    :param tail: the last :data:`TAIL_BYTES` of the stream, or all of a shorter one.
    """
    clocks = [found["clock"] for found in _SECTION.finditer(tail)]
    return int.from_bytes(clocks[-1], "big", signed=True) if clocks else None
