"""One connection to one switch: what was sent on it, and what the switch says to that.

Theory of operation. A connection is a queue. :meth:`Connection.enqueue` never yields to another green thread, so
plans reach the switch in the order in which they were enqueued; :meth:`Connection.flush` hands them to Ryu, whose
send queue is bounded, and may wait. A barrier reply confirms all that was sent before it. An error message means
that the switch is not what our books say: whoever owns the connection gives it up then.
"""

from collections import deque
from collections.abc import Iterable
from typing import Any

from ryu.lib import hub

from geni_violin.controller import of13
from geni_violin.controller.diff import Batch
from geni_violin.core.errors import PeerFault
from geni_violin.runtime.clock import monotonic_ms


class Reply:
    """Something that a switch has yet to answer, and what it has said so far."""

    def __init__(self, dpid: int, xids: Iterable[int], may_be_refused: bool = False) -> None:
        self.dpid = dpid
        self.xids = frozenset(xids)
        self.may_be_refused = may_be_refused
        self.entries: list[of13.FlowEntry] = []
        self.meters: dict[int, int] = {}
        self.highest_meter = 0
        self._failure = ""
        self._done: Any = hub.Event()

    def complete(self, failure: str = "") -> None:
        """The switch has answered, or never will: then ``failure`` says why."""
        if not self._done.is_set():
            self._failure = failure
            self._done.set()

    @property
    def is_answered(self) -> bool:
        """Whether the switch has answered, or has failed to for good."""
        return bool(self._done.is_set())

    def wait(self, deadline_ms: float) -> None:
        """Wait for the answer, until ``deadline_ms`` on the monotonic clock.

        :raise PeerFault: it did not come, or was not what was asked for.
        """
        if not self._done.wait(timeout=max(0.001, (deadline_ms - monotonic_ms()) / 1000.0)):
            raise PeerFault(f"switch {self.dpid:#x} did not confirm in time", "the request can be repeated")
        if self._failure:
            raise PeerFault(f"switch {self.dpid:#x}: {self._failure}", "its rules are read again when it reconnects")


class Connection:
    """A connected switch. ``datapath`` is Ryu's."""

    def __init__(self, datapath: Any) -> None:
        self.dpid: int = datapath.id
        self.datapath = datapath
        self._outbox: deque[bytes | bytearray] = deque()
        self._flushing = False
        self._pending: dict[int, Reply] = {}
        self._failure = ""

    def enqueue(self, batches: Iterable[Batch]) -> Reply:
        """Put changes in the queue; the reply is the switch's to the barrier after the last of them."""
        encoded = of13.encode(batches, self.datapath.set_xid)
        return self._enqueue(encoded.data, encoded.barrier_xid, encoded.xids)

    def enqueue_read(self, cookie: int, cookie_mask: int) -> Reply:
        """Ask for the rules of ours whose cookie fits; they are the reply's ``entries``."""
        data, xid = of13.flow_stats_request(cookie, cookie_mask, self.datapath.set_xid)
        return self._enqueue(data, xid, {xid})

    def enqueue_meter_features(self) -> Reply:
        """Ask what meters the switch can have: the reply's ``highest_meter``. It may refuse to know of any."""
        data, xid = of13.meter_features_request(self.datapath.set_xid)
        return self._enqueue(data, xid, {xid}, may_be_refused=True)

    def enqueue_meter_read(self) -> Reply:
        """Ask for the counts of all meters; they are the reply's ``meters``. It may refuse to know of any."""
        data, xid = of13.meter_stats_request(self.datapath.set_xid)
        return self._enqueue(data, xid, {xid}, may_be_refused=True)

    def _enqueue(
        self, data: bytes | bytearray, last_xid: int, xids: Iterable[int], may_be_refused: bool = False
    ) -> Reply:
        reply = Reply(self.dpid, xids, may_be_refused)
        if self._failure:
            reply.complete(self._failure)
        else:
            self._pending[last_xid] = reply
            self._outbox.append(data)
        return reply

    def flush(self) -> None:
        """Send what is in the queue. Who finds another green thread doing that leaves it to that one."""
        if self._flushing:
            return
        self._flushing = True
        try:
            while self._outbox:
                self.datapath.send(self._outbox.popleft())
        finally:
            self._flushing = False

    def barrier_replied(self, xid: int) -> None:
        """The switch has done all that was sent before that barrier."""
        reply = self._pending.pop(xid, None)
        if reply is not None:
            reply.complete()

    def flows_reported(self, message: Any) -> None:
        """One part of the answer to a read of rules has come."""
        reply = self._answered(message)
        if reply is not None:
            reply.entries += of13.flow_entries(message)
            self._end(reply, message)

    def meters_reported(self, message: Any) -> None:
        """One part of the answer to a read of meters has come."""
        reply = self._answered(message)
        if reply is not None:
            reply.meters |= of13.meter_counts(message)
            self._end(reply, message)

    def meter_features_reported(self, message: Any) -> None:
        """The switch has told what meters it can have."""
        reply = self._answered(message)
        if reply is not None:
            reply.highest_meter = of13.highest_meter(message)
            self._end(reply, message)

    def _answered(self, message: Any) -> Reply | None:
        return self._pending.get(message.xid)

    def _end(self, reply: Reply, message: Any) -> None:
        if not of13.has_more(message):
            del self._pending[message.xid]
            reply.complete()

    def refused(self, xid: int) -> bool:
        """A switch has refused a message; whether that is a surprise, and one about something of ours."""
        expected = self._pending.get(xid)
        if expected is not None and expected.may_be_refused:
            del self._pending[xid]
            expected.complete()
            return False
        return any(xid in reply.xids for reply in self._pending.values())

    def give_up(self, failure: str) -> None:
        """Fail all that is still unanswered, and close."""
        self._failure = failure
        pending, self._pending = self._pending, {}
        self._outbox.clear()
        for reply in pending.values():
            reply.complete(failure)
        self.datapath.close()
