"""The programs that make and measure traffic, over loopback."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from bench.udp_load import FRAME_BYTES, PAYLOAD
from geni_violin.cli.machine import free_port
from mininet_tests.slice_harness import REPOSITORY


@contextmanager
def program(*arguments: str) -> Iterator[None]:
    """One of the programs, from when it says that it is ready to the end of the block."""
    command = [sys.executable, "-u", "-m", *arguments]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield
    finally:
        process.terminate()
        process.communicate()


def output(*arguments: str) -> dict[str, object]:
    """What one of the programs prints."""
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True)
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def test_goodput_and_round_trips() -> None:
    port = str(free_port())
    with program("bench.tcp_probe", "serve", port):
        sent = output("bench.tcp_probe", "goodput", "127.0.0.1", port, "0.3")
        assert isinstance(sent["bytes"], int)
        assert sent["bytes"] > 1_000_000
        assert sent["seconds"] == pytest.approx(0.3, abs=0.2)
        times = output("bench.tcp_probe", "rtt", "127.0.0.1", port, "50")["us"]
        assert isinstance(times, list)
        assert len(times) == 50
        assert min(times) > 0


def test_the_load_has_its_rate() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        receiver.settimeout(5)
        receiver.bind(("127.0.0.1", 0))
        with program("bench.udp_load", "send", "127.0.0.1", str(receiver.getsockname()[1]), "20"):
            assert receiver.recv(2000) == PAYLOAD
            count, began = 0, time.monotonic()
            while (elapsed_s := time.monotonic() - began) < 1.5:
                receiver.recv(2000)
                count += 1
    assert count * FRAME_BYTES * 8e-6 / elapsed_s == pytest.approx(20, rel=0.1)
