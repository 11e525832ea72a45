"""The index and the packs' frame tables in one local file, so that a start need not ask each pack.

::

    MAGIC | header's length | header (JSON) | frame tables | keys | rest | places | BLAKE3 of all before

It is a copy of what the packs say, and may be lost, damaged or out of date at any time: a file that is not whole is as
good as none, packs that it does not have are read themselves, and of packs that are gone it is not believed. It is
mapped, not read, so that the kernel decides what of it is in memory.
"""

import itertools
import json
import mmap
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from blake3 import blake3

from geni_violin.runtime.processes import sync_folder
from geni_violin.snapshot_server.pages.catalog import Catalog, Pack
from geni_violin.snapshot_server.pages.index import Segment
from geni_violin.snapshot_server.pages.pack_format import FRAME
from geni_violin.snapshot_server.records import PARTIAL_SUFFIX

MAGIC = b"GVINDX\0\1"
_LENGTH = struct.Struct("<I")
_CHECKSUM_BYTES = 32
_ENTRY_BYTES = 40


def save(catalog: Catalog, path: Path) -> None:
    """Keep the index as it is.

    :raise OSError: the disk failed; there may be a part of a file.
    """
    with catalog.lock:
        segment = catalog.index.whole()
        packs = list(catalog.packs.values())
    rows = [[pack.number, pack.id, pack.size_bytes, pack.items, len(pack.frames)] for pack in packs]
    text = json.dumps({"packs": rows, "entries": len(segment.keys)}).encode()
    text += b" " * (-(len(MAGIC) + _LENGTH.size + len(text)) % 8)  # so that numbers are where numbers may be
    frames = b"".join(pack.frames.tobytes() for pack in packs)
    parts = [MAGIC, _LENGTH.pack(len(text)), text, frames, bytes(-len(frames) % 8)]
    arrays = (segment.keys, segment.rest, segment.places)
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    _write(partial, itertools.chain(parts, (array.view(np.uint8).data.cast("B") for array in arrays if array.size)))
    partial.replace(path)
    sync_folder(path.parent)


def _write(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    checksum = blake3()
    with path.open("wb", buffering=0) as file:
        for part in parts:
            checksum.update(part)
            rest = memoryview(part)
            while rest:
                rest = rest[file.write(rest) :]
        file.write(checksum.digest())
        os.fsync(file.fileno())


def load(catalog: Catalog, path: Path, sizes: Mapping[str, int]) -> None:
    """Fill an empty catalog with what the file has of packs that there are.

    :param sizes: by id, the packs that there are, and their sizes in bytes.
    """
    try:
        with path.open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        if bytes(data[: len(MAGIC)]) != MAGIC or blake3(data[:-_CHECKSUM_BYTES]).digest() != data[-_CHECKSUM_BYTES:]:
            return
        _fill(catalog, data, sizes)
    except (OSError, ValueError, KeyError, struct.error):
        return  # as good as none


def _fill(catalog: Catalog, data: memoryview, sizes: Mapping[str, int]) -> None:
    (length,) = _LENGTH.unpack_from(data, len(MAGIC))
    at = len(MAGIC) + _LENGTH.size
    header = json.loads(bytes(data[at : at + length]))
    at += length
    found = []
    for number, pack_id, size_bytes, items, frames in header["packs"]:
        table = np.frombuffer(data, FRAME, frames, at)
        at += table.nbytes
        if sizes.get(pack_id) == size_bytes:
            found.append(Pack(number, pack_id, table, items, size_bytes))
    at += -sum(row[4] * FRAME.itemsize for row in header["packs"]) % 8
    entries = header["entries"]
    if at + entries * _ENTRY_BYTES + _CHECKSUM_BYTES != len(data):
        raise ValueError("it has not the size that it should have")
    words = np.frombuffer(data, "<u8", entries * 5, at)
    segment = Segment(words[:entries], words[entries : 4 * entries].reshape(-1, 3), words[4 * entries :])
    catalog.load(found, max((row[0] for row in header["packs"]), default=0), segment)
