"""What happens to a transaction, in the past tense, and what it has done, in the imperative.

The events come from whoever carries out the commands (the coordinator's driver, the explorer, the tests);
:mod:`geni_violin.core.transaction` says what follows from them. Plain data.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from geni_violin.core.messages import ChannelSummary, CutPromise, CutReport, EdgeReport, ImageStatus, StreamReport

NETWORK, STORE = "the network", "the snapshot server"
"""The parties that are no VM."""

# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VmPrepared:
    """A host agent promises that it can cut this VM."""

    promise: CutPromise


@dataclass(frozen=True)
class NetworkPrepared:
    """All switches carry the slice's rules. ``frames_dropped`` is the slice's count so far."""

    frames_dropped: int


@dataclass(frozen=True)
class ImagesStaged:
    """The snapshot server has room for every image and waits for the streams."""


@dataclass(frozen=True)
class VmArmed:
    """A VM's edge keeps every frame of the new color."""

    vm: str


@dataclass(frozen=True)
class NetworkArmed:
    """Every switch of the slice answered a barrier a moment ago, and gives armed ports the frames of both colors."""


@dataclass(frozen=True)
class VmCut:
    """A VM is cut and its ports are recolored."""

    report: CutReport


@dataclass(frozen=True)
class VmStreamed:
    """A VM's image has left its host whole."""

    report: StreamReport


@dataclass(frozen=True)
class ImageStored:
    """An image is durable at the snapshot server."""

    status: ImageStatus


@dataclass(frozen=True)
class FramesCounted:
    """The slice's count of dropped frames after the cut; None if it could not be had."""

    frames_dropped: int | None


@dataclass(frozen=True)
class ColorRetired:
    """No frame of the old color is alive: the counters say so, or else the maximum frame lifetime has passed."""

    by_counters: bool


@dataclass(frozen=True)
class NetworkDisarmed:
    """All ports get frames without a tag again."""


@dataclass(frozen=True)
class VmSettled:
    """A VM's edge has stepped aside, and its record is at the snapshot server; ``report`` is None after an abort."""

    vm: str
    report: EdgeReport | None


@dataclass(frozen=True)
class ChannelsSealed:
    """The snapshot server has put the channel state together."""

    summaries: tuple[ChannelSummary, ...]


@dataclass(frozen=True)
class ManifestPublished:
    """The snapshot exists."""


@dataclass(frozen=True)
class Refused:
    """``party`` (a VM's name, NETWORK or STORE) cannot do, or did not do, what it was asked."""

    party: str
    reason: str


@dataclass(frozen=True)
class VmReleased:
    """A VM has no cut under way any more: cancelled, or its agent is unreachable and its own deadline does it."""

    vm: str


@dataclass(frozen=True)
class NetworkAdvanced:
    """All ports of the slice have the new color, no frame of the old one is alive, and no port is armed."""


@dataclass(frozen=True)
class ImagesDiscarded:
    """The snapshot server has thrown the images away."""


@dataclass(frozen=True)
class CancelRequested:
    """A person, or the deletion of the slice, wants the snapshot abandoned."""

    reason: str


@dataclass(frozen=True)
class TimerFired:
    """A timer that was set has run out."""

    name: str


@dataclass(frozen=True)
class CoordinatorRestarted:
    """The coordinator came back after a crash and found this transaction unfinished."""


Event = (
    VmPrepared
    | NetworkPrepared
    | ImagesStaged
    | VmArmed
    | NetworkArmed
    | VmCut
    | VmStreamed
    | ImageStored
    | FramesCounted
    | ColorRetired
    | NetworkDisarmed
    | VmSettled
    | ChannelsSealed
    | ManifestPublished
    | Refused
    | VmReleased
    | NetworkAdvanced
    | ImagesDiscarded
    | CancelRequested
    | TimerFired
    | CoordinatorRestarted
)

# --- commands ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrepareVm:
    """Ask a VM's agent for its promise."""

    vm: str


@dataclass(frozen=True)
class PrepareNetwork:
    """Have the controller install the slice's rules as they should be."""


@dataclass(frozen=True)
class StageImages:
    """Have the snapshot server make room; ``memory_bytes`` by VM name."""

    memory_bytes: Mapping[str, int]


@dataclass(frozen=True)
class ArmVm:
    """Have a VM's edge keep every frame of ``epoch`` until the VM is cut into it."""

    vm: str
    epoch: int
    strategy: str


@dataclass(frozen=True)
class ArmNetwork:
    """Have every switch confirm that it answers now, and give the ports of ``vms`` the frames of ``epoch`` too."""

    epoch: int
    vms: tuple[str, ...]


@dataclass(frozen=True)
class CutVm:
    """Cut this VM into ``epoch``."""

    vm: str
    epoch: int
    strategy: str
    network: str
    delay_ms: float


@dataclass(frozen=True)
class CountFrames:
    """Read the slice's count of dropped frames."""


@dataclass(frozen=True)
class RetireColor:
    """Find out when no frame of the color before ``epoch`` is alive any more."""

    epoch: int


@dataclass(frozen=True)
class DisarmNetwork:
    """Give all ports frames without a tag again."""

    epoch: int


@dataclass(frozen=True)
class SettleVm:
    """Have a VM's edge step aside and bring what it recorded to the snapshot server, if ``keep``."""

    vm: str
    keep: bool


@dataclass(frozen=True)
class SealChannels:
    """Have the snapshot server put the channel state together."""


@dataclass(frozen=True)
class PublishManifest:
    """Make the snapshot exist, in one atomic step. Repeated until the answer is known."""


@dataclass(frozen=True)
class CancelVm:
    """Have a VM's agent undo its cut."""

    vm: str


@dataclass(frozen=True)
class AdvanceNetwork:
    """Drive every port of the slice on to ``epoch``, retire the old color, disarm. Repeated until it is confirmed."""

    epoch: int


@dataclass(frozen=True)
class DiscardImages:
    """Have the snapshot server throw the images away. Repeated until it is confirmed."""


@dataclass(frozen=True)
class SetTimer:
    """Deliver :class:`TimerFired` at ``at_ms``, if the transaction is not over by then."""

    name: str
    at_ms: float


Command = (
    PrepareVm
    | PrepareNetwork
    | StageImages
    | ArmVm
    | ArmNetwork
    | CutVm
    | CountFrames
    | RetireColor
    | DisarmNetwork
    | SettleVm
    | SealChannels
    | PublishManifest
    | CancelVm
    | AdvanceNetwork
    | DiscardImages
    | SetTimer
)
