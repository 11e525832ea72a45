"""One VM's cut, carried out: the runner and the desk of cuts, over a VM without QEMU."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from fake_vm import STREAM_BYTES, FakeQemu, FakeVm, breaks, fails, hangs, takes

from geni_violin.core.errors import Conflict, GeniViolinError, InvalidInput, NotFound, PeerFault
from geni_violin.core.messages import CutProgress, CutRequest, PrepareCut
from geni_violin.hostagent import cut_runner
from geni_violin.hostagent.cut_runner import mark_of, undo_interrupted_cut
from geni_violin.hostagent.cuts import Cuts
from geni_violin.hostagent.hypervisor import Nic, VmDefinition
from geni_violin.runtime import pcap

KEY = ("lab", "n1")


class Receiver:
    """Takes images as the snapshot server does, in a thread; ``refusal`` is what it answers instead of ok."""

    def __init__(self) -> None:
        self.images: list[bytes] = []
        self.refusal = ""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection, connection.makefile("rb") as file:
                    file.readline()
                    if self.refusal:
                        connection.sendall(b'{"error": "%s"}\n' % self.refusal.encode())
                        continue
                    connection.sendall(b'{"ok": true}\n')
                    self.images.append(file.read())

    def close(self) -> None:
        """Stop; an image under way is waited for. Nothing happens the second time."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(timeout=5)
        assert not self._thread.is_alive(), "a stream is still open"


class Bench:
    """A running VM, the cuts of its host, and a network that can be scripted."""

    def __init__(self, folder: Path) -> None:
        definition = VmDefinition(
            "lab", "n1", "h1", "/k", "/i", "", memory_mib=1, vcpus=1, nics=(Nic("tap0", "52:54:00:00:00:01"),)
        )
        folder.mkdir(exist_ok=True)
        self.definition = definition
        self.qemu = FakeQemu(definition, folder)
        self.qemu.resume()
        self.qemu.trace.clear()
        self.vm = FakeVm(self.qemu)
        self.receiver = Receiver()
        self.network: list[Callable[[], Awaitable[None]]] = []
        self.cuts = Cuts(self._recolor)

    async def _recolor(self, slice_name: str, vm: str, epoch: int) -> None:
        self.qemu.trace.append(f"recolor {slice_name} {vm} {epoch}")
        if self.network:
            await self.network.pop(0)()
        self.qemu.trace.append("recolored")

    def request(
        self, transaction: str = "t1", strategy: str = "background", delay_ms: float = 0.0, network: str = "drop"
    ) -> CutRequest:
        """A cut with small deadlines."""
        port = self.receiver.port
        return CutRequest(
            transaction, 1, strategy, "color", network, 7, 400, 3000, "127.0.0.1", port, "token", delay_ms
        )

    async def cut(self, request: CutRequest | None = None) -> CutProgress:
        """Cut, to the end of the stream."""
        request = request or self.request()
        await self.cuts.cut(self.vm, request)
        return await self.cuts.progress(*KEY, request.transaction, wait_ms=10_000)

    def assert_at_ease(self) -> None:
        """Nothing of a cut is left."""
        assert self.qemu.run_state == "running" and not self.qemu.holding and not self.qemu.migrating
        assert not self.qemu.diverted
        assert not mark_of(self.vm).exists()


def bench(test: Callable[[Bench], Awaitable[None]]) -> Callable[[Path], None]:
    """Make a test out of ``async def test(bench)``."""

    @contextlib.asynccontextmanager
    async def made(folder: Path) -> AsyncIterator[Bench]:
        on = Bench(folder / "n1")
        try:
            yield on
        finally:
            await asyncio.to_thread(on.receiver.close)  # the agent holds its end of a stream for a while

    async def play(folder: Path) -> None:
        async with asyncio.timeout(30), made(folder) as on:
            await test(on)

    def run(tmp_path: Path) -> None:
        asyncio.run(play(tmp_path))

    run.__name__ = getattr(test, "__name__", "run")
    return run


@bench
async def test_the_three_strategies_in_their_orders(on: Bench) -> None:
    orders = {
        "background": ["hold", "STOP", "RESUME", "recolored", "release"],
        "precopy": ["STOP", "pre-switchover", "recolored", "continue", "completed", "RESUME"],
        "stop": ["STOP", "recolored", "start", "completed", "RESUME"],
    }
    for number, (strategy, order) in enumerate(orders.items()):
        on.qemu.trace.clear()
        progress = await on.cut(on.request(f"t{number}", strategy))
        assert progress.phase == "streamed" and progress.cut is not None and progress.streamed is not None
        assert progress.streamed.sent_bytes == STREAM_BYTES
        assert [step for step in dict.fromkeys(on.qemu.trace) if step in order] == order
        on.assert_at_ease()
    on.receiver.close()
    assert [len(image) for image in on.receiver.images] == 3 * [STREAM_BYTES]


@bench
async def test_the_mark_is_there_from_before_anything_is_done_to_the_end(on: Bench) -> None:
    seen: list[bool] = []

    async def look() -> None:
        seen.append(mark_of(on.vm).exists())

    for point in ("hold", "stopped", "release", "end"):
        on.qemu.trouble(point, look)
    await on.cut()
    assert seen == 4 * [True]
    on.assert_at_ease()


@bench
async def test_after_the_end_is_told_the_next_cut_is_welcome_at_once(on: Bench) -> None:
    for number in range(20):
        await on.cut(on.request(f"t{number}"))
        await on.cuts.prepare(on.vm, PrepareCut(f"t{number + 1}", "background"))


@bench
async def test_a_snapshot_server_that_refuses_or_is_away_leaves_the_vm_untouched(on: Bench) -> None:
    on.receiver.refusal = "no image is awaited under this token"
    with pytest.raises(PeerFault, match="no image is awaited"):
        await on.cuts.cut(on.vm, on.request())
    on.receiver.close()
    with pytest.raises(PeerFault, match="takes no connection"):
        await on.cuts.cut(on.vm, on.request("t2"))
    assert on.qemu.trace == []
    on.assert_at_ease()


@bench
async def test_a_mark_that_cannot_be_written_leaves_the_vm_untouched(on: Bench) -> None:
    on.qemu.folder.rmdir()
    with pytest.raises(GeniViolinError, match="cannot be noted"):
        await on.cuts.cut(on.vm, on.request())
    assert on.qemu.trace == []


@bench
async def test_a_recolor_that_hangs_is_given_up_by_the_cut_deadline(on: Bench) -> None:
    on.network.append(hangs)
    progress = await on.cut()
    assert (progress.phase, progress.cut) == ("cancelled", None)
    assert "within its deadline" in progress.failure
    on.assert_at_ease()


@bench
async def test_a_recolor_that_is_not_confirmed_is_asked_for_again(on: Bench) -> None:
    on.network += [breaks(PeerFault("the controller does not answer")), breaks(NotFound("it knows no such slice"))]
    progress = await on.cut()
    assert progress.phase == "streamed" and on.qemu.trace.count("recolor lab n1 1") == 3


@bench
async def test_a_recolor_that_fails_in_whatever_way_cancels(on: Bench) -> None:
    for number, trouble in enumerate((fails("409"), breaks(RuntimeError("defect")))):
        on.network.append(trouble)
        progress = await on.cut(on.request(f"t{number}", "precopy"))
        assert "the recolor was not confirmed" in progress.failure
        on.assert_at_ease()


@bench
async def test_a_repeated_request_joins_the_first(on: Bench) -> None:
    on.qemu.trouble("stopped", takes(0.05))
    first, second = await asyncio.gather(*(on.cuts.cut(on.vm, on.request()) for _ in range(2)))
    assert first.cut == second.cut and on.qemu.trace.count("STOP") == 1
    with pytest.raises(NotFound):
        await on.cuts.progress(*KEY, "t9", wait_ms=0)


@pytest.mark.parametrize(("strategy", "calls"), [("background", ["pace", "end_pace"]), ("stop", [])])
def test_only_the_image_of_a_vm_that_runs_meanwhile_is_paced(tmp_path: Path, strategy: str, calls: list[str]) -> None:
    @bench
    async def paced(on: Bench) -> None:
        on.qemu.trouble("middle", takes(0.3))
        await on.cuts.cut(on.vm, on.request(strategy=strategy))
        assert (await on.cuts.progress(*KEY, "t1", wait_ms=10_000)).phase == "streamed"

    called: list[str] = []
    with (
        mock.patch.object(cut_runner, "pace", lambda *_: called.append("pace")),
        mock.patch.object(cut_runner, "end_pace", lambda *_: called.append("end_pace")),
        mock.patch.object(cut_runner, "_PACED_AFTER_CUT_S", 0.05),
    ):
        paced(tmp_path)
    assert called == calls


@bench
async def test_one_cut_of_a_vm_at_a_time(on: Bench) -> None:
    on.qemu.trouble("middle", takes(0.2))
    await on.cuts.cut(on.vm, on.request())
    with pytest.raises(Conflict, match="under way"):
        await on.cuts.cut(on.vm, on.request("t2"))
    with pytest.raises(Conflict, match="under way"):
        await on.cuts.prepare(on.vm, PrepareCut("t2", "background"))
    assert (await on.cuts.progress(*KEY, "t1", wait_ms=10_000)).phase == "streamed"


@bench
async def test_a_cut_can_be_cancelled_while_it_waits_and_while_it_streams(on: Bench) -> None:
    cutting = asyncio.create_task(on.cuts.cut(on.vm, on.request(delay_ms=60_000)))
    while not mark_of(on.vm).exists():  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    assert (await on.cuts.cancel(*KEY, "t1")).phase == "cancelled"
    assert (await cutting).phase == "cancelled"
    assert on.qemu.trace == []
    on.qemu.trouble("middle", hangs)
    await on.cuts.cut(on.vm, on.request("t2"))
    assert (await on.cuts.cancel(*KEY, "t2")).phase == "cancelled"
    on.assert_at_ease()


@bench
async def test_a_cut_that_was_cancelled_before_it_came_is_refused(on: Bench) -> None:
    with pytest.raises(NotFound):
        await on.cuts.cancel(*KEY, "t1")
    with pytest.raises(Conflict, match="cancelled before it began"):
        await on.cuts.cut(on.vm, on.request("t1"))
    assert on.qemu.trace == []
    assert (await on.cut(on.request("t2"))).phase == "streamed"


@bench
async def test_a_cancellation_waits_for_a_cut_that_is_about_to_begin(on: Bench) -> None:
    cutting = asyncio.create_task(on.cuts.cut(on.vm, on.request()))
    await asyncio.sleep(0)  # it has the lock, and connects in a thread
    await on.cuts.cancel(*KEY, "t1")
    assert (await cutting).phase in ("cancelled", "streamed")
    on.assert_at_ease()


@bench
async def test_a_vm_that_dies_is_lost_whatever_is_asked_of_it_then(on: Bench) -> None:
    for number, point in enumerate(("hold", "stopped", "middle", "progress", "release")):
        on.qemu.dead, on.qemu.holding = False, False
        on.qemu.resume()
        on.qemu.trouble(point, on.qemu.die)
        progress = await on.cut(on.request(f"t{number}"))
        assert progress.failure
        assert not mark_of(on.vm).exists()


@bench
async def test_an_agent_that_stops_in_a_cut_leaves_the_mark_and_the_next_undoes_the_cut(on: Bench) -> None:
    reached = asyncio.Event()

    async def stay() -> None:
        reached.set()
        await hangs()

    on.qemu.trouble("stopped", stay)
    cutting = asyncio.create_task(on.cuts.cut(on.vm, on.request()))
    await reached.wait()
    cutting.cancel()
    task = on.cuts._runners[KEY]._task
    assert task is not None
    task.cancel()
    await asyncio.wait({task})
    assert mark_of(on.vm).exists() and on.qemu.run_state == "paused" and on.qemu.holding
    on.qemu.trouble("cancel", fails("Command 'migrate_cancel' timed out"))
    assert await undo_interrupted_cut(FakeVm(on.qemu))
    on.assert_at_ease()
    assert not await undo_interrupted_cut(FakeVm(on.qemu))


@bench
async def test_a_cut_of_a_vm_that_died_meanwhile_is_undone_too(on: Bench) -> None:
    mark_of(on.vm).write_bytes(b"t1")
    await on.qemu.die()
    assert await undo_interrupted_cut(on.vm)
    assert not mark_of(on.vm).exists()


@bench
async def test_what_a_promise_says(on: Bench) -> None:
    promise = await on.cuts.prepare(on.vm, PrepareCut("t1", "background"))
    assert (promise.strategy, promise.fallback_reason, promise.memory_bytes) == ("background", "", 1 << 20)
    on.qemu.refusals |= {"background": "no userfaultfd", "precopy": "not migratable"}
    promise = await on.cuts.prepare(on.vm, PrepareCut("t1", "background"))
    assert promise.strategy == "stop" and "no userfaultfd" in promise.fallback_reason
    with pytest.raises(Conflict, match="not migratable"):
        await on.cuts.prepare(on.vm, PrepareCut("t1", "precopy"))
    with pytest.raises(InvalidInput, match="telepathy"):
        await on.cuts.prepare(on.vm, PrepareCut("t1", "telepathy"))
    on.qemu.stop()
    with pytest.raises(Conflict, match="paused"):
        await on.cuts.prepare(on.vm, PrepareCut("t1", "background"))


@bench
async def test_forgetting_a_vm_ends_its_cut(on: Bench) -> None:
    on.qemu.trouble("middle", hangs)
    await on.cuts.cut(on.vm, on.request())
    await on.cuts.forget(*KEY)
    on.assert_at_ease()
    with pytest.raises(NotFound):
        await on.cuts.progress(*KEY, "t1", wait_ms=0)


# --- the hold policy --------------------------------------------------------------------------------------------------


async def armed(on: Bench, transaction: str = "t1", strategy: str = "background", delay_ms: float = 0.0) -> CutRequest:
    """Arm the VM's edge for a cut."""
    request = on.request(transaction, strategy, delay_ms, network="hold")
    progress = await on.cuts.arm(on.vm, request)
    assert (progress.phase, progress.cut) == ("waiting", None) and on.qemu.diverted
    return request


@bench
async def test_an_armed_edge_holds_from_its_cut_to_its_release_and_steps_aside_at_the_end(on: Bench) -> None:
    orders = {
        "background": ["arm", "hold", "STOP", "RESUME", "recolored", "release", "return path"],
        "stop": ["arm", "hold", "STOP", "recolored", "start", "completed", "RESUME", "release", "return path"],
    }
    for number, (strategy, order) in enumerate(orders.items()):
        on.qemu.trace.clear()
        on.qemu.received = [pcap.Frame(1, b"old")]
        request = await armed(on, f"t{number}", strategy)
        progress = await on.cuts.cut(on.vm, request)
        assert progress.cut is not None and progress.cut.trigger == "coordinator" and progress.cut.hold_ms > 0
        assert on.qemu.diverted, "the edge has stepped aside before the network is disarmed"
        record = await on.cuts.settle(on.vm, request.transaction)
        assert record.received == on.qemu.received
        assert (await on.cuts.settle(on.vm, request.transaction)) == record
        assert (await on.cuts.progress(*KEY, request.transaction, wait_ms=10_000)).phase == "streamed"
        assert [step for step in dict.fromkeys(on.qemu.trace) if step in order] == order
        on.assert_at_ease()


@pytest.mark.parametrize("network", ["hold", "drop"])
def test_a_vm_whose_edge_is_in_the_switch_stands_still_until_it_is_recolored(tmp_path: Path, network: str) -> None:
    """The pause order; what the VM has sent is colored before the recolor; QEMU resumes the VM by itself."""

    @bench
    async def scenario(on: Bench) -> None:
        nic = replace(on.definition.nics[0], hold_tap="hold0")
        on.qemu.definition = replace(on.definition, nics=(nic,))
        promise = await on.cuts.prepare(on.vm, PrepareCut("t1", "background", network))
        assert (promise.strategy, promise.network) == ("background", network)
        request = await armed(on) if network == "hold" else on.request()
        progress = await on.cuts.cut(on.vm, request)
        assert progress.cut is not None and progress.cut.downtime_ms > 0
        if network == "hold":
            await on.cuts.settle(on.vm, request.transaction)
        await on.cuts.progress(*KEY, request.transaction, wait_ms=10_000)
        order = ["STOP", "all is colored", "recolored", "active", "RESUME", "completed"]
        around = ["arm", "hold", "release", "return path"] if network == "hold" else []
        seen = [step for step in dict.fromkeys(on.qemu.trace) if step in (*order, *around)]
        assert [step for step in seen if step in order] == order
        assert [step for step in seen if step in around] == around
        assert not around or (seen.index("hold") < seen.index("STOP") and seen.index("RESUME") < seen.index("release"))
        on.assert_at_ease()

    scenario(tmp_path)


@bench
async def test_a_future_frame_starts_the_cut_before_the_coordinator_does(on: Bench) -> None:
    request = await armed(on, delay_ms=60_000)
    on.qemu.future_frame_seen()
    progress = await on.cuts.cut(on.vm, request)
    assert progress.cut is not None and progress.cut.trigger == "future frame"
    await on.cuts.settle(on.vm, request.transaction)


@bench
async def test_without_the_second_trigger_the_delay_is_kept(on: Bench) -> None:
    request = replace(on.request(delay_ms=50.0, network="hold"), second_trigger=False)
    await on.cuts.arm(on.vm, request)
    on.qemu.future_frame_seen()
    began = time.monotonic()
    progress = await on.cuts.cut(on.vm, request)
    assert progress.cut is not None and progress.cut.trigger == "coordinator" and time.monotonic() - began > 0.045
    await on.cuts.settle(on.vm, request.transaction)


@bench
async def test_an_armed_edge_that_is_forgotten_goes_on_passing_frames_until_it_is_settled(on: Bench) -> None:
    request = await armed(on)
    progress = await on.cuts.progress(*KEY, "t1", wait_ms=10_000)
    assert progress.phase == "cancelled" and "no cut came" in progress.failure
    assert on.qemu.diverted and not on.qemu.holding, "the network still sends tagged frames"
    await on.cuts.settle(on.vm, request.transaction)
    on.assert_at_ease()


@bench
async def test_a_cut_that_is_cancelled_leaves_the_edge_to_the_settlement(on: Bench) -> None:
    for number, point in enumerate(("hold", "start", "middle")):
        request = await armed(on, f"t{number}")
        on.qemu.trouble(point, fails())
        assert (await on.cut(request)).phase == "cancelled"
        assert on.qemu.diverted and not on.qemu.holding and on.qemu.run_state == "running"
        await on.cuts.settle(on.vm, request.transaction)
        on.assert_at_ease()


@bench
async def test_an_edge_that_cannot_be_armed_is_told(on: Bench) -> None:
    on.qemu.trouble("arm", fails("no such object"))
    progress = await on.cuts.arm(on.vm, on.request(network="hold"))
    assert "no such object" in progress.failure
    await on.cuts.settle(on.vm, "t1")
    on.assert_at_ease()


@bench
async def test_an_agent_that_knows_of_no_cut_settles_an_edge_all_the_same(on: Bench) -> None:
    on.qemu.diverted = True
    await on.cuts.settle(on.vm, "t1")
    on.assert_at_ease()


@bench
async def test_a_record_that_is_wanted_and_lost_is_told_when_the_edge_has_stepped_aside(on: Bench) -> None:
    on.qemu.diverted = True
    with pytest.raises(Conflict, match="is lost: the agent has restarted"):
        await on.cuts.settle(on.vm, "t1", keep=True)
    on.assert_at_ease()
    request = await armed(on, "t2")
    on.qemu.trouble("return path", fails("QMP timed out"))
    await on.cuts.cut(on.vm, request)
    with pytest.raises(Conflict, match="is lost: QMP timed out"):
        await on.cuts.settle(on.vm, "t2", keep=True)
    on.assert_at_ease()


@bench
async def test_a_late_request_to_settle_an_earlier_cut_does_not_touch_a_later_one(on: Bench) -> None:
    await armed(on, "t2")
    with pytest.raises(Conflict, match="under way"):
        await on.cuts.settle(on.vm, "t1")
    assert on.qemu.diverted
    await on.cuts.cancel(*KEY, "t2")
    await on.cuts.settle(on.vm, "t2")
    on.assert_at_ease()


@bench
async def test_a_stream_that_has_ended_is_not_taken_for_one_that_stands_still(on: Bench) -> None:
    """Its edge waits for the network, which waits for another VM."""
    await on.cuts.cut(on.vm, await armed(on))
    progress = await on.cuts.progress(*KEY, "t1", wait_ms=1500)
    assert (progress.phase, progress.failure) == ("streaming", "")
    await on.cuts.settle(on.vm, "t1", keep=True)
    assert (await on.cuts.progress(*KEY, "t1", wait_ms=10_000)).phase == "streamed"
    on.assert_at_ease()


@bench
async def test_what_a_promise_says_of_the_network(on: Bench) -> None:
    promise = await on.cuts.prepare(on.vm, PrepareCut("t1", "background", "hold"))
    assert (promise.network, promise.network_reason) == ("hold", "")
    promise = await on.cuts.prepare(on.vm, PrepareCut("t1", "precopy", "hold"))
    assert promise.network == "drop" and "precopy cannot hold" in promise.network_reason
    with pytest.raises(InvalidInput, match="pigeon"):
        await on.cuts.prepare(on.vm, PrepareCut("t1", "background", "pigeon"))
