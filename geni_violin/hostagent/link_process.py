"""The process that carries the frames of one end of a link with a delay or a loss.

Theory of operation. The end is a TAP device on a switch and a UDP socket that is connected to the far end's. A frame
that the switch sends out is read from the device, waits in the :class:`DelayLine`, and goes to the far end, whose
process writes it to its own device at once: each direction is delayed at its sender, wherever the receiver is. One loop
does all three, some frames of each in turn, so that neither direction can starve the other; it sleeps until a frame
comes or one falls due. The process runs at a high priority, because a frame is late by as long as it is not scheduled.

Whoever starts it opens device and socket, and keeps a control socket to it. The process says ``READY`` there and waits
for ``GO``; if the other side is gone before that, nobody knows of this process yet, and it ends. Later on nobody needs
to live for it to go on. It ends when its device is deleted. Frames that wait in it are in memory only.
"""

import argparse
import contextlib
import errno
import gc
import os
import secrets
import select
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from geni_violin.hostagent.delay_line import DelayLine
from geni_violin.hostagent.link_counters import CounterFile, Counters
from geni_violin.hostagent.tunnel import MAX_DATAGRAM_BYTES, Receiver, Sender
from geni_violin.runtime.scheduling import forget_garbage, set_session_niceness
from geni_violin.runtime.sockets import enlarge_buffers

READY, GO = b"r", b"g"
MAX_FRAME_BYTES = 16_384
"""Longer than any frame of a device with jumbo frames and tags."""
_BATCH_FRAMES = 64
_NICENESS = -10
_BUFFER_BYTES = 16 << 20
_GONE = (errno.EIO, errno.EBADFD)
"""What reading a TAP device gives once it is deleted."""


class LinkEnd:
    """The loop.

    :param tap: a TAP device's descriptor, without packet information, not blocking.
    :param tunnel: a blocking UDP socket that is connected to the far end's.
    """

    def __init__(self, tap: int, tunnel: socket.socket, line: DelayLine, shown: CounterFile) -> None:
        self._tap, self._tunnel, self._line, self._shown = tap, tunnel, line, shown
        self._peer = tunnel.getpeername()
        self._sender, self._receiver = Sender(secrets.randbits(32)), Receiver()
        self._refused = 0

    def carry(self) -> None:
        """Carry frames until the device is gone."""
        devices = (self._tap, self._tunnel.fileno())
        with contextlib.suppress(_DeviceGone):
            while True:
                select.select(devices, (), (), self._patience_s())
                self._take_in()
                self._send_due()
                self._bring_back()
                self._show()

    def _patience_s(self) -> float | None:
        due_ns = self._line.next_due_ns
        return None if due_ns is None else max(0, due_ns - time.monotonic_ns()) / 1e9

    def _take_in(self) -> None:
        """From the switch into the line."""
        for _ in range(_BATCH_FRAMES):
            try:
                frame = os.read(self._tap, MAX_FRAME_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _GONE:
                    raise _DeviceGone from error
                raise
            self._line.put(frame, time.monotonic_ns())

    def _send_due(self) -> None:
        """From the line to the far end."""
        for _ in range(_BATCH_FRAMES):
            frame = self._line.take(time.monotonic_ns())
            if frame is None:
                return
            self._send(self._sender.wrap(frame))

    def _send(self, datagram: bytes) -> None:
        """What cannot be sent the far end counts as missed. An error may be that of an earlier datagram: try again."""
        for _ in range(2):
            with contextlib.suppress(OSError):
                self._tunnel.send(datagram)
                return

    def _bring_back(self) -> None:
        """From the far end to the switch."""
        for _ in range(_BATCH_FRAMES):
            try:
                datagram, address = self._tunnel.recvfrom(MAX_DATAGRAM_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                continue  # the far end is not there; nothing is lost that it has not lost
            if address == self._peer:  # what came before the socket was connected can be anybody's
                frame = self._receiver.unwrap(datagram)
                if frame is not None:
                    self._give(frame)

    def _give(self, frame: bytes) -> None:
        try:
            os.write(self._tap, frame)
        except OSError:  # it is down, full, or the frame is none
            self._refused += 1

    def _show(self) -> None:
        line, receiver, before = self._line.counters, self._receiver.counters, self._shown.before
        self._shown.write(
            Counters(
                before.entered + line.entered,
                before.lost + line.lost,
                before.overflowed + line.overflowed,
                len(self._line),
                before.arrived + receiver.arrived,
                before.missed + receiver.missed,
                before.refused + self._refused,
            )
        )


class _DeviceGone(Exception):
    """The TAP device has been deleted."""


def main(arguments: Sequence[str]) -> int:
    """Exit status 0 when the device is gone, or nobody wants the process to go on."""
    options = _parser().parse_args(arguments)
    host, _, port = options.peer.rpartition(":")
    with socket.socket(fileno=options.tunnel_fd) as tunnel, socket.socket(fileno=options.control_fd) as control:
        os.set_blocking(options.tap_fd, False)
        tunnel.setblocking(True)
        enlarge_buffers(tunnel, send_bytes=_BUFFER_BYTES, receive_bytes=_BUFFER_BYTES)
        tunnel.connect((host, int(port)))
        line = DelayLine(round(options.delay_ms * 1e6), options.loss, options.seed)
        end = LinkEnd(options.tap_fd, tunnel, line, CounterFile(options.counters))
        _hurry()
        sys.stderr.write(
            f"tunnel to {options.peer}: delay {options.delay_ms:g} ms, loss {options.loss:g}, seed {options.seed}\n"
        )
        sys.stderr.flush()
        control.sendall(READY)
        if control.recv(1) == GO:
            control.close()
            end.carry()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="link_process", description=(__doc__ or "").partition("\n")[0])
    for name in ("tap-fd", "tunnel-fd", "control-fd", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--peer", metavar="HOST:PORT", required=True, help="the far end's address")
    parser.add_argument("--delay-ms", type=float, required=True)
    parser.add_argument("--loss", type=float, required=True)
    parser.add_argument("--counters", type=Path, metavar="FILE", required=True)
    return parser


def _hurry() -> None:
    """Be scheduled soon, and make no garbage collector's pauses: the loop makes no cycles."""
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, _NICENESS)
    set_session_niceness(os.getpid(), _NICENESS)
    forget_garbage()
    gc.disable()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
