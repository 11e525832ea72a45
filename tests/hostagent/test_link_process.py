"""The process of a link's end, with datagram sockets in place of TAP devices; and its counters."""

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from geni_violin.hostagent import link_process
from geni_violin.hostagent.link_counters import CounterFile, Counters, read_counters

DELAY_MS = 50.0
PATIENCE_S = 20.0
FRAMES = 200


@dataclass
class End:
    """A running end: ``switch`` is what the switch's side of its device would be."""

    process: subprocess.Popen[bytes]
    control: socket.socket
    switch: socket.socket
    counters: Path
    log: Path

    def shows(self, wanted: Counters) -> bool:
        """Whether the counters become that in time."""
        deadline = time.monotonic() + PATIENCE_S
        while read_counters(self.counters) != wanted and time.monotonic() < deadline:
            time.sleep(0.005)
        return read_counters(self.counters) == wanted


def bound() -> socket.socket:
    """A UDP socket on loopback."""
    tunnel = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    tunnel.bind(("127.0.0.1", 0))
    return tunnel


@contextmanager
def running(folder: Path, name: str, tunnel: socket.socket, peer: socket.socket, loss: float = 0.0) -> Iterator[End]:
    """An end that is ready but not told to go on yet."""
    device, switch = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ours, theirs = socket.socketpair()
    counters, log = folder / f"{name}.counters", folder / f"{name}.log"
    fds = {"tap-fd": device.fileno(), "tunnel-fd": tunnel.fileno(), "control-fd": theirs.fileno()}
    options = {**fds, "peer": f"127.0.0.1:{peer.getsockname()[1]}", "delay-ms": DELAY_MS, "loss": loss, "seed": 7}
    command = [sys.executable, "-m", link_process.__name__, f"--counters={counters}"]
    command += [f"--{key}={value}" for key, value in options.items()]
    with log.open("wb") as output:
        process = subprocess.Popen(command, pass_fds=tuple(fds.values()), stdout=output, stderr=output)
    for mine in (device, theirs):
        mine.close()
    switch.settimeout(PATIENCE_S)
    ours.settimeout(PATIENCE_S)
    with ours, switch:
        try:
            assert ours.recv(1) == link_process.READY
            yield End(process, ours, switch, counters, log)
        finally:
            process.kill()
            process.wait()


@contextmanager
def joined(folder: Path, loss: float = 0.0) -> Iterator[tuple[End, End]]:
    """Two ends that carry frames to each other; what ``a`` sends is lost by ``loss``."""
    with bound() as a, bound() as b, running(folder, "a", a, b, loss) as end_a, running(folder, "b", b, a) as end_b:
        for end in (end_a, end_b):
            end.control.sendall(link_process.GO)
        yield end_a, end_b


def test_frames_take_the_delay_in_each_direction_and_keep_their_order(tmp_path: Path) -> None:
    with joined(tmp_path) as (a, b):
        for sender, receiver in ((a, b), (b, a)):
            sent_at = []
            for number in range(FRAMES):
                sent_at.append(time.monotonic())
                sender.switch.send(number.to_bytes(2, "big") * 32)
                time.sleep(0.0005)
            waited_ms = []
            for number in range(FRAMES):
                assert receiver.switch.recv(100) == number.to_bytes(2, "big") * 32
                waited_ms.append((time.monotonic() - sent_at[number]) * 1e3)
            assert min(waited_ms) >= DELAY_MS
        assert a.shows(Counters(entered=FRAMES, arrived=FRAMES))


def test_the_delay_is_accurate(tmp_path: Path) -> None:
    with joined(tmp_path) as (a, b):
        errors_ms = []
        for _ in range(31):
            sent_at = time.monotonic()
            a.switch.send(b"a frame")
            b.switch.recv(100)
            errors_ms.append((time.monotonic() - sent_at) * 1e3 - DELAY_MS)
        assert 0 <= sorted(errors_ms)[15] <= 1.0, sorted(errors_ms)


def test_jumbo_frames_are_carried(tmp_path: Path) -> None:
    frame = os.urandom(9000 + 14 + 8)
    with joined(tmp_path) as (a, b):
        a.switch.send(frame)
        assert b.switch.recv(20_000) == frame


def test_losses_are_counted_where_they_happen_and_told_from_the_tunnels(tmp_path: Path) -> None:
    with joined(tmp_path, loss=0.5) as (a, b):
        for number in range(FRAMES):
            a.switch.send(number.to_bytes(2, "big"))
            time.sleep(0.0002)
        lost = sum(chance < 0.5 for chance in chances(FRAMES))
        assert 60 < lost < 140
        assert a.shows(Counters(entered=FRAMES, lost=lost))
        assert b.shows(Counters(arrived=FRAMES - lost))


def chances(frames: int) -> list[float]:
    """What decides the fate of each frame at an end with the seed 7."""
    generator = random.Random(7)
    return [generator.random() for _ in range(frames)]


def test_a_far_end_that_is_away_for_a_while_costs_only_what_was_sent_meanwhile(tmp_path: Path) -> None:
    with bound() as a, bound() as b, running(tmp_path, "a", a, b) as end_a:
        address = b.getsockname()
        end_a.control.sendall(link_process.GO)
        b.close()
        for _ in range(5):
            end_a.switch.send(b"to nobody")
            time.sleep(0.01)
        assert end_a.shows(Counters(entered=5))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:
            again.bind(address)
            with running(tmp_path, "b", again, a) as end_b:
                end_b.control.sendall(link_process.GO)
                end_a.switch.send(b"to somebody")
                assert end_b.switch.recv(100) == b"to somebody"
                end_b.switch.send(b"and back")
                assert end_a.switch.recv(100) == b"and back"


def test_a_process_that_nobody_recorded_ends_with_its_starter(tmp_path: Path) -> None:
    with bound() as a, bound() as b, running(tmp_path, "a", a, b) as end:
        assert "seed 7" in end.log.read_text()
        end.control.close()
        assert end.process.wait(PATIENCE_S) == 0


def test_a_process_outlives_its_starter_once_it_is_told_to_go_on(tmp_path: Path) -> None:
    with joined(tmp_path) as (a, b):
        a.control.close()
        a.switch.send(b"still there")
        assert b.switch.recv(100) == b"still there"


def test_strangers_are_not_listened_to(tmp_path: Path) -> None:
    with bound() as a, bound() as b, bound() as stranger:
        stranger.sendto(bytes(64), a.getsockname())
        _strangers_are_ignored(tmp_path, a, b, stranger)


def _strangers_are_ignored(folder: Path, a: socket.socket, b: socket.socket, stranger: socket.socket) -> None:
    with running(folder, "a", a, b) as end:
        end.control.sendall(link_process.GO)
        stranger.sendto(bytes(64), a.getsockname())
        b.sendto(bytes(12) + b"from the peer", a.getsockname())
        assert end.switch.recv(100) == b"from the peer"
        assert end.shows(Counters(arrived=1))


def test_counters_go_on_where_a_process_before_stopped(tmp_path: Path) -> None:
    path = tmp_path / "counters"
    assert read_counters(path) == Counters()
    shown = CounterFile(path)
    shown.write(Counters(*range(7)))
    assert read_counters(path) == Counters(0, 1, 2, 3, 4, 5, 6)
    assert CounterFile(path).before == Counters(0, 1, 2, 3, 4, 5, 6)


@pytest.mark.parametrize("text", [b"", b"half a wor"])
def test_a_counter_file_that_is_none_shows_nothing(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "counters"
    path.write_bytes(text)
    assert read_counters(path) == Counters()
