"""Sockets' buffers and pacing."""

import socket
import threading
import time
from unittest import mock

from geni_violin.runtime.sockets import end_pace, enlarge_buffers, pace

SIZE_BYTES = 100_000


def _sizes(end: socket.socket) -> tuple[int, int]:
    return tuple(end.getsockopt(socket.SOL_SOCKET, which) for which in (socket.SO_SNDBUF, socket.SO_RCVBUF))  # type: ignore[return-value]


def test_only_what_is_named_is_enlarged() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        before = _sizes(end)
        enlarge_buffers(end, send_bytes=SIZE_BYTES)
        assert _sizes(end) == (2 * SIZE_BYTES, before[1])  # the kernel doubles it for its own books, socket(7)
        enlarge_buffers(end, receive_bytes=SIZE_BYTES)
        assert _sizes(end) == (2 * SIZE_BYTES, 2 * SIZE_BYTES)


def test_without_the_right_the_systems_bound_counts() -> None:
    asked = []

    def set_option(_level: int, option: int, size: int) -> None:
        asked.append((option, size))
        if option not in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            raise PermissionError

    enlarge_buffers(mock.Mock(setsockopt=set_option), send_bytes=SIZE_BYTES)
    assert asked[-1] == (socket.SO_SNDBUF, SIZE_BYTES)


def test_a_paced_connection_sends_so_fast_and_then_as_fast_as_it_can() -> None:
    """Far apart, so that a busy machine does not matter: 1 s a MiB, and then 64 MiB that would take a minute."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = socket.create_connection(server.getsockname())
        receiver, _address = server.accept()
    with sender, receiver:
        reading = threading.Thread(target=_read_all, args=(receiver,))
        reading.start()
        enlarge_buffers(sender, send_bytes=128 << 20)
        pace(sender, 1 << 20, 64 << 10)
        began = time.monotonic()
        sender.sendall(bytes(2 << 20))
        assert time.monotonic() - began > 1, "what is unsent is bounded, so the writer waits"
        end_pace(sender)
        began = time.monotonic()
        sender.sendall(bytes(64 << 20))
        sender.shutdown(socket.SHUT_WR)
        reading.join()
        assert time.monotonic() - began < 30


def _read_all(end: socket.socket) -> None:
    while end.recv(1 << 20):
        pass
