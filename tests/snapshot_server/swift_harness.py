"""A real object store for the tests: OpenStack Swift with its S3 interface, on loopback, in a folder, without root.

Four daemons: the proxy, which speaks S3 and knows one user, and the servers for accounts, containers and objects, with
one replica on one device. Rings and settings are in the folder (``swift_dir``) instead of /etc/swift.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ACCESS_KEY_ID, SECRET_ACCESS_KEY = "test:tester", "a-secret-nobody-may-see"
BUCKET = "images"
START_S = 180.0

_PIPELINE = "catch_errors listing_formats s3api tempauth proxy-server"
_PROXY = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {folder}
workers = 0
[pipeline:main]
pipeline = {pipeline}
[app:proxy-server]
use = egg:swift#proxy
allow_account_management = true
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:s3api]
use = egg:swift#s3api
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = {secret} .admin
[filter:listing_formats]
use = egg:swift#listing_formats
"""
_SERVER = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
workers = 0
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
"""
_RINGS = """
import sys
from swift.common.ring import RingBuilder
folder, ports = sys.argv[1], sys.argv[2:]
for kind, port in zip(("account", "container", "object"), ports, strict=True):
    builder = RingBuilder(1, 1, 0)
    builder.add_dev({"region": 1, "zone": 1, "ip": "127.0.0.1", "port": int(port), "device": "d1", "weight": 1})
    builder.rebalance()
    builder.get_ring().save(f"{folder}/{kind}.ring.gz")
"""


@dataclass(frozen=True)
class Swift:
    """A running Swift: its S3 endpoint, and the folder where its objects are."""

    endpoint: str
    devices: Path


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for found in sockets:
            found.bind(("127.0.0.1", 0))
        return [found.getsockname()[1] for found in sockets]


@contextlib.contextmanager
def swift_in(folder: Path) -> Iterator[Swift]:
    """Swift in an empty folder; stopped at the end. Its daemons' words are in ``folder``/KIND.log."""
    proxy, *ports = _free_ports(4)
    (folder / "devices" / "d1").mkdir(parents=True)
    (folder / "swift.conf").write_text(
        "[swift-hash]\nswift_hash_path_suffix = tests\n[storage-policy:0]\nname = only\ndefault = yes\n"
    )
    subprocess.run([sys.executable, "-c", _RINGS, str(folder), *map(str, ports)], check=True)
    texts = {"proxy": _PROXY.format(folder=folder, port=proxy, pipeline=_PIPELINE, secret=SECRET_ACCESS_KEY)}
    for kind, port in zip(("account", "container", "object"), ports, strict=True):
        texts[kind] = _SERVER.format(folder=folder, port=port, kind=kind)
    with contextlib.ExitStack() as stack:
        daemons = [stack.enter_context(_daemon(folder, kind, text)) for kind, text in texts.items()]
        endpoint = f"http://127.0.0.1:{proxy}"
        for daemon, port in zip(daemons, [proxy, *ports], strict=True):
            _wait_for(daemon, port, folder)
        yield Swift(endpoint, folder / "devices")


@contextlib.contextmanager
def _daemon(folder: Path, kind: str, text: str) -> Iterator[subprocess.Popen[bytes]]:
    conf = folder / f"{kind}-server.conf"
    conf.write_text(text)
    program = Path(sys.executable).with_name(f"swift-{kind}-server")
    # Whoever runs the tests may have set other credentials, or a proxy.
    environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
    with (folder / f"{kind}.log").open("wb") as log:
        command = [sys.executable, str(program), str(conf), "-v"]
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=environment, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for(daemon: subprocess.Popen[bytes], port: int, folder: Path) -> None:
    deadline = time.monotonic() + START_S
    while daemon.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    words = "".join(path.read_text() for path in sorted(folder.glob("*.log")))
    raise RuntimeError(f"Swift did not start within {START_S:.0f} s:\n{words}")
