"""QEMU's numbers, and the limits that this package sets.

From QEMU's documentation (docs/devel/migration: the stream's structure) and ``scripts/analyze-migration.py``. All
numbers in a stream are big-endian::

    stream    magic, version, [CONFIGURATION], section ..., EOF, [VMDESCRIPTION be32 length, JSON]
    section   START be32 id, len8 name, be32 instance, be32 version, content, [footer]
              PART | END be32 id, content, [footer]
              FULL as START; COMMAND be16 what, be16 length, content
    footer    0x7e be32 id
    RAM       be64 offset | flags, and by the flags:
              MEM_SIZE  the offset is all blocks' length; per block: len8 name, be64 length
              ZERO      the name of the block unless CONTINUE; the byte that the page is full of
              PAGE      the name of the block unless CONTINUE; 4096 bytes
              EOS       the content ends here
"""

MAGIC = b"QEVM\0\0\0\3"
"""The first 8 bytes: magic and version 3, the only one since QEMU 0.9."""

EOF, START, PART, END, FULL, VM_DESCRIPTION, CONFIGURATION, COMMAND = 0, 1, 2, 3, 4, 6, 7, 8
SUBSECTION = 5
FOOTER = 0x7E
FOOTER_BYTES = 5

ZERO, MEM_SIZE, PAGE, EOS, CONTINUE = 0x02, 0x04, 0x08, 0x10, 0x20
FLAGS = 0xFFF
"""Which bits of a record's header are flags: those below the page size."""

HEADER_BYTES = 8
PAGE_RECORD_BYTES = HEADER_BYTES + 4096
"""A page of the same block as the record before."""
ZERO_RECORD_BYTES = HEADER_BYTES + 1
"""A page full of one byte, of the same block as the record before."""

# --- limits -----------------------------------------------------------------------------------------------------------

RUN_PAGES = 256
"""The most pages of one run: 1 MiB."""
RUN_FILLS = 65_536
"""The most fills of one run: 512 KiB of page numbers."""
PREAMBLE_BYTES = 1 << 20
"""The longest preamble; those of QEMU have a few hundred bytes."""
BLOCKS = 4_096
"""The most RAM blocks: QEMU has one for each memory slot, ROM and video card."""
RAM_BYTES = 1 << 46
"""The most guest memory: 64 TiB."""
TAIL_BYTES = 16 << 20
"""The longest state of devices that is kept in one piece; of the guests seen it has 30 to 200 KiB."""
