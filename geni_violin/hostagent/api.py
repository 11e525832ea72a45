"""The host agent's REST API: one thin function a request (``docs/protocol.md``, section Host agent)."""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

from geni_violin.core.messages import (
    CutProgress,
    CutPromise,
    CutRequest,
    EdgeReport,
    LinkCounters,
    LinkReady,
    LinkRequest,
    LoadRequest,
    PrepareCut,
    SettleRequest,
    SwitchReady,
    VmRequest,
    VmStatus,
)
from geni_violin.hostagent.agent import HostAgent
from geni_violin.runtime.http import bind, serve, service_app
from geni_violin.runtime.settings import Settings


def create_app(agent: HostAgent) -> FastAPI:
    """The application; its OpenAPI document is at ``/openapi.json``."""
    app = service_app(f"GENI-VIOLIN host agent of {agent.name}", agent.lifespan)
    _add_switch_routes(app, agent)
    _add_vm_routes(app, agent)
    _add_cut_routes(app, agent)

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        return {"healthy": True, "host": agent.name}

    return app


def _add_switch_routes(app: FastAPI, agent: HostAgent) -> None:
    @app.post("/v1/switches/purge")
    async def purge() -> dict[str, Any]:
        """Have the switches attribute all statistics now: they do it when they forget their cached flows."""
        await agent.purge_switches()
        return {}

    @app.put("/v1/switches/{switch}")
    async def put_switch(switch: str) -> SwitchReady:
        return await agent.put_switch(switch)

    @app.put("/v1/switches/{switch}/links")
    async def put_link(switch: str, request: LinkRequest) -> LinkReady:
        return await agent.put_link(switch, request)

    @app.get("/v1/links")
    async def links() -> list[LinkCounters]:
        return agent.link_counters()

    @app.delete("/v1/switches/{switch}")
    async def delete_switch(switch: str) -> dict[str, Any]:
        await agent.delete_switch(switch)
        return {}


def _add_vm_routes(app: FastAPI, agent: HostAgent) -> None:
    @app.get("/v1/vms")
    async def vms() -> list[VmStatus]:
        return await agent.statuses()

    @app.post("/v1/slices/{slice_name}/vms/{vm}/check")
    async def check_vm(slice_name: str, vm: str, request: VmRequest) -> dict[str, Any]:
        """Whether this host can have such a VM; nothing is made."""
        agent.check_vm(request)
        return {}

    @app.put("/v1/slices/{slice_name}/vms/{vm}")
    async def put_vm(slice_name: str, vm: str, request: VmRequest) -> VmStatus:
        return await agent.put_vm(slice_name, vm, request)

    @app.post("/v1/slices/{slice_name}/vms/{vm}/run")
    async def run_vm(slice_name: str, vm: str) -> VmStatus:
        return await agent.run_vm(slice_name, vm)

    @app.post("/v1/slices/{slice_name}/vms/{vm}/load")
    async def load_vm(slice_name: str, vm: str, request: LoadRequest) -> VmStatus:
        return await agent.load_vm(slice_name, vm, request)

    @app.post("/v1/slices/{slice_name}/vms/{vm}/fail")
    async def fail_vm(slice_name: str, vm: str) -> VmStatus:
        return await agent.fail_vm(slice_name, vm)

    @app.delete("/v1/slices/{slice_name}/vms/{vm}")
    async def delete_vm(slice_name: str, vm: str, keep_console: bool = False) -> dict[str, Any]:
        await agent.delete_vm(slice_name, vm, keep_console)
        return {}

    @app.get("/v1/slices/{slice_name}/vms/{vm}/console")
    async def console(slice_name: str, vm: str, offset: int = 0) -> dict[str, Any]:
        return await agent.console(slice_name, vm, offset)


def _add_cut_routes(app: FastAPI, agent: HostAgent) -> None:
    cuts = agent.cuts

    @app.post("/v1/slices/{slice_name}/vms/{vm}/cut/prepare")
    async def prepare(slice_name: str, vm: str, request: PrepareCut) -> CutPromise:
        return await cuts.prepare(agent.vm(slice_name, vm), request)

    @app.post("/v1/slices/{slice_name}/vms/{vm}/arm")
    async def arm(slice_name: str, vm: str, request: CutRequest) -> CutProgress:
        return await cuts.arm(agent.vm(slice_name, vm), request)

    @app.post("/v1/slices/{slice_name}/vms/{vm}/cut")
    async def cut(slice_name: str, vm: str, request: CutRequest) -> CutProgress:
        return await cuts.cut(agent.vm(slice_name, vm), request)

    @app.get("/v1/slices/{slice_name}/vms/{vm}/cut/{transaction}")
    async def progress(slice_name: str, vm: str, transaction: str, wait_ms: float = 0.0) -> CutProgress:
        return await cuts.progress(slice_name, vm, transaction, wait_ms)

    @app.post("/v1/slices/{slice_name}/vms/{vm}/cut/{transaction}/settle")
    async def settle(slice_name: str, vm: str, transaction: str, request: SettleRequest) -> EdgeReport:
        return await agent.settle_vm(slice_name, vm, transaction, request)

    @app.delete("/v1/slices/{slice_name}/vms/{vm}/cut/{transaction}")
    async def cancel(slice_name: str, vm: str, transaction: str) -> CutProgress:
        return await cuts.cancel(slice_name, vm, transaction)


def run_agent(
    name: str,
    settings: Settings,
    host: str,
    port: int,
    controller_url: str,
    openflow_address: str,
    on_ready: Callable[[str], None],
) -> None:
    """Serve until SIGTERM or SIGINT; VMs go on. ``on_ready`` is called once, with the address that is bound.

    :param name: the name of the host that the agent is for.
    :param host: the address to listen on, with ``port`` (0: any); the tunnels of links are reached there too.
    :param openflow_address: where the controller waits for switches, ``tcp:host:port``.
    :raise MachineFault: the port is in use.
    """
    listener = bind(host, port)
    agent = HostAgent(name, settings, controller_url, openflow_address, tunnel_host=host)
    on_ready(f"http://{host}:{listener.getsockname()[1]}")
    serve(create_app(agent), listener)
