"""Making a change of OpenFlow rules hold for every frame from now on, on this machine's Open vSwitch.

Theory of operation. Open vSwitch answers an OpenFlow barrier when its tables are changed, but frames are forwarded by
a cache of flows in front of them, which its revalidator threads bring up to date afterwards. Measured on 3.1: a VM's
frames left in the old color for up to 29 ms after the barrier reply with 4,000 cached flows, 59 ms with 20,000. That
would break rule R1 of the cut, and no OpenFlow message tells when the cache is up to date.
``revalidator/purge`` (ovs-vswitchd(8)) waits for the revalidators and then empties the cache before it answers; what
comes next meets the new tables. It concerns the datapath, so it is said to the local daemon, on its control socket:
one JSON-RPC exchange, without starting a program.
"""

import asyncio
import json
from pathlib import Path

from geni_violin.core.errors import MachineFault, PeerFault

RUN_DIR = Path("/var/run/openvswitch")


async def forget_cached_flows(timeout_s: float = 2.0, run_dir: Path = RUN_DIR) -> None:
    """Return when no frame is forwarded by rules older than this call any more.

    :raise MachineFault: Open vSwitch does not run here.
    :raise PeerFault: it does not answer in time, or refuses.
    """
    await _command("revalidator/purge", "empty its flow cache", timeout_s, run_dir)


async def await_a_turn(timeout_s: float = 2.0, run_dir: Path = RUN_DIR) -> None:
    """Return when every frame that Open vSwitch had read before this call has left it.

    Frames and commands are handled by its main thread, one after the other (a datapath of type netdev without DPDK).

    :raise MachineFault: Open vSwitch does not run here.
    :raise PeerFault: it does not answer in time, or refuses.
    """
    await _command("version", "answer", timeout_s, run_dir)


async def _command(method: str, what: str, timeout_s: float, run_dir: Path) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            answer = await _ask(run_dir, method)
    except TimeoutError:
        raise PeerFault(f"Open vSwitch did not {what} within {timeout_s} s") from None
    except (OSError, ValueError) as error:
        raise MachineFault(f"Open vSwitch's control socket in {run_dir} fails: {error}", "see that it runs") from error
    if answer.get("error"):
        raise PeerFault(f"Open vSwitch did not {what}: {answer['error']}")


async def _ask(run_dir: Path, method: str) -> dict[str, object]:
    pid = int((run_dir / "ovs-vswitchd.pid").read_text())
    reader, writer = await asyncio.open_unix_connection(run_dir / f"ovs-vswitchd.{pid}.ctl")
    try:
        writer.write(json.dumps({"id": 0, "method": method, "params": []}).encode())
        return await _one_object(reader)
    finally:
        writer.close()


async def _one_object(reader: asyncio.StreamReader) -> dict[str, object]:
    """Objects on this socket have no delimiter: one ends where it parses."""
    text = ""
    while chunk := await reader.read(65536):
        text += chunk.decode()
        try:
            answer: dict[str, object] = json.loads(text)
        except ValueError:
            continue
        return answer
    raise ConnectionResetError("closed before it answered")
