"""The snapshot server's process: open the store, bind both ports, serve."""

from collections.abc import Callable
from pathlib import Path

from geni_violin.runtime.http import bind, serve
from geni_violin.snapshot_server.api import create_app
from geni_violin.snapshot_server.file_store import FileStore


def run_server(
    *, host: str, port: int, ingest_host: str, ingest_port: int, store_dir: Path, on_ready: Callable[[str], None]
) -> None:
    """Serve until SIGTERM or SIGINT. Ports may be 0, for any free one.

    :param on_ready: called once with the REST side's URL when both ports serve; /healthz there tells the ingest port.
    :raise MachineFault: a port or the folder cannot be used, or another snapshot server uses the folder.
    """
    with bind(host, port) as listener, bind(ingest_host, ingest_port) as ingest_listener:
        url = f"http://{host}:{listener.getsockname()[1]}"
        store = FileStore(store_dir)
        serve(create_app(store, ingest_listener, lambda: on_ready(url)), listener)
