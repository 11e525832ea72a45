"""What the Mandelbrot guests say on their serial consoles, and the same program on this machine without any VM.

The lines are those of topologies/guest/mandelbrot-init: GV-READY, ``GV-PROGRESS DONE ROWS``,
``GV-RESULT-BEGIN SHA256``, the gzipped picture in base64, GV-RESULT-END; or ``GV-FAILED CODE``.
"""

import base64
import binascii
import gzip
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from geni_violin.cli.client import Coordinator
from geni_violin.core.errors import MachineFault
from geni_violin.core.model import VmSpec

RANKS = 4
HOST_LIMIT_S = 300.0


class GuestReport:
    """What a guest has said so far. ``picture`` is there when the result is whole and its checksum right."""

    def __init__(self) -> None:
        self.ready = False
        self.done = 0
        self.rows = 0
        self.picture: bytes | None = None
        self._sum = ""
        self._base64: list[str] | None = None

    def take(self, text: str) -> None:
        """Take in one line.

        :raise MachineFault: the program failed, or its picture did not come through whole.
        """
        words = text.split()
        first = words[0] if words else ""
        if first == "GV-FAILED":
            raise MachineFault(f"the program in the guests failed: {' '.join(words[1:])}", "see the console of VM n1")
        if first == "GV-RESULT-END":
            self.picture = self._decode()
        elif first == "GV-RESULT-BEGIN" and len(words) == 2:
            self._sum, self._base64 = words[1], []
        elif self._base64 is not None:
            self._base64.append(text.strip())
        elif first == "GV-READY":
            self.ready = True
        elif first == "GV-PROGRESS" and len(words) == 3 and all(map(str.isdecimal, words[1:])):
            self.done, self.rows = int(words[1]), int(words[2])

    def _decode(self) -> bytes:
        try:
            picture = gzip.decompress(base64.b64decode("".join(self._base64 or []), validate=True))
        except (binascii.Error, OSError, EOFError) as error:
            raise MachineFault(f"the picture did not come through the console whole: {error}") from error
        if hashlib.sha256(picture).hexdigest() != self._sum:
            raise MachineFault("the picture that came through the console has another checksum than the guest's")
        return picture


class ConsoleReader:
    """Reads a VM's console from an offset on, line by line."""

    def __init__(self, coordinator: Coordinator, slice_name: str, vm: str, offset: int = 0) -> None:
        self._coordinator, self._slice, self._vm = coordinator, slice_name, vm
        self.offset = offset
        self._rest = ""

    def lines(self) -> list[str]:
        """The whole lines that have come since the last call."""
        text, self.offset = self._coordinator.console(self._slice, self._vm, self.offset)
        *whole, self._rest = (self._rest + text).split("\n")
        return whole

    def skip(self) -> None:
        """Pass over all that is there now."""
        while self.lines():
            self._rest = ""


def job_of(vm: VmSpec) -> tuple[str, str, str]:
    """Width, height and iterations, from a VM's kernel command line.

    :raise MachineFault: it has none; then this is another topology.
    """
    words = dict(word.partition("=")[::2] for word in vm.kernel_command_line().split())
    try:
        return words["gv.width"], words["gv.height"], words["gv.iterations"]
    except KeyError as error:
        raise MachineFault(f"the topology's kernel command line has no {error.args[0]}=") from None


def compute_on_host(program: Path, job: tuple[str, str, str]) -> bytes:
    """The picture that the same program computes here, as many ranks, no VM.

    :raise MachineFault: the program or mpiexec is missing or fails.
    """
    mpiexec = shutil.which("mpiexec")
    if mpiexec is None:
        raise MachineFault("mpiexec is not installed", "install it: apt-get install mpich")
    if not program.exists():
        raise MachineFault(f"{program} does not exist", "build it by topologies/build-images")
    with tempfile.TemporaryDirectory(prefix="geni-violin-demo-") as folder:
        picture = Path(folder) / "picture.ppm"
        command = [mpiexec, "-n", str(RANKS), str(program), *job, str(picture)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=HOST_LIMIT_S, check=False)
        except subprocess.TimeoutExpired:
            raise MachineFault(f"the program did not end on this machine within {HOST_LIMIT_S:.0f} s") from None
        if done.returncode or not picture.exists():
            said = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
            raise MachineFault(f"the program fails on this machine: {said[-1]}", f"try {' '.join(command[:-1])} FILE")
        return picture.read_bytes()
