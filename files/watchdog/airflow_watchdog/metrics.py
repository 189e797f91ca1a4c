"""GET /metrics: the last snapshot, and counters of what happened, in Prometheus' text format.

States are read from the snapshot when somebody asks; only events are counted as they come.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from airflow_watchdog.snapshot import PostgresqlState, RedisState, Snapshot, State

if TYPE_CHECKING:
    from prometheus_client.core import Metric

PREFIX = "airflow_watchdog"
POSTGRESQL_ROLES = ("primary", "standby", "stale", "down", "unknown")
REDIS_ROLES = ("primary", "replica", "loading", "down", "unknown")
LOOP_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, float("inf"))


class Metrics:
    """Counts events, alerts and loops, and renders all there is to say. For use by several threads."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot
        self._lock = threading.Lock()
        self._events: Counter[tuple[str, str]] = Counter()
        self._alerts: Counter[tuple[str, str]] = Counter()
        self._loops: Counter[float] = Counter()
        self._loop_sum_s = 0.0
        self._registry: Any = None

    def count_event(self, kind: str, severity: str) -> None:
        """An event has come."""
        with self._lock:
            self._events[kind, severity] += 1

    def count_alert(self, hook: str, outcome: str) -> None:
        """A hook was served, or not."""
        with self._lock:
            self._alerts[hook, outcome] += 1

    def count_loop(self, seconds: float) -> None:
        """A loop took so long."""
        bucket = next(bound for bound in LOOP_BUCKETS_S if seconds <= bound)
        with self._lock:
            self._loops[bucket] += 1
            self._loop_sum_s += seconds

    def render(self) -> bytes:
        """Return everything in the text format."""
        # Imported when first asked: a node that nobody scrapes does not pay for it.
        from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
        from prometheus_client.exposition import generate_latest

        with self._lock:
            if self._registry is None:
                registry = CollectorRegistry(auto_describe=False)
                ProcessCollector(registry=registry)
                PlatformCollector(registry=registry)
                GCCollector(registry=registry)
                registry.register(self)
                self._registry = registry
        return generate_latest(self._registry)

    def collect(self) -> "Iterator[Metric]":
        """Yield all metrics; prometheus_client's interface of a collector."""
        with self._lock:
            events, alerts = Counter(self._events), Counter(self._alerts)
            loops, loop_sum_s = Counter(self._loops), self._loop_sum_s
        yield _counter("events", "Events, by kind and severity.", ("kind", "severity"), events)
        yield _counter("alerts", "Events told to hooks, by what became of it.", ("hook", "outcome"), alerts)
        yield _loop_histogram(loops, loop_sum_s)
        yield from of_snapshot(self._snapshot())


def of_snapshot(now: Snapshot) -> "Iterator[Metric]":
    """Yield what a snapshot says. States and roles are one series for each possible one, 1 for the one that it is."""
    yield _gauge("healthy", "Whether GET /health answers 200.", {(): float(now.healthy)})
    yield _gauge("uptime_seconds", "Age of the watchdog.", {(): now.uptime_s})
    yield _gauge("info", "The watchdog's node and version.", {(now.node, now.rack, now.version): 1},
                 ("node", "rack", "version"))  # fmt: skip
    parts = [*now.components] + ([now.scheduler] if now.scheduler else [])
    states = {(part.name, state.value): float(part.state is state) for part in parts for state in State}
    yield _gauge("component_state", "State of each component.", states, ("component", "state"))
    peers = {(peer.name,): float(bool(peer.answering)) for peer in now.peers}
    yield _gauge("peer_up", "Whether a peer's watchdog answers.", peers, ("peer",))
    if lease := now.lease:
        yield _gauge("lease_held", "Whether this node may run the scheduler.", {(): float(lease.held)})
        yield _gauge("lease_epoch", "Epoch of the lease, as seen from here.", {(): lease.epoch})
        yield _gauge("lease_left_seconds", "Time until this node's lease ends.", {(): lease.left_s or 0.0})
        if lease.seen_s is not None:
            yield _gauge("lease_seen_seconds", "Age of what is known about the lease.", {(): lease.seen_s})
        holder = {(lease.holder,): 1.0} if lease.holder else {}
        yield _gauge("lease_holder", "Holder of the lease, as seen from here.", holder, ("holder",))
        yield _gauge("paused", "Whether takeovers are paused.", {(): float(lease.paused)})
        yield _gauge("database_ok", "Whether the last try to reach the database went well.",
                     {(): float(lease.database == "ok")})  # fmt: skip
    if now.postgresql:
        yield from _of_server("postgresql", now.postgresql, POSTGRESQL_ROLES)
        if now.postgresql.timeline is not None:
            yield _gauge("postgresql_timeline", "Timeline of this PostgreSQL.", {(): now.postgresql.timeline})
        if now.postgresql.streaming is not None:
            yield _gauge("postgresql_streaming", "Whether this standby is connected to its primary.",
                         {(): float(now.postgresql.streaming)})  # fmt: skip
    if now.redis:
        yield from _of_server("redis", now.redis, REDIS_ROLES)
        if now.redis.link_up is not None:
            yield _gauge("redis_link_up", "Whether this replica has a link to its primary.",
                         {(): float(now.redis.link_up)})  # fmt: skip
        if now.redis.replicas is not None:
            yield _gauge("redis_replicas", "Connected replicas of this primary.", {(): now.redis.replicas})


def _of_server(name: str, server: PostgresqlState | RedisState, roles: tuple[str, ...]) -> "Iterator[Metric]":
    yield _gauge(f"{name}_role", f"Role of this node's {name}.",
                 {(role,): float(server.role == role) for role in roles}, ("role",))  # fmt: skip
    if server.lag_bytes is not None:
        yield _gauge(f"{name}_lag_bytes", f"How far {name} is behind.", {(): server.lag_bytes})


def _gauge(name: str, text: str, values: Mapping[Any, float], labels: tuple[str, ...] = ()) -> "Metric":
    from prometheus_client.core import GaugeMetricFamily

    family = GaugeMetricFamily(f"{PREFIX}_{name}", text, labels=labels)
    for key, value in values.items():
        family.add_metric(list(key), value)
    return family


def _counter(name: str, text: str, labels: tuple[str, ...], values: Counter[tuple[str, str]]) -> "Metric":
    from prometheus_client.core import CounterMetricFamily

    family = CounterMetricFamily(f"{PREFIX}_{name}", text, labels=labels)
    for key, value in values.items():
        family.add_metric(list(key), value)
    return family


def _loop_histogram(loops: Counter[float], sum_s: float) -> "Metric":
    from prometheus_client.core import HistogramMetricFamily

    total, buckets = 0, []
    for bound in LOOP_BUCKETS_S:
        total += loops[bound]
        buckets.append(("+Inf" if bound == float("inf") else str(bound), float(total)))
    family = HistogramMetricFamily(f"{PREFIX}_loop_seconds", "Duration of the watchdog's loops.")
    family.add_metric([], buckets, sum_s)
    return family
