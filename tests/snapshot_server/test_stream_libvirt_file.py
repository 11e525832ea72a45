"""The header of ``virsh save``: its bytes, and what is refused of one."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geni_violin.core.errors import InvalidInput
from geni_violin.snapshot_server.stream.libvirt_file import (
    HEADER_BYTES,
    XML_BYTES,
    SavedDomain,
    decode_header,
    encode_header,
)

_DOMAIN = SavedDomain("<domain type='qemu'/>", was_running=True)


def test_the_bytes_are_libvirts() -> None:
    data = encode_header(_DOMAIN)
    assert data[:16] == b"LibvirtQemudSave"
    assert data[16:36] == bytes((2, 0, 0, 0, 22, 0, 0, 0, 1, 0, 0, 0)) + bytes(8)
    assert data[36:92] == bytes(56)
    assert data[92:] == b"<domain type='qemu'/>\0"
    assert HEADER_BYTES == 92


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0")), st.booleans(), st.binary())
def test_what_is_encoded_is_decoded(xml: str, was_running: bool, stream: bytes) -> None:
    data = encode_header(SavedDomain(xml, was_running)) + stream
    domain, start = decode_header(data)
    assert domain == SavedDomain(xml, was_running)
    assert data[start:] == stream


@pytest.mark.parametrize("xml", ["a\0b", "x" * XML_BYTES], ids=["with a NUL", "too long"])
def test_a_domain_that_cannot_be_saved_is_refused(xml: str) -> None:
    with pytest.raises(InvalidInput, match="cannot be saved"):
        encode_header(SavedDomain(xml, was_running=False))


def changed(place: int, value: int) -> bytes:
    data = bytearray(encode_header(_DOMAIN))
    struct.pack_into("<I", data, place, value)
    return bytes(data) + b"QEVM"


HOSTILE = {
    "short": (b"LibvirtQemudSave", "16 bytes"),
    "another magic": (b"LibvirtQemudPart" + encode_header(_DOMAIN)[16:], "no file of virsh save"),
    "version 3": (changed(16, 3), "no file of virsh save"),
    "compressed": (changed(28, 1), "no file of virsh save"),
    "with a cookie": (changed(32, 92), "no file of virsh save"),
    "longer than the file": (changed(20, 1_000), "has not the 1000 bytes"),
    "absurdly long": (changed(20, 0xFFFF_FFFF), "has not the 4294967295 bytes"),
    "without its NUL": (changed(20, 21), "has not the 21 bytes"),
    "nothing": (changed(20, 0), "has not the 0 bytes"),
    "no text": (encode_header(_DOMAIN).replace(b"qemu", b"\xff\xff\xff\xff"), "no text"),
}


@pytest.mark.parametrize(("data", "words"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_header_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        decode_header(data)
