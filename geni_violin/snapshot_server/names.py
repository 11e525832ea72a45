"""What may be a name, and what a staging must look like. Pure.

Names of snapshots are for people; identifiers (of snapshots and VMs) become parts of paths below the store's folder.
Both begin with a letter or a digit and have no slash, so that none can leave that folder, be hidden, or be ``..``; at
most 63 characters leave room for the store's own suffixes in the 255 bytes of a file name.
"""

import re

from geni_violin.core.errors import InvalidInput
from geni_violin.core.messages import StageRequest
from geni_violin.runtime.pcap import decode

MAX_IMAGES = 1024
"""The most VMs that one snapshot can have."""
RECEIVED, SENT = "received", "sent"
"""The kinds of records that edges bring: what came to a VM, what it sent (``channels``)."""
MAX_RECORD_BYTES = 256 << 20
"""The longest record of an edge: twice what an edge lets wait."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def is_identifier(text: str) -> bool:
    """Whether ``text`` can be the identifier of a snapshot or a VM."""
    # fullmatch, because "$" would let a newline at the end pass.
    return _IDENTIFIER.fullmatch(text) is not None


def checked_identifier(text: str, what: str) -> str:
    """``text``, if it can be part of a path.

    :param what: what it identifies, for the message, such as "VM name".
    :raise InvalidInput: it cannot.
    """
    if not is_identifier(text):
        expected = "expected 1 to 63 letters, digits, '.', '_' or '-', the first a letter or a digit"
        raise InvalidInput(f"{text!r} cannot be a {what}", expected)
    return text


def check_stage_request(request: StageRequest) -> None:
    """Check all that can be told of a staging without looking at the store.

    :raise InvalidInput: a name that cannot be, no image or too many, a VM twice, a size that is not positive.
    """
    checked_identifier(request.snapshot_id, "snapshot id")
    if _NAME.fullmatch(request.name) is None:
        expected = "expected 1 to 63 small letters, digits, '.', '_' or '-', the first a letter or a digit"
        raise InvalidInput(f"{request.name!r} cannot be a snapshot's name", expected)
    vms = [checked_identifier(image.vm, "VM name") for image in request.images]
    if not 0 < len(vms) <= MAX_IMAGES:
        raise InvalidInput(f"a snapshot of {len(vms)} VMs was asked for", f"expected 1 to {MAX_IMAGES}")
    if len(set(vms)) < len(vms):
        raise InvalidInput("a VM is named twice", "expected one image for each VM")
    if any(image.expected_bytes <= 0 for image in request.images):
        raise InvalidInput("expected_bytes is not positive", "expected the most bytes that the image can have")


def check_record(vm: str, kind: str, data: bytes) -> None:
    """Check all that can be told of an edge's record without looking at the store.

    :raise InvalidInput: an unknown kind, too long, or not frames in the pcap format.
    """
    checked_identifier(vm, "VM name")
    if kind not in (RECEIVED, SENT):
        raise InvalidInput(f"there is no record {kind!r}", f"expected {RECEIVED} or {SENT}")
    check_record_size(len(data))
    decode(data)


def check_record_size(count: int) -> None:
    """Check the length of a record in bytes.

    :raise InvalidInput: it is longer than :data:`MAX_RECORD_BYTES`.
    """
    if count > MAX_RECORD_BYTES:
        hint = "the edge should have dropped what it had no room for"
        raise InvalidInput(f"the record is longer than {MAX_RECORD_BYTES} bytes", hint)
