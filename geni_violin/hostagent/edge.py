"""The contract of a VM's edge: where frames are held, told by color, recorded and replayed.

Theory of operation. The edge is the last place that a frame passes before its VM, and the first after it. While a cut
is under way it is *armed*: the network then gives it frames of both colors, with the slice's tag still on, and it
passes on what the VM may see (docs/architecture.md). The cut machine decides when; an adapter behind this contract
knows how.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from geni_violin.runtime.pcap import Frame


@dataclass(frozen=True)
class EdgeRecord:
    """What an edge did during a cut. ``frames_unrecorded`` would be among the received, but found no room there.

    ``received`` are the frames of the old color that the VM had not consumed at its cut, in order, without the tag, by
    the host's clock. ``sent`` are the frames that the VM sent while its edge held them, stamped by the guest's clock.
    ``frames_reordered`` reached the VM after one that may have been sent later, when the edge stepped aside.
    """

    frames_held: int = 0
    frames_overflowed: int = 0
    frames_unrecorded: int = 0
    received: Sequence[Frame] = field(default_factory=tuple)
    sent: Sequence[Frame] = field(default_factory=tuple)
    frames_reordered: int = 0


class Edge(Protocol):
    """One VM's edge. Every method can be repeated; errors are those of :mod:`geni_violin.hostagent.hypervisor`."""

    @property
    def place(self) -> str:
        """:data:`~geni_violin.core.model.IN_HYPERVISOR`, or IN_SWITCH: then it holds only what goes to the VM."""

    async def arm(self, vlan_id: int, epoch: int, on_future: Callable[[], None]) -> None:
        """From when this returns, every frame of ``epoch`` waits; frames of the epoch before pass.

        :param on_future: called once, in the event loop, when the first frame of ``epoch`` has come.
        """

    async def hold(self) -> None:
        """From when this returns, no frame reaches the VM or leaves it, and it has consumed all that was passed on.

        An edge in the switch lets frames leave.
        """

    async def until_sent_is_colored(self) -> None:
        """The VM has stopped, or what it sends is held: return when the switch has colored all that has left it."""

    async def release(self) -> None:
        """Pass on what waits, in order, both ways, and everything after it. Works in any state; ends every cut."""

    async def return_path(self) -> EdgeRecord:
        """Step aside: frames take their direct path again, none lost or doubled. The record of the cut.

        None is overtaken, or that is told.
        """

    async def replay_held(self, frames: Sequence[bytes]) -> None:
        """A VM that is loaded, does not run yet and gets no frames yet is to get these first: keep all others from it
        until :meth:`replay`."""

    async def replay(self, frames: Sequence[bytes]) -> None:
        """The VM runs: give it the frames that it is to get first, before any that wait, and then those."""

    async def resume_after_restart(self) -> None:
        """An earlier agent may have died with the edge armed: pass everything on, until :meth:`return_path`."""
