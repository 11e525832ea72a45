"""What sockets keep and how fast they send: buffers larger than the system lets everybody have them, and pacing."""

import socket

# asm-generic/socket.h and linux/tcp.h; the socket module does not name them
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE, _SO_MAX_PACING_RATE, _TCP_NOTSENT_LOWAT = 32, 33, 47, 25
_UNPACED = -1


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


def pace(end: socket.socket, bytes_per_s: int, unsent_bytes: int) -> None:
    """Have a TCP connection send no faster, whoever writes to it, and keep no more than that unsent (tcp(7)): a writer
    waits, for a moment only.
    """
    end.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, bytes_per_s)
    end.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, unsent_bytes)


def end_pace(end: socket.socket) -> None:
    """Lift the bounds of :func:`pace`; a writer that waits goes on."""
    end.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, _UNPACED)
    end.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, 0)  # the system's own
