"""What a node knows about itself and the others at one moment: the body of GET /health, and what everything shows.

Times are ages in seconds by the node's own clock since boot: nobody's wall clock matters. Unknown keys are ignored when
a peer's answer is read, so that nodes of two versions understand each other during an upgrade.
"""

from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field


class State(StrEnum):
    """State of a component. Only RUNNING means that it runs and answers; UNKNOWN is never read as running."""

    RUNNING = "running"
    STARTING = "starting"
    UNHEALTHY = "unhealthy"  # its unit is active, its URL does not answer as it should
    STOPPED = "stopped"
    FAILED = "failed"
    ABSENT = "absent"  # no such unit, or masked
    UNKNOWN = "unknown"


class Part(BaseModel):
    """Base of all parts of a snapshot."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class ComponentState(Part):
    """A component: its state, for how long, and in words what is wrong."""

    name: str = Field(max_length=253)
    state: State
    for_s: float = 0.0
    detail: str = Field(default="", max_length=2000)


class LeaseView(Part):
    """The scheduler lease as this node sees it.

    `holder` and `epoch` are the row's; `held` says that this node may run the scheduler now, for `left_s` more seconds.
    `able` is false with a reason where this node would not take the lease (no scheduler installed, gave it up lately).
    """

    mode: str
    held: bool = False
    holder: str | None = None
    epoch: int = 0
    timeline: int = 0
    left_s: float | None = None
    seen_s: float | None = None  # age of what is known about the row; None: never read
    able: bool = True
    why: str = ""
    paused: bool = False
    paused_left_s: float | None = None
    pause_reason: str = ""
    database: str = "unknown"  # "ok" or the error of the last try


class PostgresqlState(Part):
    """PostgreSQL of a data node. `role`: primary, standby, stale (primary of an old timeline), down, unknown."""

    role: str = "unknown"
    timeline: int | None = None
    # Standby: bytes received by the primary but not replayed here, as far as known here; None: unknown.
    lag_bytes: int | None = None
    # Standby: whether it is connected to its primary.
    streaming: bool | None = None
    for_s: float = 0.0
    detail: str = Field(default="", max_length=2000)


class RedisState(Part):
    """Redis of a data node. `role`: primary, replica, loading, down, unknown."""

    role: str = "unknown"
    lag_bytes: int | None = None
    link_up: bool | None = None
    replicas: int | None = None
    for_s: float = 0.0
    detail: str = Field(default="", max_length=2000)


class PeerView(Part):
    """Another node as seen from here. `answering` None: not asked yet; `seen_s`: age of the last answer."""

    name: str
    rack: str = ""
    answering: bool | None = None
    for_s: float = 0.0
    seen_s: float | None = None
    detail: str = ""


class Snapshot(Part):
    """The whole. `healthy` is what GET /health turns into 200 or 503."""

    node: str = Field(max_length=253)
    rack: str = ""
    version: str = ""
    uptime_s: float = 0.0
    healthy: bool = False
    components: tuple[ComponentState, ...] = Field(default=(), max_length=100)
    lease: LeaseView | None = None
    scheduler: ComponentState | None = None
    postgresql: PostgresqlState | None = None
    redis: RedisState | None = None
    peers: tuple[PeerView, ...] = Field(default=(), max_length=10000)
