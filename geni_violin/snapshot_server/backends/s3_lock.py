"""One server a bucket, where all there is are objects that can be created if absent.

::

    .lock/00000001, 00000002, …   a Holder each, in JSON; the highest number is the lock

Whoever wants the lock reads the highest number N. If there is none, or N's holder has let go, or is certainly dead, it
creates N + 1. Of several that try, one succeeds; but some stores (Swift) look whether an object is absent only when its
upload begins, so that two uploads at the same moment both succeed, and the later one stays. So whoever has created
N + 1 waits for as long as such an upload can take, and then looks again: if the record is another's, it has lost, and
also if there is a higher number by now, because then it had looked at N long ago. The winner removes the lower numbers.
Letting go rewrites one's own number as released; it is not removed, because then N + 1 could be won twice.

A holder is certainly dead if it is a process of this machine that does not run, or ran before this machine was started.
Of any other one only people can know: the message tells which object to delete.
"""

import contextlib
import dataclasses
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from geni_violin.core.errors import AlreadyExists, GeniViolinError, InvalidInput, MachineFault
from geni_violin.runtime.clock import wall_s
from geni_violin.runtime.processes import ProcessRecord, is_alive, record_of
from geni_violin.runtime.wire import decode, encode
from geni_violin.snapshot_server.backends.s3_objects import S3Objects

FOLDER = ".lock"
SETTLE_S = 1.0
"""How long the upload of a holder's record takes at most, among those who want the lock at the same moment."""


@dataclass(frozen=True)
class Holder:
    """Who has the lock: a process, told by its machine, that machine's start, and its own. ``since_at`` is for people.

    ``pid_namespace`` tells containers of one machine apart: their process ids mean different processes.
    """

    owner: str
    host: str
    machine_id: str
    boot_id: str
    pid_namespace: str
    pid: int
    start_ticks: int
    since_at: float
    released: bool = False


def this_holder(owner: str) -> Holder:
    """This process, as a holder."""
    record = record_of(owner, os.getpid())
    return Holder(
        owner=owner,
        host=socket.gethostname(),
        machine_id=_text_of(Path("/etc/machine-id")),
        boot_id=_text_of(Path("/proc/sys/kernel/random/boot_id")),
        pid_namespace=str(Path("/proc/self/ns/pid").readlink()),
        pid=record.pid,
        start_ticks=record.start_ticks,
        since_at=wall_s(),
    )


def certainly_dead(holder: Holder, here: Holder) -> bool:
    """Whether a holder cannot be running any more, as far as it can be told from here."""
    if (holder.host, holder.machine_id) != (here.host, here.machine_id) or not holder.machine_id:
        return False
    if holder.boot_id != here.boot_id:
        return True
    alike = holder.pid_namespace == here.pid_namespace
    return alike and not is_alive(ProcessRecord(holder.owner, holder.pid, holder.start_ticks))


@contextlib.contextmanager
def locked(objects: S3Objects, owner: str) -> Iterator[None]:
    """Hold the lock.

    :raise MachineFault: another one holds it, or may.
    """
    me = this_holder(owner)
    number = _highest(objects) + 1
    if number > 1:
        _refuse_if_held(objects, number - 1, me)
    mine = _name(number)
    try:
        objects.create(mine, _bytes_of(me))
    except AlreadyExists:
        raise _held(objects, mine, "another snapshot server") from None
    time.sleep(SETTLE_S)
    if objects.get(mine) != _bytes_of(me):
        raise _held(objects, mine, "another snapshot server")
    if (highest := _highest(objects)) > number:
        objects.delete(mine)
        raise _held(objects, _name(highest), "another snapshot server")
    for lower in _numbers(objects):
        if lower < number:
            objects.delete(_name(lower))
    try:
        yield
    finally:
        # A store that does not answer now does not keep this server from ending: it will be seen to be dead.
        with contextlib.suppress(GeniViolinError):
            objects.overwrite(mine, _bytes_of(dataclasses.replace(me, released=True)))


def _refuse_if_held(objects: S3Objects, number: int, me: Holder) -> None:
    name = _name(number)
    try:
        holder = decode(Holder, json.loads(objects.get(name)))
    except (ValueError, InvalidInput):
        raise _held(objects, name, "somebody whose record cannot be read") from None
    if not holder.released and not certainly_dead(holder, me):
        raise _held(objects, name, f"{holder.owner} (process {holder.pid} of {holder.host})")


def _held(objects: S3Objects, name: str, who: str) -> MachineFault:
    hint = f"stop it; if it certainly does not run any more, delete the object {name} there"
    return MachineFault(f"{who} uses {objects.where}", hint)


def _numbers(objects: S3Objects) -> list[int]:
    names = [name.rpartition("/")[2] for name, _ in objects.list(f"{FOLDER}/")]
    return sorted(int(name) for name in names if name.isdecimal())


def _highest(objects: S3Objects) -> int:
    return max(_numbers(objects), default=0)


def _name(number: int) -> str:
    return f"{FOLDER}/{number:08}"


def _bytes_of(holder: Holder) -> bytes:
    return json.dumps(encode(holder)).encode()


def _text_of(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
