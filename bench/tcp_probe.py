"""Both ends of a TCP measurement: how many bytes a second arrive, and how long one byte takes there and back.

Run in a network namespace: ``python -m bench.tcp_probe serve PORT``, then in another ``… goodput ADDRESS PORT SECONDS``
or ``… rtt ADDRESS PORT COUNT``. Goodput is what the receiver has read, over the time from its first byte to its last.
Each prints one line of JSON.

The receiver's buffer is small. With the usual ones TCP fills every queue on its way until one overflows (Open vSwitch
reads a veth through a socket that holds some ninety frames), and goodput measures how a stream gets over its losses.
With this one nothing is lost, the stream is as fast as the switch, and figures repeat.
"""

import argparse
import json
import socket
import time

GOODPUT, RTT = b"G", b"R"
CHUNK_BYTES = 1 << 18
RECEIVE_BUFFER_BYTES = 64 << 10


def serve(port: int) -> None:
    """Answer one client after another. The first byte tells what it wants."""
    with socket.create_server(("", port)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        print("ready")
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                wanted = connection.recv(1)
                if wanted == GOODPUT:
                    _swallow(connection)
                elif wanted == RTT:
                    _echo(connection)


def _swallow(connection: socket.socket) -> None:
    buffer, total, began, ended = bytearray(CHUNK_BYTES), 0, 0.0, 0.0
    while count := connection.recv_into(buffer):
        ended = time.monotonic()
        began = began or ended
        total += count
    connection.sendall(json.dumps({"bytes": total, "seconds": ended - began}).encode())


def _echo(connection: socket.socket) -> None:
    while data := connection.recv(64):
        connection.sendall(data)


def goodput(address: str, port: int, seconds: float) -> dict[str, float]:
    """Send for that long; gives back what the receiver says."""
    chunk, until = bytes(CHUNK_BYTES), time.monotonic() + seconds
    with socket.create_connection((address, port)) as connection:
        connection.sendall(GOODPUT)
        while time.monotonic() < until:
            connection.sendall(chunk)
        connection.shutdown(socket.SHUT_WR)
        answer: dict[str, float] = json.loads(connection.recv(1000))
        return answer


def rtt(address: str, port: int, count: int) -> dict[str, list[float]]:
    """Send one byte and wait for it to come back, that many times; microseconds."""
    times_us = []
    with socket.create_connection((address, port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(RTT)
        for _ in range(count):
            began = time.monotonic()
            connection.sendall(b"x")
            connection.recv(1)
            times_us.append(1e6 * (time.monotonic() - began))
    return {"us": times_us}


def main() -> None:
    """Do what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("serve").add_argument("port", type=int)
    for name, amount in (("goodput", float), ("rtt", int)):
        action = actions.add_parser(name)
        action.add_argument("address")
        action.add_argument("port", type=int)
        action.add_argument("amount", type=amount)
    arguments = parser.parse_args()
    if arguments.action == "serve":
        serve(arguments.port)
    else:
        probe = goodput if arguments.action == "goodput" else rtt
        print(json.dumps(probe(arguments.address, arguments.port, arguments.amount)))


if __name__ == "__main__":
    main()
