"""What comes after the pages: whether it is whole.

Theory of operation. The sections of devices do not say how long they are, but QEMU describes them all in JSON, and that
ends the stream: a mark that there are no more sections, and then type, length and text of the description. So a stream
that ends with its description is whole, whatever the devices are.
"""

import re

from geni_violin.core.errors import InvalidInput
from geni_violin.snapshot_server.stream.layout import EOF, VM_DESCRIPTION

_DESCRIPTION = re.compile(bytes((EOF, VM_DESCRIPTION)) + rb"(?=(.{4})\{)", re.DOTALL)
_LENGTH_BYTES = 4


def check_ending(tail: bytes | bytearray) -> None:
    """Check that the state of devices, with their description, is whole and ends with it.

    :raise InvalidInput: it breaks off, or goes on.
    """
    # A device's state may look like a description that ends, so it is the true one that is looked for first.
    if len(tail) not in _ends(tail):
        check_no_end(tail)
        raise InvalidInput("the stream breaks off in the state of the devices", _HINT)


def check_no_end(tail: bytes | bytearray) -> None:
    """Check that the state of devices has not ended before.

    :raise InvalidInput: it has.
    """
    if ends := [end for end in _ends(tail) if end < len(tail)]:
        raise InvalidInput(f"the stream goes on for {len(tail) - max(ends)} bytes after its end")


_HINT = "expected it to end with QEMU's description of them, which the machine option suppress-vmdesc=on leaves out"


def _ends(tail: bytes | bytearray) -> list[int]:
    """Where all that may be descriptions end, as far as they do."""
    found = (match.end() + _LENGTH_BYTES + int.from_bytes(match[1], "big") for match in _DESCRIPTION.finditer(tail))
    return [end for end in found if tail[end - 1 : end] == b"}"]
