"""Open vSwitch's bridges and ports, by ``ovs-vsctl``.

Theory of operation. Each public method is one database transaction: several commands of ``ovs-vsctl`` joined by ``--``
happen together or not at all, and the program returns when the switch has taken the change over. Everything is
idempotent. Bridges carry the installation's id in ``external_ids:geni-violin``, so that what a crash left can be found.

Bridges use the userspace datapath (``netdev``), which needs no kernel module, and fail secure: without a controller
they forward nothing, rather than act as a learning switch that knows no colors.
"""

import asyncio
import fcntl
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from geni_violin.core.errors import MachineFault
from geni_violin.hostagent import names
from geni_violin.hostagent.tools import run_tool

_OVS_CTL = Path("/usr/share/openvswitch/scripts/ovs-ctl")
_START_LOCK = Path("/run/lock/geni-violin-openvswitch")
_OWNER_KEY = "geni-violin"
_RECONNECT_MS = 1000


class OpenVSwitch:
    """The switches of one installation on this machine.

    :param installation_id: four hexadecimal digits (``Settings.installation_id``).
    """

    def __init__(self, installation_id: str) -> None:
        self._installation_id = installation_id

    async def ensure_switch(self, bridge: str, dpid: int, controller: str) -> None:
        """Create a bridge, or change it to this.

        :param dpid: its OpenFlow datapath id.
        :param controller: where the controller listens, as ``tcp:127.0.0.1:6653``.
        :raise MachineFault: Open vSwitch does not run or refused.
        """
        create = ["--may-exist", "add-br", bridge]
        configure = [
            *("set", "Bridge", bridge, "datapath_type=netdev", "fail_mode=secure", "protocols=OpenFlow13"),
            *(f"other_config:datapath-id={dpid:016x}", "other_config:disable-in-band=true"),
            f"external_ids:{_OWNER_KEY}={self._installation_id}",
        ]
        control = ["set-controller", bridge, controller]
        reconnect = ["set", "Controller", bridge, f"max_backoff={_RECONNECT_MS}"]
        await _vsctl(create, configure, control, reconnect)

    async def delete_switch(self, bridge: str) -> None:
        """Delete a bridge with all its ports; it need not exist."""
        await _vsctl(["--if-exists", "del-br", bridge])

    async def add_port(self, bridge: str, interface: str) -> int:
        """Put an interface of this machine on a bridge.

        :return: its OpenFlow port number.
        :raise MachineFault: there is no such bridge, or the switch cannot use the interface; no port is left.
        """
        await _vsctl(["--may-exist", "add-port", bridge, interface])
        return await self._port_number(bridge, interface)

    async def delete_port(self, bridge: str, interface: str) -> None:
        """Take an interface off a bridge; neither need exist."""
        if bridge in await self._bridges():
            await _vsctl(["--if-exists", "del-port", bridge, interface])

    async def ports(self, bridge: str) -> list[str]:
        """The names of a bridge's ports.

        :raise MachineFault: there is no such bridge.
        """
        return (await _vsctl(["list-ports", bridge])).split()

    async def ensure_link(self, bridge: str, peer: str, number: int = 0) -> int:
        """Make this bridge's end of a link to another bridge of this machine, whose end is made by itself.

        :param number: tells links between the same two bridges apart.
        :return: the OpenFlow port number of this end.
        :raise MachineFault: there is no such bridge.
        """
        end = names.patch_name(self._installation_id, bridge, peer, number)
        far_end = names.patch_name(self._installation_id, peer, bridge, number)
        await _vsctl(
            ["--may-exist", "add-port", bridge, end],
            ["set", "Interface", end, "type=patch", f"options:peer={far_end}"],
        )
        return await self._port_number(bridge, end)

    async def delete_link(self, bridge: str, peer: str, number: int = 0) -> None:
        """Delete this bridge's end of a link; it need not exist."""
        await self.delete_port(bridge, names.patch_name(self._installation_id, bridge, peer, number))

    async def switches(self) -> list[str]:
        """The bridges of this installation."""
        rows = await _rows("Bridge", ["name"], f"external_ids:{_OWNER_KEY}={self._installation_id}")
        return sorted(str(row["name"]) for row in rows)

    async def flush(self) -> list[str]:
        """Delete all bridges of this installation, in one transaction.

        :return: which there were.
        """
        bridges = await self.switches()
        if bridges:
            await _vsctl(*(["--if-exists", "del-br", bridge] for bridge in bridges))
        return bridges

    async def _bridges(self) -> list[str]:
        return (await _vsctl(["list-br"])).split()

    async def _port_number(self, bridge: str, interface: str) -> int:
        rows = await _rows("Interface", ["ofport", "error"], f"name={interface}")
        number = rows[0]["ofport"] if rows else -1
        if isinstance(number, int) and number > 0:
            return number
        reason = rows[0]["error"] if rows and isinstance(rows[0]["error"], str) else "no port number was given"
        await self.delete_port(bridge, interface)
        raise MachineFault(f"Open vSwitch cannot use {interface} on bridge {bridge}: {reason}")


async def is_running() -> bool:
    """Whether Open vSwitch's database and switch answer."""
    try:
        await _vsctl(["get", "Open_vSwitch", ".", "cur_cfg"])
    except MachineFault:
        return False
    return await asyncio.to_thread(_switch_answers)


async def ensure_running() -> None:
    """Start Open vSwitch unless it runs. Several processes may ask at once; one starts it.

    :raise MachineFault: it is not installed, or does not start.
    """
    if await is_running():
        return
    await asyncio.to_thread(_start_once)
    if not await is_running():
        raise MachineFault("Open vSwitch was started but does not answer", "see /var/log/openvswitch")


def _switch_answers() -> bool:
    try:
        command = ["ovs-appctl", "--timeout=3", "version"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _start_once() -> None:
    """Run ovs-ctl alone. It starts nothing that runs already. Its daemons must not inherit a pipe to us."""
    if not _OVS_CTL.exists():
        raise MachineFault("Open vSwitch is not installed", "apt install openvswitch-switch")
    with _START_LOCK.open("w") as lock, tempfile.TemporaryFile() as log:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [str(_OVS_CTL), "start", "--system-id=random"]
        status = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False).returncode
        if status != 0:
            log.seek(0)
            words = log.read().decode(errors="replace").strip().splitlines()
            raise MachineFault(f"Open vSwitch did not start: {words[-1] if words else status}")


async def _vsctl(*commands: list[str]) -> str:
    arguments: list[str] = []
    for command in commands:
        arguments += ["--", *command]
    return await run_tool("ovs-vsctl", "--timeout=5", *arguments)


async def _rows(table: str, columns: list[str], condition: str) -> list[dict[str, Any]]:
    """The rows of a table that meet a condition. Empty columns are OVSDB's empty set, ``["set", []]``."""
    text = await run_tool(
        "ovs-vsctl", "--timeout=5", "--format=json", f"--columns={','.join(columns)}", "find", table, condition
    )
    answer = json.loads(text)
    return [dict(zip(answer["headings"], row, strict=True)) for row in answer["data"]]
