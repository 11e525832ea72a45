"""``coordinator``, ``hostagent``, ``snapshot-server``, ``controller``: run one part in the foreground.

A part tells this machine's ledger where it answers, once it does, and takes that back at a clean exit. The controller
is Ryu's own manager: this process becomes it, after writing its record (a process keeps its id and start time then).
"""

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from geni_violin.cli.client import load_settings, services_ledger
from geni_violin.cli.machine import free_port, port_is_free
from geni_violin.cli.parts import CONTROLLER, COORDINATOR, LOOPBACK, SNAPSHOT_SERVER, agent_part, remembered_ledger
from geni_violin.core.errors import MachineFault
from geni_violin.runtime.processes import record_of
from geni_violin.runtime.settings import Settings

Host = Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Where to listen.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="TCP port; 0 takes any free one.")]
ControllerUrl = Annotated[str, typer.Option("--controller-url", metavar="URL", help="The controller's REST address.")]


def coordinator(
    controller_url: ControllerUrl,
    snapshot_server_url: Annotated[str, typer.Option(metavar="URL", help="The snapshot server's REST address.")],
    host: Host = LOOPBACK,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="TCP port; 0: any.", show_default="7670")] = None,
) -> None:
    """Run the coordinator."""
    from geni_violin.coordinator import run_coordinator  # noqa: PLC0415

    settings = _prepare()
    with _recorded(settings, COORDINATOR) as on_ready:
        chosen = settings.coordinator_port if port is None else port
        run_coordinator(settings, host, chosen, controller_url, snapshot_server_url, on_ready)


def hostagent(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The host's name in topologies.")],
    controller_url: ControllerUrl,
    openflow: Annotated[str, typer.Option(metavar="tcp:HOST:PORT", help="Where the controller waits for switches.")],
    host: Host = LOOPBACK,
    port: Port = 0,
) -> None:
    """Run the agent of one host."""
    from geni_violin.hostagent.api import run_agent  # noqa: PLC0415

    settings = _prepare()
    with _recorded(settings, agent_part(name)) as on_ready:
        run_agent(name, settings, host, port, controller_url, openflow, on_ready)


def snapshot_server(
    host: Host = LOOPBACK,
    port: Port = 0,
    ingest_host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where images are taken in.")] = LOOPBACK,
    ingest_port: Annotated[int, typer.Option(min=0, max=65535, help="TCP port for images; 0: any.")] = 0,
    store_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Where images are kept.")] = None,
) -> None:
    """Run the snapshot server."""
    from geni_violin.snapshot_server.backends.opening import open_backend  # noqa: PLC0415
    from geni_violin.snapshot_server.server import run_server  # noqa: PLC0415

    settings = _prepare()
    places = {"s3_endpoint": settings.s3_endpoint, "s3_region": settings.s3_region}
    with _recorded(settings, SNAPSHOT_SERVER) as on_ready:
        run_server(
            host=host,
            port=port,
            ingest_host=ingest_host,
            ingest_port=ingest_port,
            store_dir=store_dir or settings.state_dir / "store",
            on_ready=on_ready,
            open_bucket=(lambda: open_backend(settings.store_url, os.environ, **places))
            if settings.store_url
            else None,
        )


def controller(
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where to listen, for REST and OpenFlow.")] = LOOPBACK,
    port: Port = 0,
    openflow_port: Annotated[int, typer.Option(min=0, max=65535, help="TCP port for switches; 0: any.")] = 0,
) -> None:
    """Run the OpenFlow controller (ryu-manager)."""
    settings = _prepare()
    program = ryu_manager()
    rest, openflow = (_chosen(wanted, purpose) for wanted, purpose in ((port, "REST"), (openflow_port, "OpenFlow")))
    _record(settings, CONTROLLER, f"http://{host}:{rest}", f"tcp:{host}:{openflow}")
    arguments = ["geni_violin.controller", "--ofp-listen-host", host, "--ofp-tcp-listen-port", str(openflow)]
    _become(program, [*arguments, "--wsapi-host", host, "--wsapi-port", str(rest)])


def _become(program: str, arguments: list[str]) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(program, [program, *arguments])


def ryu_manager() -> str:
    """Where Ryu's manager is: in this Python environment, else on the path.

    :raise MachineFault: nowhere.
    """
    beside = Path(sys.executable).with_name("ryu-manager")
    found = str(beside) if beside.exists() else shutil.which("ryu-manager")
    if found is None:
        raise MachineFault("ryu-manager is not installed", "install this project with its extra 'controller'")
    return found


def _chosen(port: int, purpose: str) -> int:
    if port and not port_is_free(port):
        raise MachineFault(f"port {port} for {purpose} is in use", "choose another port")
    return port or free_port()


def _prepare() -> Settings:
    """Settings, logs, and an orderly end on SIGTERM (uvicorn passes the signal on when it has shut down)."""
    from geni_violin.runtime.logs import configure_logging  # noqa: PLC0415

    settings = load_settings()
    configure_logging(settings.log_level)
    try:
        settings.run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineFault(
            f"cannot write to {settings.state_dir}: {error.strerror}", "set GENI_VIOLIN_STATE_DIR, or run as root"
        ) from error
    signal.signal(signal.SIGTERM, _end)
    return settings


def _end(_number: int, _frame: object) -> NoReturn:
    raise SystemExit(0)


def _record(settings: Settings, name: str, address: str, openflow: str = "") -> None:
    record = record_of(name, os.getpid(), address, openflow)
    services_ledger(settings).add(record)
    remembered_ledger(settings).add(record)


@contextlib.contextmanager
def _recorded(settings: Settings, name: str) -> Iterator[Callable[[str], None]]:
    """Gives what a part calls with its address when it is ready; takes the record back at the end."""
    try:
        yield lambda address: _record(settings, name, address)
    finally:
        record = services_ledger(settings).get(name)
        if record is not None and record.pid == os.getpid():
            services_ledger(settings).remove(name)
