"""QEMU's numbers, and the limits that this package sets.

From QEMU's documentation (docs/devel/migration, "Stream structure") and ``scripts/analyze-migration.py``. All numbers
in a stream are big-endian::

    stream    magic, version, [CONFIGURATION be32 length, name], section ..., EOF, [VM_DESCRIPTION be32 length, JSON]
    section   START be32 id, len8 name, be32 instance, be32 version, content, footer
              PART | END be32 id, content, footer
              FULL as START
              COMMAND be16 what, be16 length, content
    footer    FOOTER be32 id
    RAM       records, each be64 offset | flags, and by the flags:
              MEM_SIZE  the offset is all blocks' length; until it is used up: len8 name, be64 length
              ZERO      the name of the block unless CONTINUE; the byte that the page is full of
              PAGE      the name of the block unless CONTINUE; 4096 bytes
              EOS       the content ends here
"""

from geni_violin.snapshot_server.stream.events import PAGE_BYTES

MAGIC = b"QEVM\0\0\0\3"
"""The first 8 bytes: the magic, and version 3."""

EOF, START, PART, END, FULL, SUBSECTION, VM_DESCRIPTION, CONFIGURATION, COMMAND = range(9)
FOOTER = 0x7E
SECTION_BYTES = 5
"""The header of a PART or END section, and a footer: a type and the section's number."""

ZERO, MEM_SIZE, PAGE, EOS, CONTINUE = 0x02, 0x04, 0x08, 0x10, 0x20
FLAGS = PAGE_BYTES - 1
"""Which bits of a record's header are flags: those below the page size."""
PAGE_SHIFT = 12
"""The others are the page's number, shifted by so much."""

HEADER_BYTES = 8
PAGE_RECORD_BYTES = HEADER_BYTES + PAGE_BYTES
"""A page of the same block as the record before."""
ZERO_RECORD_BYTES = HEADER_BYTES + 1
"""A page full of one byte, of the same block as the record before."""
ITEM_BYTES = HEADER_BYTES + 1 + 255 + PAGE_BYTES
"""The longest piece that is understood only as a whole: a page with the name of its block."""

# --- limits -----------------------------------------------------------------------------------------------------------

RUN_PAGES = 256
"""The most pages of one run: 1 MiB."""
RUN_FILLS = 65_536
"""The most fills of one run: 512 KiB of page numbers."""
MACHINE_NAME_BYTES = 1_024
"""The longest name of a machine type."""
BLOCKS = 4_096
"""The most RAM blocks, and so the preamble is bounded: QEMU has one for each memory slot, ROM and video card."""
RAM_BYTES = 1 << 46
"""The most guest memory: 64 TiB."""
TAIL_BYTES = 16 << 20
"""The most state of devices that is kept in one piece: some 200 KB for a small VM, and 10 KB more for each CPU."""
