"""Sockets' buffers, larger than the system lets everybody have them."""

import socket

_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33  # asm-generic/socket.h; the socket module does not name them


def enlarge_buffers(end: socket.socket, *, send_bytes: int = 0, receive_bytes: int = 0) -> None:
    """Give a socket such buffers; 0 leaves one as it is.

    Without the right to exceed the system's bound (CAP_NET_ADMIN, socket(7)) the bound is what it gets.
    """
    for size, forced, plain in (
        (send_bytes, _SO_SNDBUFFORCE, socket.SO_SNDBUF),
        (receive_bytes, _SO_RCVBUFFORCE, socket.SO_RCVBUF),
    ):
        if size:
            try:
                end.setsockopt(socket.SOL_SOCKET, forced, size)
            except PermissionError:
                end.setsockopt(socket.SOL_SOCKET, plain, size)
