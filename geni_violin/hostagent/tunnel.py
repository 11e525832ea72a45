"""The tunnel between the two ends of a link: one Ethernet frame a UDP datagram. Pure.

Theory of operation. A datagram is::

    | session, 4 bytes | number, 8 bytes | Ethernet frame with its VLAN tags |

both in network byte order. The session is chosen at random when the sending end starts, the number counts its frames
from 0. By them the receiving end keeps the order that the frames were sent in, as GRE does by its sequence numbers
(RFC 2890): a datagram that another has overtaken on the way is dropped, and what is missing is counted. A new session
is a new sender, and nothing is known to be missing before its first frame.

An end takes datagrams from its peer's address and port alone. That is no secrecy and no
proof: a tunnel belongs on a network that only the testbed's own machines are on.
"""

import struct
from dataclasses import dataclass

_HEADER = struct.Struct("!IQ")
HEADER_BYTES = _HEADER.size
MAX_DATAGRAM_BYTES = 65_507
"""The most that a UDP datagram over IPv4 can carry."""


class Sender:
    """Gives each frame its header.

    :param session: 32 random bits.
    """

    def __init__(self, session: int) -> None:
        self._session, self._number = session, 0

    def wrap(self, frame: bytes) -> bytes:
        """The datagram for the next frame."""
        datagram = _HEADER.pack(self._session, self._number) + frame
        self._number += 1
        return datagram


@dataclass
class ReceiverCounters:
    """``arrived`` frames were in order. ``missed`` is how many did not come, or came after a later one."""

    arrived: int = 0
    missed: int = 0


class Receiver:
    """Takes frames out of datagrams and keeps their order."""

    def __init__(self) -> None:
        self._session, self._next_number = -1, 0
        self.counters = ReceiverCounters()

    def unwrap(self, datagram: bytes) -> bytes | None:
        """The frame in a datagram; None if it is none of a tunnel, or comes too late."""
        if len(datagram) <= HEADER_BYTES:
            return None
        session, number = _HEADER.unpack_from(datagram)
        if session != self._session:
            self._session, self._next_number = session, number
        if number < self._next_number:
            return None
        self.counters.missed += number - self._next_number
        self.counters.arrived += 1
        self._next_number = number + 1
        return datagram[HEADER_BYTES:]
