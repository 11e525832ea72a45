"""Packs, maps and documents, byte for byte: what was written is read, and nothing else is believed."""

import struct

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from geni_violin.core.errors import MachineFault
from geni_violin.core.messages import ChannelSummary
from geni_violin.snapshot_server.pages.channel_states import Seal, StoredChannel
from geni_violin.snapshot_server.pages.digests import as_array, item_digest
from geni_violin.snapshot_server.pages.documents import decode_document, encode_document
from geni_violin.snapshot_server.pages.image_map import (
    FILL,
    PAGE,
    PIECE_BYTES,
    ImageMap,
    Pieces,
    decode_map,
    encode_map,
    piece_lengths,
    root_of,
)
from geni_violin.snapshot_server.pages.pack_builder import PackBuilder, new_buffer
from geni_violin.snapshot_server.pages.pack_format import (
    END_MAGIC,
    FRAME,
    TRAILER_BYTES,
    decode_tables,
    encode_tables,
    tables_place,
)
from geni_violin.snapshot_server.stream.events import RamBlock


def _digest(number: int) -> bytes:
    return blake3(number.to_bytes(8, "big")).digest()


def _pack(frames: list[tuple[bytes, int, int]]) -> bytes:
    builder = PackBuilder(new_buffer())
    for frame, item_bytes, items in frames:
        builder.append(frame, item_digest(frame), item_bytes, [_digest(number) for number in range(items)])
    return bytes(builder.finish()[0])


_FRAMES = st.lists(st.tuples(st.binary(min_size=1, max_size=50), st.just(4096), st.integers(1, 5)), max_size=6)


@given(_FRAMES)
def test_a_packs_tables_are_read(frames: list[tuple[bytes, int, int]]) -> None:
    data = _pack(frames)
    offset, length = tables_place(data[-TRAILER_BYTES:], len(data), "it")
    assert offset + length == len(data)
    table = decode_tables(data[offset:], offset, "it")
    assert [data[row["offset"] : row["offset"] + row["length"]] for row in table.frames] == [one[0] for one in frames]
    assert [int(row["items"]) for row in table.frames] == [one[2] for one in frames]
    assert table.digests.tobytes() == b"".join(_digest(number) for one in frames for number in range(one[2]))


@given(_FRAMES, st.data())
def test_no_flipped_bit_of_the_tables_is_believed(frames: list[tuple[bytes, int, int]], data: st.DataObject) -> None:
    pack = bytearray(_pack(frames))
    offset, _length = tables_place(bytes(pack[-TRAILER_BYTES:]), len(pack), "it")
    bit = data.draw(st.integers(8 * offset, 8 * len(pack) - 1))
    pack[bit // 8] ^= 1 << bit % 8
    with pytest.raises(MachineFault, match="it is damaged"):
        place = tables_place(bytes(pack[-TRAILER_BYTES:]), len(pack), "it")
        decode_tables(bytes(pack[place[0] :]), place[0], "it")


@pytest.mark.parametrize(
    "change",
    [{"offset": 9}, {"length": 1}, {"items": 0}, {"items": 300}, {"item_bytes": 0}, {"item_bytes": 1 << 30}],
)
def test_tables_that_contradict_themselves_are_refused_whatever_their_checksum(change: dict[str, int]) -> None:
    frames = np.zeros(1, FRAME)
    frames[0] = (8, 100, 4096, 2, np.zeros(32, np.uint8))
    for name, value in change.items():
        frames[name] = value
    tables = encode_tables(frames, _digest(1) + _digest(2), 108)
    assert tables[-8:] == END_MAGIC
    with pytest.raises(MachineFault, match="contradict"):
        decode_tables(tables, 108, "it")


_BLOCKS = st.lists(st.integers(1, 40), min_size=0, max_size=3)


@st.composite
def _maps(draw: st.DrawFn) -> ImageMap:
    blocks = tuple(RamBlock(f"b{number}", pages * 4096) for number, pages in enumerate(draw(_BLOCKS)))
    pages = sum(block.pages for block in blocks)
    kinds = draw(stn.arrays(np.uint8, pages, elements=st.integers(0, 2)))
    fills = draw(stn.arrays(np.uint8, int((kinds == FILL).sum())))
    digests = as_array([_digest(number) for number in range(int((kinds == PAGE).sum()))])
    sizes = [draw(st.sampled_from([0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1])) for _ in range(2)]
    tail, opaque = (Pieces(size, tuple(map(_digest, range(len(piece_lengths(size)))))) for size in sizes)
    preamble, reason = draw(st.binary(max_size=20)), draw(st.text(max_size=20))
    counts = draw(st.integers(0, 1 << 40)), draw(st.integers(0, 1 << 40))
    return ImageMap(*counts, preamble, blocks, kinds, fills, digests, tail, opaque, reason)


@settings(deadline=None)
@given(_maps())
def test_a_map_is_read(image: ImageMap) -> None:
    data = encode_map(image)
    read = decode_map(data, "it")
    assert encode_map(read) == data
    assert (read.received_bytes, read.pack_bytes, read.reason) == (image.received_bytes, image.pack_bytes, image.reason)
    assert (read.preamble, read.blocks, read.tail, read.opaque) == (
        image.preamble,
        image.blocks,
        image.tail,
        image.opaque,
    )
    for name in ("kinds", "fills", "digests"):
        assert (getattr(read, name) == getattr(image, name)).all()
    assert root_of(data) == blake3(data[:-32]).hexdigest()


@settings(deadline=None)
@given(_maps(), st.data())
def test_no_flipped_bit_of_a_map_is_believed(image: ImageMap, data: st.DataObject) -> None:
    encoded = bytearray(encode_map(image))
    bit = data.draw(st.integers(0, 8 * len(encoded) - 1))
    encoded[bit // 8] ^= 1 << bit % 8
    with pytest.raises(MachineFault):
        decode_map(bytes(encoded), "it")


@settings(deadline=None)
@given(_maps(), st.data())
def test_a_hostile_map_is_refused_or_whole(image: ImageMap, data: st.DataObject) -> None:
    """Whoever can change a map can also give it the right checksum: then its parts still have to fit together."""
    body = bytearray(encode_map(image)[:-32])
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(8, len(body) - 1))] = data.draw(st.integers(0, 255))
    hostile = bytes(body) + blake3(bytes(body)).digest()
    try:
        read = decode_map(hostile, "it")
    except MachineFault:
        return
    assert len(read.kinds) == sum(block.pages for block in read.blocks)
    assert (read.kinds == PAGE).sum() == len(read.digests)
    assert (read.kinds == FILL).sum() == len(read.fills)
    assert len(read.tail.digests) == len(read.tail.lengths())


def test_a_map_does_not_take_the_memory_that_it_claims() -> None:
    """Compressed zeros of 16 GiB have a few bytes; the header says how much is right before any of it is taken."""
    good = encode_map(ImageMap(1, 1, b"", (), NO_BYTES, NO_BYTES, as_array([])))
    start = good.index(b"{")
    header = good[start : good.index(b"}") + 1].replace(b'"fills":0', b'"fills":9')
    rest = good[start + struct.unpack("<I", good[8:12])[0] : -32]
    body = good[:8] + struct.pack("<I", len(header)) + header + rest
    with pytest.raises(MachineFault, match="cannot be understood"):
        decode_map(body + blake3(body).digest(), "it")


NO_BYTES = np.zeros(0, np.uint8)
SEAL = Seal({"n1": "52:54:00:00:00:01"}, (StoredChannel(ChannelSummary("n1", 1, 20, note="ä"), 60, "ab" * 32),))


def test_a_document_is_read() -> None:
    assert decode_document(Seal, "seal", encode_document("seal", SEAL), "it") == SEAL


def test_no_flipped_bit_of_a_document_is_believed() -> None:
    data = encode_document("seal", SEAL)
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(MachineFault):
            decode_document(Seal, "seal", bytes(flipped), "it")


@pytest.mark.parametrize("data", [b"", b"[]", b"3", b'{"seal":3}', b'{"seal":[]}', b"[" * 100_000])
def test_what_is_no_document_is_refused(data: bytes) -> None:
    with pytest.raises(MachineFault, match="cannot be read"):
        decode_document(Seal, "seal", data, "it", version=1)
