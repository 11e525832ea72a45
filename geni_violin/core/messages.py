"""What the parts say to each other: the bodies of their REST requests and answers.

One definition for both ends. ``docs/protocol.md`` tells which request carries which message. Times are seconds since
1970 where a name ends in ``_at``, else in milliseconds; sizes are in bytes.
"""

from dataclasses import dataclass, field

from geni_violin.core.model import SliceSpec, VmSpec

STRATEGIES = ("background", "precopy", "stop")
NETWORK_POLICIES = ("hold", "drop")
COORDINATIONS = ("color", "none")


# --- the controller ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RecolorRequest:
    """Move ports on to ``epoch``; ``vms`` is None for every port of the slice."""

    epoch: int
    vms: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Recolored:
    """Every switch concerned has sent its barrier reply. ``barrier_ms`` is how long that took."""

    barrier_ms: float


@dataclass(frozen=True)
class ArmRequest:
    """Give these VMs' ports, whose edges are confirmed to hold, the frames of ``epoch`` - 1 and ``epoch``, tagged.

    ``epoch`` is the one that the VMs are about to be cut into.
    """

    epoch: int
    vms: tuple[str, ...]


@dataclass(frozen=True)
class DisarmRequest:
    """Give all ports of the slice, which have all reached ``epoch``, their frames without a tag again."""

    epoch: int


@dataclass(frozen=True)
class PortCounters:
    """Frames at one VM's port since its slice was installed. ``frames_foreign`` had a source MAC not its own."""

    vm: str
    color: int
    frames_delivered: int
    frames_dropped: int
    frames_foreign: int = 0


@dataclass(frozen=True)
class ColorCounters:
    """Mattern's counters of one color of a slice: frames that entered the network, and frames that came to an end.

    A frame comes to an end where it is delivered, dropped or handed to an edge that holds it. ``alive`` is how many are
    still on their way.
    """

    color: int
    entered: int
    ended: int
    alive: int


# --- the snapshot server ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExpectedImage:
    """An image that will come, and the most bytes that it can have."""

    vm: str
    expected_bytes: int


@dataclass(frozen=True)
class StageRequest:
    """Make room for the images of a snapshot that is about to be taken. ``slice`` is whose quota it counts to."""

    snapshot_id: str
    name: str
    images: tuple[ExpectedImage, ...]
    slice: str = ""


@dataclass(frozen=True)
class Staged:
    """Where to send the images; ``tokens`` by VM name the stream that a connection carries."""

    ingest_host: str
    ingest_port: int
    tokens: dict[str, str]


@dataclass(frozen=True)
class ImageStatus:
    """How far one image is: ``state`` is waiting, receiving, durable or failed (then with a ``reason``).

    ``note`` is what people should know of a durable one, such as that its stream was not understood; mostly empty.
    """

    vm: str
    state: str
    received_bytes: int = 0
    stored_bytes: int = 0
    blake3: str = ""
    reason: str = ""
    note: str = ""


@dataclass(frozen=True)
class SealChannels:
    """Put the channel state of a staged snapshot together; ``macs`` by VM name tell whom a sent frame was for."""

    macs: dict[str, str]


@dataclass(frozen=True)
class ChannelSummary:
    """The channel state of one VM: the frames that a restore will replay to it, and what they amount to.

    ``late_frames`` of them were still held at other VMs' edges when those were recolored. ``undecided_frames`` is how
    many frames this VM sent around its cut of which it cannot be told whether they were late, and ``note`` why.
    """

    vm: str
    frames: int
    frame_bytes: int
    late_frames: int = 0
    undecided_frames: int = 0
    note: str = ""


@dataclass(frozen=True)
class SnapshotSpace:
    """What a snapshot takes. All its bytes are counted without pages that are full of one byte.

    ``logical_bytes`` are all pages of all its VMs, and the state of their devices. ``stored_bytes`` is what it added to
    the store when it was taken. ``needed_bytes`` is what of the store it needs now, ``shared_bytes`` the part of it
    that another snapshot needs too: deleting the snapshot frees whole packs of the rest, a collection what is left.
    """

    id: str
    name: str
    slice: str
    logical_bytes: int
    stored_bytes: int
    needed_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class StoreStats:
    """What the whole store takes.

    ``stored_bytes`` are all packs, ``rubbish_bytes`` the part of them that nothing needs, ``map_bytes`` all image maps;
    ``logical_bytes`` is the sum over the snapshots, which may have pages in common; ``needed_bytes`` and
    ``shared_bytes`` are as in :class:`SnapshotSpace`, each item counted once.
    """

    snapshots: tuple[SnapshotSpace, ...]
    logical_bytes: int
    stored_bytes: int
    needed_bytes: int
    shared_bytes: int
    rubbish_bytes: int
    map_bytes: int
    packs: int
    free_bytes: int | None


@dataclass(frozen=True)
class CollectionPlan:
    """What a collection of rubbish would do, or did.

    :ivar delete: packs that nothing needs.
    :ivar rewrite: packs of which enough is rubbish to have the rest of them moved to new packs.
    :ivar freed_bytes: how much smaller the store gets.
    :ivar moved_bytes: how much has to be written for that.
    """

    delete: tuple[str, ...]
    rewrite: tuple[str, ...]
    freed_bytes: int
    moved_bytes: int


@dataclass(frozen=True)
class Quota:
    """How many bytes the snapshots of a slice may have added to the store, and how many they have."""

    slice: str
    limit_bytes: int
    used_bytes: int = 0


@dataclass(frozen=True)
class VmImage:
    """One VM in a committed snapshot. ``frames_in_transit`` are in its channel state.

    ``network`` is the policy that its edge kept to; ``frames_held``, ``frames_overflowed`` and ``frames_reordered`` are
    as in :class:`EdgeReport`, ``hold_ms`` and ``trigger`` as in :class:`CutReport`.
    """

    name: str
    host: str
    cut_at: float
    downtime_ms: float
    strategy: str
    received_bytes: int
    stored_bytes: int
    memory_bytes: int
    blake3: str
    frames_in_transit: int = 0
    network: str = "drop"
    frames_held: int = 0
    frames_overflowed: int = 0
    hold_ms: float = 0.0
    trigger: str = "coordinator"
    frames_reordered: int = 0


@dataclass(frozen=True)
class Manifest:
    """A committed snapshot: all that is needed to restore it, and what its cut was like."""

    id: str
    name: str
    slice: SliceSpec
    created_at: float
    epoch: int
    strategy: str
    network: str
    coordination: str
    skew_ms: float
    total_ms: float
    frames_held: int
    frames_dropped: int
    frames_in_transit: int
    notes: tuple[str, ...]
    vms: tuple[VmImage, ...]
    version: int = 1


# --- the host agent ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SwitchReady:
    """A switch exists and is told to connect to the controller."""

    dpid: int


@dataclass(frozen=True)
class LinkRequest:
    """The far end of a link, and how frames fare on it (``core.model.LinkSpec``).

    ``number`` tells links between the same two switches apart, from 0. A link with a delay or a loss goes through a
    tunnel: ``peer_address`` is the far end's, HOST:PORT; while it is empty this end only says its own.
    """

    peer_host: str
    peer_switch: str
    delay_ms: float = 0.0
    loss: float = 0.0
    number: int = 0
    peer_address: str = ""


@dataclass(frozen=True)
class LinkReady:
    """This end of a link exists. ``address``, HOST:PORT, is where its tunnel is reached, if it has one."""

    dpid: int
    port_no: int
    address: str = ""


@dataclass(frozen=True)
class LinkCounters:
    """Frames at one end of a link with a delay or a loss, since it was made.

    ``frames_entered`` came from this end's switch: ``frames_lost`` were lost as the link's loss wants it,
    ``frames_overflowed`` found the line full, ``frames_waiting`` are in the line, the rest went to the far end.
    ``frames_arrived`` came from there; ``frames_missed`` did not, or out of order, and ``frames_refused`` this end's
    switch did not take.
    """

    switch: str
    peer_switch: str
    number: int
    frames_entered: int
    frames_lost: int
    frames_overflowed: int
    frames_waiting: int
    frames_arrived: int
    frames_missed: int
    frames_refused: int


@dataclass(frozen=True)
class VmRequest:
    """Create a VM, paused. With ``incoming`` it waits for an image instead of booting."""

    spec: VmSpec
    incoming: bool = False


@dataclass(frozen=True)
class VmStatus:
    """A VM as its host agent sees it. ``state``: running, paused, failed (its process is gone) or stopped.

    ``port_no`` and ``hold_port_no`` (0: it has no hold port) are on its switch, ``dpid``.
    """

    slice: str
    name: str
    state: str
    pid: int
    dpid: int
    port_no: int
    hold_port_no: int = 0


@dataclass(frozen=True)
class LoadRequest:
    """Load an image into a VM that was created with ``incoming``; it stays paused.

    The ``channel_frames`` frames of its channel state are fetched from the snapshot server's REST interface; they are
    replayed when the VM is let run.
    """

    ingest_host: str
    ingest_port: int
    snapshot_id: str
    snapshot_server_url: str = ""
    channel_frames: int = 0


@dataclass(frozen=True)
class PrepareCut:
    """Promise that this VM can be cut with this strategy and this network policy."""

    transaction: str
    strategy: str
    network: str = "drop"


@dataclass(frozen=True)
class CutPromise:
    """The strategy and the network policy that will be used, and why each is not the one asked for (empty if it is)."""

    vm: str
    strategy: str
    fallback_reason: str
    memory_bytes: int
    network: str = "drop"
    network_reason: str = ""


@dataclass(frozen=True)
class CutRequest:
    """Cut this VM. ``delay_ms`` spreads cuts on purpose; the deadlines are spans, as in ``core.cut``.

    With ``network`` "hold" the VM's edge is armed first; it knows the slice's frames by ``vlan_id`` and their colors.
    Without ``second_trigger`` no frame starts the cut, the coordinator alone does.
    """

    transaction: str
    epoch: int
    strategy: str
    coordination: str
    network: str
    vlan_id: int
    cut_deadline_ms: float
    stream_deadline_ms: float
    ingest_host: str
    ingest_port: int
    token: str
    delay_ms: float = 0.0
    second_trigger: bool = True


@dataclass(frozen=True)
class SettleRequest:
    """The network is disarmed: give the VM its direct path back.

    With ``keep`` what its edge recorded is brought to the snapshot server, at ``snapshot_server_url``.
    """

    snapshot_server_url: str
    keep: bool = True


@dataclass(frozen=True)
class CutReport:
    """A VM has been cut and runs again in its new epoch. ``recolor_ms`` is the network's part of it.

    ``hold_ms`` is how long its frames waited. ``trigger`` is what started the cut: the coordinator, or a future frame.
    """

    vm: str
    cut_at: float
    downtime_ms: float
    recolor_ms: float
    hold_ms: float = 0.0
    trigger: str = "coordinator"


@dataclass(frozen=True)
class StreamReport:
    """A VM's image has left its host whole. ``downtime_ms`` is final only now (strategy stop)."""

    vm: str
    downtime_ms: float
    sent_bytes: int


@dataclass(frozen=True)
class EdgeReport:
    """What a VM's edge did with frames during a cut, told when its VM has its direct path back.

    ``frames_held`` waited for the VM's cut, ``frames_overflowed`` found no room there and were dropped,
    ``frames_in_transit`` are of the old color and came after the VM's cut event (or waited then): the channel state as
    far as the receiving edge can know it. ``frames_sent_held`` left the VM while its edge held what it sent.
    ``frames_unrecorded`` are in transit too, but there was no room to record them: a restore loses them.
    ``frames_reordered`` came to the VM after one that may have been sent later, when its hold port was left.
    """

    vm: str
    frames_held: int
    frames_overflowed: int
    frames_in_transit: int
    frames_sent_held: int
    frames_unrecorded: int = 0
    frames_reordered: int = 0


@dataclass(frozen=True)
class CutProgress:
    """What a long poll on a cut gives: ``phase`` as in ``core.cut``, and the reports that are there by now."""

    phase: str
    cut: CutReport | None
    streamed: StreamReport | None
    failure: str
    sent_bytes: int


# --- the coordinator --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HostRequest:
    """Where a host's agent answers."""

    url: str


@dataclass(frozen=True)
class CreateSlice:
    """Create a slice, boot its VMs."""

    spec: SliceSpec


@dataclass(frozen=True)
class VmView:
    """A VM as people see it. ``state``: running, paused, failed or stopped."""

    name: str
    host: str
    state: str
    pid: int
    port_color: int
    address: str


@dataclass(frozen=True)
class SliceView:
    """A slice as people see it. ``state``: running, suspended, failed or stopped."""

    name: str
    state: str
    epoch: int
    vlan_id: int
    vms: tuple[VmView, ...]


@dataclass(frozen=True)
class SnapshotRequest:
    """Take a snapshot. ``delays_ms`` by VM name spreads the cuts on purpose, to rehearse a large skew.

    With ``second_trigger`` the first future frame ends a VM's delay; without it the delays are kept.
    """

    name: str = ""
    strategy: str = "background"
    network: str = "hold"
    coordination: str = "color"
    delays_ms: dict[str, float] = field(default_factory=dict)
    second_trigger: bool = True


@dataclass(frozen=True)
class VmSnapshotView:
    """One VM in a snapshot. ``received_bytes`` grows while its image streams; ``trigger`` is empty before its cut.

    The fields with a default are as in :class:`VmImage`.
    """

    name: str
    host: str
    cut_at: float
    downtime_ms: float
    received_bytes: int
    stored_bytes: int
    memory_bytes: int
    strategy: str
    network: str = "drop"
    hold_ms: float = 0.0
    trigger: str = ""
    frames_held: int = 0
    frames_overflowed: int = 0
    frames_in_transit: int = 0
    frames_reordered: int = 0


@dataclass(frozen=True)
class SnapshotView:
    """A snapshot as people see it: a committed one, or one on its way (then ``state`` tells how far)."""

    name: str
    id: str
    slice: str
    state: str
    created_at: float
    strategy: str
    network: str
    coordination: str
    epoch: int
    skew_ms: float
    total_ms: float
    frames_held: int
    frames_dropped: int
    frames_in_transit: int
    notes: tuple[str, ...]
    vms: tuple[VmSnapshotView, ...]


@dataclass(frozen=True)
class TransactionView:
    """A transaction: ``state`` as in ``core.transaction``, ``failure`` if it aborted, and the snapshot so far."""

    id: str
    slice: str
    state: str
    failure: str
    snapshot: SnapshotView


@dataclass(frozen=True)
class RestoreRequest:
    """Restore a snapshot in place, or ``as_slice`` beside the original; ``paused`` leaves its VMs paused."""

    as_slice: str = ""
    paused: bool = False


@dataclass(frozen=True)
class FailRequest:
    """Kill one VM (or all, if ``vm`` is empty) with SIGKILL, to rehearse a failure."""

    vm: str = ""
