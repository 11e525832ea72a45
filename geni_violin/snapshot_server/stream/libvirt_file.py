"""What libvirt puts in front of a stream in a file of ``virsh save``, which ``virsh restore`` takes.

::

    "LibvirtQemudSave"       16 bytes
    version                  2
    length                   of what stands between these 92 bytes and the stream
    was running              1 or 0: whether ``virsh restore`` lets the domain run
    compression              0: none
    cookie offset            0: none
    unused                   56 bytes of 0
    domain XML, a NUL        ``length`` bytes
    migration stream         to the end of the file

The numbers are unsigned, of 32 bits, little-endian (written by libvirt in the byte order of its machine, and told apart
by the version).
"""

import struct
from dataclasses import dataclass

from geni_violin.core.errors import InvalidInput

MAGIC = b"LibvirtQemudSave"
VERSION = 2
XML_BYTES = 4 << 20
"""The longest domain XML."""

_HEADER = struct.Struct("<16sIIIII56x")
HEADER_BYTES = _HEADER.size


@dataclass(frozen=True)
class SavedDomain:
    """What stands in front of a stream.

    :ivar xml: the domain, as ``virsh dumpxml --migratable`` prints it.
    :ivar was_running: whether ``virsh restore`` lets it run.
    """

    xml: str
    was_running: bool


def encode_header(domain: SavedDomain) -> bytes:
    """The bytes in front of the stream.

    :raise InvalidInput: the XML is too long, or has a NUL.
    """
    xml = domain.xml.encode() + b"\0"
    if len(xml) > XML_BYTES or b"\0" in xml[:-1]:
        raise InvalidInput(
            f"a domain's XML of {len(xml)} bytes cannot be saved", f"expected at most {XML_BYTES}, and no NUL in it"
        )
    return _HEADER.pack(MAGIC, VERSION, len(xml), domain.was_running, 0, 0) + xml


def decode_header(data: bytes | memoryview) -> tuple[SavedDomain, int]:
    """What stands in front of a stream, and where the stream begins.

    :param data: a file's beginning, of at least :data:`HEADER_BYTES` + :data:`XML_BYTES` or the whole file.
    :raise InvalidInput: it is not of this form.
    """
    if len(data) < HEADER_BYTES:
        raise InvalidInput(f"a file of {len(data)} bytes is none of virsh save")
    magic, version, length, was_running, compression, cookie_offset = _HEADER.unpack_from(data)
    if (magic, version, compression, cookie_offset) != (MAGIC, VERSION, 0, 0):
        raise InvalidInput("this is no file of virsh save", f"expected version {VERSION}, not compressed, no cookie")
    end = HEADER_BYTES + length
    xml = bytes(data[HEADER_BYTES:end])
    if length > XML_BYTES or len(xml) != length or xml.count(b"\0") != 1 or not xml.endswith(b"\0"):
        raise InvalidInput(f"the domain's XML of a file of virsh save has not the {length} bytes that it should have")
    try:
        return SavedDomain(xml[:-1].decode(), bool(was_running)), end
    except UnicodeDecodeError as error:
        raise InvalidInput(f"the domain's XML of a file of virsh save is no text: {error}") from error
