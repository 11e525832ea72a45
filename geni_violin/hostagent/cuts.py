"""The cuts of a host's VMs: promised, begun, followed, cancelled. One at a time for each VM."""

import asyncio
from collections.abc import Awaitable, Callable

from geni_violin.core.cut import Report, plans_at
from geni_violin.core.errors import Conflict, InvalidInput, NotFound
from geni_violin.core.messages import NETWORK_POLICIES, CutProgress, CutPromise, CutRequest, PrepareCut
from geni_violin.hostagent.cut_runner import CutRunner
from geni_violin.hostagent.edge import EdgeRecord
from geni_violin.hostagent.hypervisor import RUNNING, Vm

CANCEL_PATIENCE_S = 20.0
FALLBACKS = {"background": ("precopy", "stop"), "precopy": (), "stop": ()}
"""What stands in for a strategy that a VM's hypervisor refuses."""

RecolorVm = Callable[[str, str, int], Awaitable[None]]
"""Moves a VM's ports (slice, VM) on to an epoch; returns once every switch has confirmed."""


VmKey = tuple[str, str]
"""Slice and VM."""


def _key(vm: Vm) -> VmKey:
    return vm.definition.slice, vm.definition.name


class Cuts:
    """The cuts of this host. The last one of each VM is remembered until the next begins.

    A cut that is cancelled before it was asked for is remembered too: a request that was late on its way, and comes
    when its transaction is over, must not stop the VM any more.
    """

    def __init__(self, recolor: RecolorVm) -> None:
        self._recolor = recolor
        self._runners: dict[VmKey, CutRunner] = {}
        self._locks: dict[VmKey, asyncio.Lock] = {}
        self._cancelled_before: dict[VmKey, str] = {}

    def _lock(self, key: VmKey) -> asyncio.Lock:
        return self._locks.setdefault(key, asyncio.Lock())

    def _check_idle(self, vm: Vm) -> None:
        runner = self._runners.get(_key(vm))
        if runner is not None and not runner.over:
            raise Conflict(f"a cut of VM {vm.definition.name} is under way", "wait for it, or cancel it")

    async def prepare(self, vm: Vm, request: PrepareCut) -> CutPromise:
        """Promise a strategy and a network policy that work, those asked for or what stands in for them.

        :raise Conflict: the VM does not run, is being cut, or no strategy works.
        :raise InvalidInput: there is no such strategy or policy.
        """
        if request.strategy not in FALLBACKS:
            raise InvalidInput(f"there is no strategy {request.strategy!r}", f"choose from {', '.join(FALLBACKS)}")
        if request.network not in NETWORK_POLICIES:
            raise InvalidInput(f"there is no policy {request.network!r}", f"choose from {', '.join(NETWORK_POLICIES)}")
        async with self._lock(_key(vm)):
            self._check_idle(vm)
            state = await vm.status()
            if state != RUNNING:
                raise Conflict(f"VM {vm.definition.name} is {state}", "only a running VM can be cut")
            strategy, reason = await self._strategy(vm, request.strategy)
        network, network_reason = request.network, ""
        if (strategy, network) not in plans_at(vm.edge.place):
            network, network_reason = "drop", f"strategy {strategy} cannot hold frames, so early ones were dropped"
        return CutPromise(vm.definition.name, strategy, reason, vm.definition.memory_bytes, network, network_reason)

    async def _strategy(self, vm: Vm, wanted: str) -> tuple[str, str]:
        """The strategy to use, and why it is not the one that is wanted."""
        refusal = ""
        for strategy in (wanted, *FALLBACKS[wanted]):
            words = await vm.refusal(strategy)
            if not words:
                reason = f"strategy {wanted} was refused ({refusal}), so {strategy} was used" if refusal else ""
                return strategy, reason
            refusal = refusal or words
        raise Conflict(f"VM {vm.definition.name} cannot be cut with strategy {wanted}: {refusal}")

    async def arm(self, vm: Vm, request: CutRequest) -> CutProgress:
        """Begin a cut that waits for its trigger; returns when the VM's edge keeps every frame of the new color.

        :raise Conflict: another cut of the VM is under way, or this one was cancelled before it came.
        :raise PeerFault: the snapshot server is not ready for the image.
        """
        runner = await self._begun(vm, request)
        await runner.until(Report.ARMED)
        return await runner.progress()

    async def cut(self, vm: Vm, request: CutRequest) -> CutProgress:
        """Cut a VM; returns when it is cut and recolored, or when that has failed. A repeated request joins the first.

        :raise Conflict: another cut of the VM is under way, or this one was cancelled before it came.
        :raise PeerFault: the snapshot server is not ready for the image.
        """
        runner = await self._begun(vm, request)
        runner.request_cut()
        await runner.until(Report.CUT)
        return await runner.progress()

    async def _begun(self, vm: Vm, request: CutRequest) -> CutRunner:
        """The runner of a cut, which is started if it is not there."""
        key = _key(vm)
        async with self._lock(key):
            if self._cancelled_before.get(key) == request.transaction:
                raise Conflict(f"the cut of VM {key[1]} was cancelled before it began", "take the snapshot again")
            runner = self._runners.get(key)
            if runner is None or runner.request.transaction != request.transaction:
                self._check_idle(vm)
                runner = CutRunner(vm, request, lambda: self._recolor(*key, request.epoch))
                await runner.start()
                self._runners[key] = runner
        return runner

    async def settle(self, vm: Vm, transaction: str, keep: bool = False) -> EdgeRecord:
        """The network is disarmed: have the VM's edge step aside. Gives what it did during the cut, once or again.

        A VM without a cut of that transaction, as after an agent's restart, gets its direct path back too.

        :param keep: the record is wanted, whole.
        :raise Conflict: it is wanted and lost (the edge has stepped aside all the same), or another cut is under way.
        """
        runner, loss = self._runners.get(_key(vm)), "the agent has restarted"
        if runner is not None and runner.request.transaction == transaction:
            runner.network_disarmed()
            await runner.until(Report.SETTLED)
            if runner.record is not None:
                return runner.record
            loss = (await runner.progress()).failure
        async with self._lock(_key(vm)):
            self._check_idle(vm)
            record = await vm.edge.return_path()
        if keep:
            words = f"what the edge of VM {vm.definition.name} recorded is lost: {loss}"
            raise Conflict(words, "take the snapshot again")
        return record

    def _runner(self, slice_name: str, vm: str, transaction: str) -> CutRunner:
        runner = self._runners.get((slice_name, vm))
        if runner is None or runner.request.transaction != transaction:
            raise NotFound(f"VM {vm} has no cut of transaction {transaction}")
        return runner

    async def progress(self, slice_name: str, vm: str, transaction: str, wait_ms: float) -> CutProgress:
        """How far a cut is; waits up to ``wait_ms`` for the end of its stream.

        :raise NotFound: there is no such cut.
        """
        runner = self._runner(slice_name, vm, transaction)
        await runner.until_over(wait_ms / 1000.0)
        return await runner.progress()

    async def cancel(self, slice_name: str, vm: str, transaction: str) -> CutProgress:
        """Undo a cut and wait until the VM runs with its frames let go. One that is over stays as it is.

        :raise NotFound: there is no such cut; should it still be asked for, it will be refused.
        """
        async with self._lock((slice_name, vm)):  # waits for a cut that is about to begin
            try:
                runner = self._runner(slice_name, vm, transaction)
            except NotFound:
                self._cancelled_before[slice_name, vm] = transaction
                raise
        runner.cancel("the snapshot was abandoned")
        await runner.until_over(CANCEL_PATIENCE_S)
        return await runner.progress()

    async def forget(self, slice_name: str, vm: str) -> None:
        """The VM is about to be removed: a cut under way is cancelled."""
        async with self._lock((slice_name, vm)):
            runner = self._runners.pop((slice_name, vm), None)
        if runner is not None and not runner.over:
            runner.cancel("the VM is removed")
            await runner.until_over(CANCEL_PATIENCE_S)
