"""The snapshot server's process: open the store, bind both ports, serve."""

import contextlib
import ctypes
import shutil
from collections.abc import Callable
from pathlib import Path

from geni_violin.runtime.http import bind, serve
from geni_violin.snapshot_server.api import create_app
from geni_violin.snapshot_server.backends import ObjectBackend
from geni_violin.snapshot_server.pages.page_store import PageStore, open_folder

_M_ARENA_MAX = -8
_MAX_ARENAS = 2


def _share_arenas() -> None:
    """Have the C library's allocator use few arenas (mallopt(3)): each keeps some of what its threads gave back, and
    there are many threads. With two, four streams at a time take 267 MiB instead of 308, and no longer.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _MAX_ARENAS)


def run_server(
    *,
    host: str,
    port: int,
    ingest_host: str,
    ingest_port: int,
    store_dir: Path,
    on_ready: Callable[[str], None],
    open_bucket: Callable[[], ObjectBackend] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT. Ports may be 0, for any free one.

    :param store_dir: where images are kept; or, with a bucket, what is of use to this server only.
    :param open_bucket: opens the object store that images are kept in instead.
    :param on_ready: called once with the REST side's URL when both ports serve; /healthz there tells the ingest port.
    :raise MachineFault: a port or the folder cannot be used, or another snapshot server uses the folder.
    """
    _share_arenas()
    with bind(host, port) as listener, bind(ingest_host, ingest_port) as ingest_listener:
        url = f"http://{host}:{listener.getsockname()[1]}"
        store = open_folder(store_dir) if open_bucket is None else PageStore(open_bucket(), store_dir / "state")
        scratch = store_dir / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)  # what a crash left; the store's lock keeps other servers away
        serve(create_app(store, ingest_listener, lambda: on_ready(url), scratch), listener)
