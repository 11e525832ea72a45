"""A libvirtd for one test: the machine's own program, with configuration, state and sockets of its own.

It runs in a mount namespace, where its folders lie over /etc/libvirt, /var/lib/libvirt and their like, and in a process
namespace, so that whatever it has started ends with it. The first process there is a shell, which waits for whatever
ends: the QEMU that libvirtd asks what it can do is not its child. Its socket is in an ordinary folder, so that virsh
reaches it from outside. Nothing of the machine's own libvirt is read or changed.
"""

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("libvirtd", "virsh", "unshare")
START_S = 90.0

_FOLDERS = {
    "etc": "/etc/libvirt",
    "lib": "/var/lib/libvirt",
    "cache": "/var/cache/libvirt",
    "log": "/var/log/libvirt",
    "run": "/run/libvirt",
}
_DAEMON = 'unix_sock_dir = "{sockets}"\nauth_unix_rw = "none"\nauth_unix_ro = "none"\n'
_QEMU = """
user = "root"
group = "root"
security_driver = "none"
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
"""
_ACCOUNT = {
    "passwd": "libvirt-qemu:x:64055:64055::/var/lib/libvirt:/usr/sbin/nologin\n",
    "group": "libvirt-qemu:x:64055:\n",
}
"""Debian's build looks for it before it reads that root is wanted; another package than the daemon's makes it."""
_BEGIN = """set -e
base=$1
shift
while [ $# -gt 0 ]; do
    mkdir -p "$2"
    mount --bind "$base/$1" "$2"
    shift 2
done
mount --bind "$base/passwd" /etc/passwd
mount --bind "$base/group" /etc/group
libvirtd --config /etc/libvirt/libvirtd.conf &
wait
"""


def missing_programs() -> list[str]:
    """What is not installed of that which this needs."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


@dataclass(frozen=True)
class Libvirt:
    """A running libvirtd."""

    uri: str

    def virsh(self, *arguments: str, timeout_s: float = 120.0) -> str:
        """Run a command of virsh that must succeed; gives what it said."""
        done = subprocess.run(
            ["virsh", "--connect", self.uri, *arguments], capture_output=True, text=True, timeout=timeout_s, check=False
        )
        assert done.returncode == 0, f"virsh {' '.join(arguments)}: {done.stderr.strip()}"
        return done.stdout.strip()


@contextlib.contextmanager
def libvirt_in(folder: Path) -> Iterator[Libvirt]:
    """libvirtd with all that it keeps in an empty folder, whose path is short (a socket is in it); ended at the end.

    :raise RuntimeError: it does not start; with its words.
    """
    for name in (*_FOLDERS, "sockets"):
        (folder / name).mkdir()
    (folder / "etc/libvirtd.conf").write_text(_DAEMON.format(sockets=folder / "sockets"))
    (folder / "etc/qemu.conf").write_text(_QEMU)
    for name, line in _ACCOUNT.items():
        known = Path("/etc", name).read_text()
        (folder / name).write_text(known if "libvirt-qemu:" in known else known + line)
    places = [word for pair in _FOLDERS.items() for word in pair]
    own_namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command = [*own_namespaces, "sh", "-c", _BEGIN, "sh", str(folder), *places]
    with (folder / "words").open("wb") as words:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=words, stderr=words)
    try:
        libvirt = Libvirt(f"qemu:///system?mode=legacy&socket={folder / 'sockets' / 'libvirt-sock'}")
        _wait_until_it_answers(libvirt, process, folder / "words")
        yield libvirt
    finally:
        process.kill()  # takes its child along, which is the first process of its namespace, and so all others
        process.wait()


def _wait_until_it_answers(libvirt: Libvirt, process: subprocess.Popen[bytes], words: Path) -> None:
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            libvirt.virsh("version", timeout_s=30)
            return
        time.sleep(0.2)
    raise RuntimeError(f"libvirtd did not start within {START_S:.0f} s: {words.read_text(errors='replace')[-2000:]}")
