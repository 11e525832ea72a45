"""What this machine must have before parts can start, and the list of its installations.

An installation is a state directory. While it has anything running, a file /run/geni-violin/INSTALLATION_ID says where
it is, so that ``down --all`` finds every one of them.
"""

import contextlib
import os
import random
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from geni_violin.core.errors import MachineFault
from geni_violin.runtime.openvswitch import RUN_DIR as OPENVSWITCH_RUN_DIR
from geni_violin.runtime.processes import write_atomically
from geni_violin.runtime.scheduling import set_session_niceness
from geni_violin.runtime.settings import Settings

INSTALLATIONS = Path("/run/geni-violin")
OVS_CTL = Path("/usr/share/openvswitch/scripts/ovs-ctl")
OPENVSWITCH_NICENESS = -15
"""What ovs-ctl starts the daemon with, and what only counts among sessions if it is said to the session."""
QEMU = "qemu-system-x86_64"


def check_machine() -> None:
    """Refuse early what cannot work.

    :raise MachineFault: not root, no QEMU, no Open vSwitch, or no TAP device.
    """
    require_root("starting a slice")
    if shutil.which(QEMU) is None:
        raise MachineFault(f"{QEMU} is not installed", "install it: apt-get install qemu-system-x86")
    if shutil.which("ovs-vsctl") is None:
        raise MachineFault("Open vSwitch is not installed", "install it: apt-get install openvswitch-switch")
    if not Path("/dev/net/tun").exists():
        raise MachineFault("there is no /dev/net/tun", "load the kernel's tun module, or allow the container to use it")


def require_root(what: str) -> None:
    """:raise MachineFault: this process is not root's."""
    if os.geteuid() != 0:
        raise MachineFault(f"{what} needs root", "run it as root, or by sudo")


def openvswitch_runs() -> bool:
    """Whether both the database and the switch daemon answer."""
    commands = (("ovs-vsctl", "--timeout=5", "--no-wait", "show"), ("ovs-appctl", "--timeout=5", "version"))
    return all(_succeeds(command) for command in commands)


def _succeeds(command: tuple[str, ...]) -> bool:
    try:
        done = subprocess.run(command, capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def start_openvswitch() -> None:
    """Start Open vSwitch; one that runs is left alone, but for its place among the sessions.

    :raise MachineFault: it does not come up.
    """
    if not openvswitch_runs():
        _start_openvswitch()
    with contextlib.suppress(OSError, ValueError):  # another way of running it than Debian's
        set_session_niceness(int((OPENVSWITCH_RUN_DIR / "ovs-vswitchd.pid").read_text()), OPENVSWITCH_NICENESS)


def _start_openvswitch() -> None:
    if not OVS_CTL.exists():
        raise MachineFault("Open vSwitch does not run, and there is no ovs-ctl to start it", "start it by hand")
    command = [str(OVS_CTL), "start", "--system-id=random"]
    with tempfile.TemporaryFile("w+") as said:  # a pipe would stay open in its daemons, and we wait for its end
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, timeout=60, check=False)
        said.seek(0)
        lines = said.read().strip().splitlines() or ["it said nothing"]
    if not openvswitch_runs():
        raise MachineFault(f"Open vSwitch does not start: {lines[-1].strip()}", f"try {' '.join(command)}")


def port_is_free(port: int) -> bool:
    """Whether a service could listen on this TCP port of the loopback."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A TCP port of the loopback that nothing uses now.

    It is below those that Linux gives to outgoing connections (32768 and up, ip(7)): one of them might take a part's
    port while the part is dead, and it could not come back where the others expect it.
    """
    return next(port for port in iter(lambda: random.randrange(20_000, 32_000), 0) if port_is_free(port))


def remember_installation(settings: Settings) -> None:
    """Tell ``down --all`` about this installation."""
    INSTALLATIONS.mkdir(parents=True, exist_ok=True)
    write_atomically(INSTALLATIONS / settings.installation_id, f"{settings.state_dir.resolve()}\n".encode())


def forget_installation(settings: Settings) -> None:
    """The opposite; there is nothing left of it to stop."""
    with contextlib.suppress(FileNotFoundError):
        (INSTALLATIONS / settings.installation_id).unlink()


def installations() -> Iterator[Path]:
    """The state directories of all installations known on this machine."""
    for path in sorted(INSTALLATIONS.glob("*")):
        with contextlib.suppress(OSError):
            state_dir = path.read_text().strip()
            if state_dir and path.suffix != ".partial":
                yield Path(state_dir)
