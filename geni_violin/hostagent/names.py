"""What bridges, patch ports and TAP devices are called. Pure.

Every name is at most 15 characters long, the kernel's limit for an interface (IFNAMSIZ), and is computed from what it
stands for, so that a part that was restarted finds again what it made. It begins with ``gv`` and the installation's
four hexadecimal digits, so that clean-up finds all of one installation and nothing of another; then a letter for the
kind, and eight digits of a hash.
"""

import hashlib

BRIDGE_KIND = "-"
PATCH_KIND = "p"
TAP_KIND = "t"
LINK_TAP_KIND = "l"
HOLD_TAP_KIND = "h"
_SEPARATOR = "\0"


def prefix(installation_id: str, kind: str) -> str:
    """How all names of one kind in one installation begin."""
    return f"gv{installation_id}{kind}"


def bridge_name(installation_id: str, host: str, switch: str) -> str:
    """The bridge that is a switch of a host."""
    return prefix(installation_id, BRIDGE_KIND) + _digest(host, switch)[:8]


def patch_name(installation_id: str, bridge: str, peer: str, number: int) -> str:
    """The port on ``bridge`` of a link to the bridge ``peer``; ``number`` tells links between the same two apart."""
    return prefix(installation_id, PATCH_KIND) + _digest(bridge, peer, str(number))[:8]


def link_tap_name(installation_id: str, bridge: str, peer: str, number: int, delay_ms: float, loss: float) -> str:
    """The TAP device on ``bridge`` of a link with a delay or a loss; links that differ in these are different links."""
    manner = (f"{float(delay_ms)!r}", f"{float(loss)!r}")
    return prefix(installation_id, LINK_TAP_KIND) + _digest(bridge, peer, str(number), *manner)[:8]


def tap_name(installation_id: str, slice_name: str, vm: str) -> str:
    """The TAP device of a VM."""
    return prefix(installation_id, TAP_KIND) + _digest(slice_name, vm)[:8]


def hold_tap_name(installation_id: str, slice_name: str, vm: str) -> str:
    """The TAP device that is a VM's hold port."""
    return prefix(installation_id, HOLD_TAP_KIND) + _digest(slice_name, vm)[:8]


def datapath_id(installation_id: str, host: str, switch: str) -> int:
    """The OpenFlow datapath id of a switch: 64 bits, never 0 in its upper 16."""
    value = int(_digest(installation_id, host, switch), 16)
    return value | 1 << 48


def _digest(*parts: str) -> str:
    return hashlib.sha256(_SEPARATOR.join(parts).encode()).hexdigest()[:16]
