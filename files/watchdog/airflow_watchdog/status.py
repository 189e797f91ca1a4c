"""The whole cluster as one node sees it: what is shown, and how well it is. Pure; times are ages in seconds."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from airflow_watchdog.snapshot import ComponentState, LeaseView, PostgresqlState, RedisState, Snapshot, State

SCHEDULER = "scheduler"
# A component may take so long to start before that is a problem.
START_S = 60.0
COLOURS = {"red": "\033[31m", "yellow": "\033[33m", "green": "\033[32m", "bold": "\033[1m", "": ""}
RESET = "\033[0m"


class Level(IntEnum):
    """How bad it is; the values are the exit codes that monitoring systems expect."""

    OK = 0
    WARNING = 1
    CRITICAL = 2
    UNKNOWN = 3


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong, and where."""

    level: Level
    node: str
    text: str

    def __str__(self) -> str:
        """Return one line."""
        return f"{self.node}: {self.text}" if self.node else self.text


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node: what it says of itself, or since when it does not answer (`for_s`; None: unknown) and why."""

    name: str
    rack: str
    snapshot: Snapshot | None = None
    for_s: float | None = None
    detail: str = ""
    airflow_server: bool = False
    data_node: bool = False


@dataclass(frozen=True, slots=True)
class Cluster:
    """All nodes that this node knows of; `own` is its name."""

    own: str
    nodes: tuple[NodeView, ...]

    @property
    def answering(self) -> dict[str, Snapshot]:
        """What the nodes that answer say, by name."""
        return {node.name: node.snapshot for node in self.nodes if node.snapshot}

    @property
    def leases(self) -> dict[str, LeaseView]:
        """The lease as each answering Airflow server sees it, by its name."""
        return {name: snapshot.lease for name, snapshot in self.answering.items() if snapshot.lease}

    @property
    def lease(self) -> LeaseView | None:
        """The freshest view of the lease."""
        never = float("inf")
        return min(self.leases.values(), key=lambda v: never if v.seen_s is None else v.seen_s, default=None)


# --- judging -------------------------------------------------------------------------------------


def problems(cluster: Cluster, max_lag_bytes: int) -> list[Problem]:
    """Return all that is wrong, the worst first. A lost spare is a warning, a lost service is critical."""
    found = [
        *_silent(cluster),
        *_components(cluster),
        *_lease(cluster),
        *_postgresql(cluster, max_lag_bytes),
        *_redis(cluster, max_lag_bytes),
    ]
    # Critical beats unknown: what is known to be bad does not get better by what is not known.
    badness = {Level.CRITICAL: 0, Level.UNKNOWN: 1, Level.WARNING: 2}
    return sorted(found, key=lambda problem: badness[problem.level])


def level(found: Iterable[Problem]) -> Level:
    """Return the worst of these."""
    return next((p.level for p in sorted(found, key=lambda p: (p.level is not Level.CRITICAL, -p.level))), Level.OK)


def _silent(cluster: Cluster) -> Iterator[Problem]:
    for node in cluster.nodes:
        if node.snapshot is None:
            how_bad = Level.UNKNOWN if node.name == cluster.own else Level.WARNING
            yield Problem(how_bad, node.name, silence(node))


def _fine(component: ComponentState) -> bool:
    return component.state is State.RUNNING or (component.state is State.STARTING and component.for_s < START_S)


def _components(cluster: Cluster) -> Iterator[Problem]:
    by_name: dict[str, list[tuple[str, ComponentState]]] = defaultdict(list)
    for name, snapshot in cluster.answering.items():
        for component in components(snapshot):
            by_name[component.name].append((name, component))
    for name, places in by_name.items():
        nowhere = not any(_fine(component) for _, component in places)
        for node, component in places:
            if not _fine(component):
                how_bad = Level.CRITICAL if nowhere else Level.WARNING
                yield Problem(how_bad, node, _sentence(name, component.state, component.for_s, component.detail))


def components(snapshot: Snapshot) -> list[ComponentState]:
    """Return the parts that have to run here: not the scheduler, where one of all nodes is in charge of it."""
    one_in_charge = snapshot.lease is not None and snapshot.lease.mode == "active_standby"
    parts = [part for part in snapshot.components if not (one_in_charge and part.name == SCHEDULER)]
    if snapshot.scheduler and not one_in_charge and all(part.name != SCHEDULER for part in parts):
        parts.append(snapshot.scheduler)
    return parts


def _lease(cluster: Cluster) -> Iterator[Problem]:
    lease = cluster.lease
    if lease is None:
        return
    for name, view in cluster.leases.items():
        if view.database not in ("ok", "unknown"):
            yield Problem(Level.WARNING, name, f"cannot reach the watchdogs' database: {view.database}")
    if lease.mode != "active_standby":
        return
    holders = [name for name, view in cluster.leases.items() if view.held]
    if len(holders) > 1:
        yield Problem(Level.CRITICAL, "", f"the scheduler is in the charge of several: {', '.join(holders)}")
    if not holders:
        said = f"; the last known was {lease.holder}" if lease.holder else ""
        yield Problem(Level.CRITICAL, "", f"no node is in charge of the scheduler{said}")
    for holder in holders:
        scheduler = cluster.answering[holder].scheduler
        if scheduler is None:
            yield Problem(Level.UNKNOWN, holder, "in charge, but says nothing of its scheduler")
        elif not _fine(scheduler):
            text = _sentence("scheduler", scheduler.state, scheduler.for_s, scheduler.detail)
            yield Problem(Level.CRITICAL, holder, text)
    spares = [name for name, view in cluster.leases.items() if not view.held and view.able]
    if holders and not spares:
        why = "; ".join(f"{name}: {view.why}" for name, view in cluster.leases.items() if not view.able)
        yield Problem(Level.WARNING, "", f"no node could take the scheduler over{' (' + why + ')' if why else ''}")
    if lease.paused:
        left = f" for another {duration(lease.paused_left_s)}" if lease.paused_left_s is not None else ""
        yield Problem(Level.WARNING, "", f"takeovers are paused{left}: {lease.pause_reason}")


def _postgresql(cluster: Cluster, max_lag_bytes: int) -> Iterator[Problem]:
    servers = {name: snapshot.postgresql for name, snapshot in cluster.answering.items() if snapshot.postgresql}
    yield from _one_primary("PostgreSQL", servers, cluster)
    for name, server in servers.items():
        if server.role == "stale":
            yield Problem(Level.CRITICAL, name, f"PostgreSQL is a primary of the past: {server.detail}")
        elif server.role == "standby" and server.streaming is False:
            yield Problem(Level.WARNING, name, "PostgreSQL's standby is not connected to a primary")
        elif server.role not in ("primary", "standby"):
            yield Problem(Level.WARNING, name, _sentence("PostgreSQL", server.role, server.for_s, server.detail))
        if server.role == "standby" and (server.lag_bytes or 0) > max_lag_bytes:
            yield Problem(Level.WARNING, name, f"PostgreSQL's standby is {size(server.lag_bytes)} behind")


def _redis(cluster: Cluster, max_lag_bytes: int) -> Iterator[Problem]:
    servers = {name: snapshot.redis for name, snapshot in cluster.answering.items() if snapshot.redis}
    yield from _one_primary("Redis", servers, cluster)
    for name, server in servers.items():
        if server.role == "replica" and server.link_up is False:
            yield Problem(Level.WARNING, name, f"Redis: {server.detail or 'no link to its primary'}")
        elif server.role not in ("primary", "replica"):
            yield Problem(Level.WARNING, name, _sentence("Redis", server.role, server.for_s, server.detail))
        if (server.lag_bytes or 0) > max_lag_bytes:
            yield Problem(Level.WARNING, name, f"Redis: a replica is {size(server.lag_bytes)} behind")


def _one_primary(what: str, servers: Mapping[str, PostgresqlState | RedisState], cluster: Cluster) -> Iterator[Problem]:
    primaries = [name for name, server in servers.items() if server.role == "primary"]
    # Who sees one data node of two does not know who is primary; only servers see all.
    sees_all = any(node.data_node and node.name != cluster.own for node in cluster.nodes)
    if len(primaries) > 1:
        yield Problem(Level.CRITICAL, "", f"{what} has several primaries: {', '.join(primaries)}")
    if servers and not primaries and sees_all:
        yield Problem(Level.CRITICAL, "", f"{what} has no primary")


# --- switching over ------------------------------------------------------------------------------


def refusal(cluster: Cluster, target: str | None) -> str:
    """Return why the scheduler can't be handed over now, to this node or to any (None); empty if it can."""
    lease = cluster.lease
    if lease is None:
        return "no Airflow server answers"
    if lease.mode != "active_standby":
        return f"the mode is {lease.mode}: every node's scheduler runs"
    if lease.paused:
        return f"takeovers are paused: {lease.pause_reason}"
    if not lease.holder:
        return "no node is in charge of the scheduler"
    if target is None:
        reasons = {node.name: _unfit(cluster, node) for node in cluster.nodes if node.airflow_server}
        reasons.pop(lease.holder, None)
        if all(reasons.values()):
            return "no node could take the scheduler over: " + ("; ".join(filter(None, reasons.values())) or "no other")
        return ""
    if target == lease.holder:
        return f"{target} is in charge of the scheduler already"
    node = next((node for node in cluster.nodes if node.name == target), None)
    return _unfit(cluster, node) if node else f"{target}: no such node"


def _unfit(cluster: Cluster, node: NodeView) -> str:
    if not node.airflow_server:
        return f"{node.name} is not an Airflow server"
    if node.snapshot is None:
        return f"{node.name} {silence(node)}"
    lease = node.snapshot.lease
    if lease is None:
        return f"{node.name} has no scheduler"
    if lease.database not in ("ok", "unknown"):
        return f"{node.name} cannot reach the watchdogs' database: {lease.database}"
    return "" if lease.able else f"{node.name}: {lease.why}"


# --- showing -------------------------------------------------------------------------------------


def duration(seconds: float | None) -> str:
    """Return 8.1 s, 3 min, 5 h, 2 d."""
    if seconds is None:
        return "?"
    if seconds < 10:
        return f"{seconds:.1f} s"
    for limit, unit_s, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds // unit_s:.0f} {unit}"
    return f"{seconds // 86400:.0f} d"


def size(count: int | None) -> str:
    """Return 0 B, 12.0 kB, 3.4 MB."""
    value, units = float(count or 0), iter(("B", "kB", "MB", "GB"))
    unit = next(units)
    while value >= 1024 and unit != "GB":
        value, unit = value / 1024, next(units)
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def silence(node: NodeView) -> str:
    """Return since when a node does not answer, and why."""
    since = f" for {duration(node.for_s)}" if node.for_s is not None else ""
    return f"does not answer{since}" + (f": {node.detail}" if node.detail else "")


def _sentence(what: str, state: str, for_s: float, detail: str) -> str:
    return f"{what} is {state} for {duration(for_s)}" + (f": {detail}" if detail else "")


def as_dict(cluster: Cluster, found: list[Problem]) -> dict[str, Any]:
    """Return what `status --json` and `check --json` print."""
    return {
        "health": level(found).name,
        "problems": [{"level": p.level.name, "node": p.node, "text": p.text} for p in found],
        "lease": cluster.lease.model_dump(mode="json") if cluster.lease else None,
        "nodes": [
            {
                "name": node.name,
                "rack": node.rack,
                "answering": node.snapshot is not None,
                "silent_for_s": node.for_s if node.snapshot is None else None,
                "detail": node.detail,
                "snapshot": node.snapshot.model_dump(mode="json", exclude={"peers"}) if node.snapshot else None,
            }
            for node in cluster.nodes
        ],
    }


Cell = tuple[str, str]


def render(cluster: Cluster, found: list[Problem], colour: bool) -> str:
    """Return the table of `status`: nodes, who is in charge, roles, lag, components, and what is wrong."""
    head = [("NODE", "bold"), ("RACK", "bold"), ("WATCHDOG", "bold"), ("SCHEDULER", "bold"), ("POSTGRESQL", "bold"),
            ("REDIS", "bold"), ("COMPONENTS", "bold")]  # fmt: skip
    rows: list[list[Cell]] = [head, *(_row(node) for node in cluster.nodes)]
    widths = [max(len(row[column][0]) for row in rows) for column in range(len(head))]
    # Columns that say nothing are left out.
    used = [column for column in range(len(head)) if any(row[column][0] != "-" for row in rows[1:])]
    lines = [_lease_line(cluster), ""] if cluster.lease else []
    for row in rows:
        cells = (paint(row[column][0].ljust(widths[column]), row[column][1], colour) for column in used)
        lines.append("  ".join(cells).rstrip())
    lines.append("")
    tones = {Level.OK: "green", Level.WARNING: "yellow", Level.CRITICAL: "red", Level.UNKNOWN: "yellow"}
    worst = level(found)
    lines.append(paint("Everything is well." if worst is Level.OK else worst.name, tones[worst], colour))
    lines += [f"  {paint(p.level.name.lower(), tones[p.level], colour)}  {p}" for p in found]
    return "\n".join(lines)


def paint(text: str, colour: str, wanted: bool) -> str:
    """Return the text in a colour, if wanted."""
    return f"{COLOURS[colour]}{text}{RESET}" if wanted and colour else text


def _lease_line(cluster: Cluster) -> str:
    lease = cluster.lease
    assert lease is not None
    if lease.mode != "active_standby":
        return f"Scheduler: {lease.mode}, every node's runs"
    left = next((view.left_s for view in cluster.leases.values() if view.held), None)
    until = f", lease ends in {duration(left)}" if left is not None else ""
    return f"Scheduler: {lease.holder or 'nobody'} in charge (epoch {lease.epoch}{until})" + (
        f", paused for {duration(lease.paused_left_s)}: {lease.pause_reason}" if lease.paused else ""
    )


def _row(node: NodeView) -> list[Cell]:
    snapshot = node.snapshot
    first: list[Cell] = [(node.name, ""), (node.rack or "-", "")]
    if snapshot is None:
        return [*first, (silence(node), "red"), ("-", ""), ("-", ""), ("-", ""), ("-", "")]
    return [
        *first,
        (f"up {duration(snapshot.uptime_s)}", "green"),
        _scheduler_cell(snapshot),
        _postgresql_cell(snapshot.postgresql),
        _redis_cell(snapshot.redis),
        _components_cell(snapshot),
    ]


def _scheduler_cell(snapshot: Snapshot) -> Cell:
    lease, own = snapshot.lease, snapshot.scheduler
    if lease is None:
        return "-", ""
    state = own.state if own else State.UNKNOWN
    if lease.mode != "active_standby":
        return str(state), "green" if state is State.RUNNING else "red"
    if lease.held:
        return f"in charge, {state}", "green" if state is State.RUNNING else "red"
    return ("standby", "") if lease.able else (f"out: {lease.why}", "yellow")


def _postgresql_cell(server: PostgresqlState | None) -> Cell:
    if server is None:
        return "-", ""
    text = server.role if server.timeline is None else f"{server.role}, timeline {server.timeline}"
    if server.role != "standby":
        return text, "green" if server.role == "primary" else "red"
    if not server.streaming:
        return f"{text}, not streaming", "yellow"
    return f"{text}, lag {'?' if server.lag_bytes is None else size(server.lag_bytes)}", "green"


def _redis_cell(server: RedisState | None) -> Cell:
    if server is None:
        return "-", ""
    if server.role == "primary":
        return server.role, "green"
    if server.role != "replica":
        return server.role, "red"
    if not server.link_up:
        return "replica, no link", "yellow"
    return f"replica, lag {'?' if server.lag_bytes is None else size(server.lag_bytes)}", "green"


def _components_cell(snapshot: Snapshot) -> Cell:
    parts = components(snapshot)
    bad = [f"{part.name} {part.state} {duration(part.for_s)}" for part in parts if part.state is not State.RUNNING]
    if not parts:
        return "-", ""
    text = f"{len(parts) - len(bad)} of {len(parts)} running"
    return (f"{text}: {', '.join(bad)}", "red") if bad else (text, "green")
