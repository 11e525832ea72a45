"""A steady load of UDP datagrams of 1472 bytes: frames of 1514 bytes, the most that Ethernet carries.

Run in a network namespace: ``python -m bench.udp_load sink PORT`` or ``… send ADDRESS PORT MBIT_S``; both go on until
they are terminated. The sink reads nothing: what counts is what the network carried, and its interfaces count that.
"""

import argparse
import signal
import socket
import time

PAYLOAD = bytes(1472)
FRAME_BYTES = 14 + 20 + 8 + len(PAYLOAD)
STEP_S = 0.001


def send(address: str, port: int, mbit_s: float) -> None:
    """Send at that rate, counting whole frames, in bursts of a millisecond. Who is late catches up no further back than
    ten bursts."""
    frames_per_step = mbit_s * 1e6 / 8 / FRAME_BYTES * STEP_S
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.connect((address, port))
        print("ready")
        due, owed = time.monotonic(), 0.0
        while True:
            due = max(due + STEP_S, time.monotonic() - 10 * STEP_S)
            owed += frames_per_step
            for _ in range(int(owed)):
                udp.send(PAYLOAD)
            owed -= int(owed)
            time.sleep(max(0.0, due - time.monotonic()))


def sink(port: int) -> None:
    """Have a socket, so that the kernel refuses nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        udp.bind(("", port))
        print("ready")
        signal.pause()


def main() -> None:
    """Do what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    sinking, sending = actions.add_parser("sink"), actions.add_parser("send")
    sinking.add_argument("port", type=int)
    sending.add_argument("address")
    sending.add_argument("port", type=int)
    sending.add_argument("mbit_s", type=float)
    arguments = parser.parse_args()
    if arguments.action == "sink":
        sink(arguments.port)
    else:
        send(arguments.address, arguments.port, arguments.mbit_s)


if __name__ == "__main__":
    main()
