"""Which frames are in transit to each VM at a cut: its channel state, put together from what all edges recorded. Pure.

Theory of operation. Two kinds of records come from the edge of each VM, in the order in which frames passed it:

* *received*: frames of the old color that came after the VM's cut, or waited then. All of them are in transit to it.
* *sent*: frames that the edge held on their way out, each stamped with the sender's clock. Those that the VM had sent
  before its cut are *late*: they left after it, in the new color, so no receiver can tell them from new ones, and each
  gets them after its own cut. They are in transit to those that they were for: by destination address to one VM of the
  slice, or, a group address, to every other one.

The channel state of a VM is what it received, then what was late, sender by sender. That keeps the order between any
two VMs: a sender's late frames left after all that reached anyone in the old color.

**The stamps.** A frame is late if its stamp is not after the clock that the sender's image was stopped at
(``cut_clock``). QEMU's dump stamps with that clock in whole microseconds, *plus a whole number of seconds*: the date of
its real-time clock when the dump was begun. An agent that knows this number takes it off. Stamps of more than
:data:`SECONDS_OF_A_DATE` show that it did not; then the number is the one that brings the middle of the record nearest
to the clock. That is right if the VM's frames were held for less than half a second before its cut and after it. Where
a frame comes to lie further off than that, nothing is certain: then no frame of the record counts as late, because one
that was sent after the cut and is replayed is an orphan, while a lost one is only lost.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from geni_violin.core.errors import InvalidInput
from geni_violin.runtime.pcap import Frame

SECONDS_OF_A_DATE = 1_000_000_000
"""No guest has run for so long (31 years), and every date since September 2001 is later."""

_US_PER_S = 1_000_000
_NS_PER_US = 1_000
_CERTAIN_US = _US_PER_S // 2
_MAC_BYTES = 6
_HEADER_BYTES = 14
_GROUP_BIT = 1


@dataclass(frozen=True)
class Late:
    """The late frames of one VM; or, with a ``note``, how many of its frames are undecided, and why."""

    frames: tuple[Frame, ...] = ()
    undecided_frames: int = 0
    note: str = ""


def late_of(vm: str, sent: Sequence[Frame], clock_ns: int | None) -> Late:
    """Which of the frames that a VM's edge held are from before its cut.

    :param clock_ns: the VM's clock at its cut, in nanoseconds; None if its image does not tell.
    :returns: frames stamped with about the date when they were sent, as far as their stamps tell it.
    """
    if not sent:
        return Late()
    if clock_ns is None:
        return _undecided(vm, sent, "its image does not tell its clock at the cut")
    clock_us = clock_ns // _NS_PER_US
    offset_us = _offset_us(sent, clock_us)
    if offset_us and any(abs(frame.at_us - offset_us - clock_us) > _CERTAIN_US for frame in sent):
        return _undecided(vm, sent, "they were held for too long to tell which are from before it")
    late = [frame for frame in sent if frame.at_us - offset_us <= clock_us]
    return Late(tuple(replace(frame, at_us=offset_us + frame.at_us - sent[0].at_us) for frame in late))


def _undecided(vm: str, sent: Sequence[Frame], reason: str) -> Late:
    note = f"{vm}: {len(sent)} frames that it sent around its cut are not replayed by a restore: {reason}"
    return Late(undecided_frames=len(sent), note=note)


def _offset_us(sent: Sequence[Frame], clock_us: int) -> int:
    """What the stamps are ahead of the clock, a whole number of seconds."""
    stamps = [frame.at_us for frame in sent]
    if max(stamps) < SECONDS_OF_A_DATE * _US_PER_S:
        return 0
    ahead_us = (min(stamps) + max(stamps)) // 2 - clock_us
    return (ahead_us + _CERTAIN_US) // _US_PER_S * _US_PER_S


def channel_of(
    vm: str, received: Iterable[Frame], late: Mapping[str, Late], macs: Mapping[str, bytes]
) -> tuple[list[Frame], int]:
    """A VM's channel state in the order in which it is replayed, and how many of its frames were late ones.

    :param late: by sender; taken in this order.
    :param macs: by VM name, 6 bytes each.
    """
    frames = list(received)
    recorded = len(frames)
    for sender, sent in late.items():
        for frame in sent.frames:
            if sender != vm and _is_for(frame.data, macs[vm]):
                frames.append(replace(frame, at_us=max(frame.at_us, frames[-1].at_us if frames else 0)))
    return frames, len(frames) - recorded


def _is_for(data: bytes, mac: bytes) -> bool:
    return len(data) >= _HEADER_BYTES and (bool(data[0] & _GROUP_BIT) or data[:_MAC_BYTES] == mac)


def parsed_macs(macs: Mapping[str, str], vms: Iterable[str]) -> dict[str, bytes]:
    """The addresses of a staged snapshot's VMs, 6 bytes each.

    :raise InvalidInput: not exactly those VMs, or what is no address of one network interface.
    """
    if set(macs) != set(vms):
        raise InvalidInput("the addresses are not those of the staged VMs", f"expected one for each of {sorted(vms)}")
    return {vm: _parsed_mac(vm, mac) for vm, mac in macs.items()}


def _parsed_mac(vm: str, mac: str) -> bytes:
    try:
        octets = bytes.fromhex(mac.replace(":", ""))
    except ValueError:
        octets = b""
    if len(octets) != _MAC_BYTES or octets[0] & _GROUP_BIT:
        raise InvalidInput(f"{mac!r} cannot be the address of VM {vm}", "expected one like 52:54:00:00:00:01")
    return octets
