"""The snapshot server in a process of its own: ``python -m bench.store_server FOLDER``.

It prints its address and serves until SIGTERM. It imports nothing of the benchmark's, so that its memory is the
server's. ``store_client`` starts it.
"""

import sys
from pathlib import Path

from geni_violin.runtime.logs import configure_logging
from geni_violin.snapshot_server.server import run_server


def _ready(address: str) -> None:
    sys.stdout.write(f"{address}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    configure_logging("warning")
    run_server(
        host="127.0.0.1",
        port=0,
        ingest_host="127.0.0.1",
        ingest_port=0,
        store_dir=Path(sys.argv[1]),
        on_ready=_ready,
    )
