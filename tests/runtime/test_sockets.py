"""Sockets' buffers."""

import socket
from unittest import mock

from geni_violin.runtime.sockets import enlarge_buffers

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
