"""What /metrics says, read back by the client library's own parser."""

import os
import subprocess
import sys
from pathlib import Path

from airflow_watchdog import metrics
from airflow_watchdog.metrics import Metrics
from airflow_watchdog.snapshot import (
    ComponentState,
    LeaseView,
    PeerView,
    PostgresqlState,
    RedisState,
    Snapshot,
    State,
)
from prometheus_client.parser import text_string_to_metric_families

FULL = Snapshot(
    node="airflow1",
    rack="a",
    version="1",
    uptime_s=60,
    healthy=True,
    components=(ComponentState(name="flower", state=State.FAILED),),
    scheduler=ComponentState(name="scheduler", state=State.RUNNING),
    lease=LeaseView(
        mode="active_standby", held=True, holder="airflow1", epoch=12, left_s=8.5, seen_s=0.5, database="ok"
    ),
    postgresql=PostgresqlState(role="standby", timeline=3, lag_bytes=100, streaming=True),
    redis=RedisState(role="replica", lag_bytes=5, link_up=True, replicas=0),
    peers=(PeerView(name="airflow2", answering=True), PeerView(name="worker1", answering=False), PeerView(name="new")),
)


def samples(counted: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = counted.render().decode()
    return {
        (sample.name.removeprefix("airflow_watchdog_"), tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_everything_of_a_snapshot_is_there() -> None:
    counted = Metrics(lambda: FULL)
    counted.count_event("takeover", "warning")
    counted.count_event("takeover", "warning")
    counted.count_alert("webhook", "dropped")
    for seconds in (0.04, 0.2, 3.0, 99.0):
        counted.count_loop(seconds)
    found = samples(counted)
    for name, labels, value in (
        ("healthy", {}, 1),
        ("info", {"node": "airflow1", "rack": "a", "version": "1"}, 1),
        ("component_state", {"component": "flower", "state": "failed"}, 1),
        ("component_state", {"component": "flower", "state": "running"}, 0),
        ("component_state", {"component": "scheduler", "state": "running"}, 1),
        ("peer_up", {"peer": "airflow2"}, 1),
        ("peer_up", {"peer": "worker1"}, 0),
        ("peer_up", {"peer": "new"}, 0),
        ("lease_held", {}, 1),
        ("lease_epoch", {}, 12),
        ("lease_left_seconds", {}, 8.5),
        ("lease_seen_seconds", {}, 0.5),
        ("lease_holder", {"holder": "airflow1"}, 1),
        ("paused", {}, 0),
        ("database_ok", {}, 1),
        ("postgresql_role", {"role": "standby"}, 1),
        ("postgresql_role", {"role": "primary"}, 0),
        ("postgresql_timeline", {}, 3),
        ("postgresql_streaming", {}, 1),
        ("postgresql_lag_bytes", {}, 100),
        ("redis_role", {"role": "replica"}, 1),
        ("redis_link_up", {}, 1),
        ("redis_replicas", {}, 0),
        ("redis_lag_bytes", {}, 5),
        ("events_total", {"kind": "takeover", "severity": "warning"}, 2),
        ("alerts_total", {"hook": "webhook", "outcome": "dropped"}, 1),
        ("loop_seconds_bucket", {"le": "0.05"}, 1),
        ("loop_seconds_bucket", {"le": "0.25"}, 2),
        ("loop_seconds_bucket", {"le": "4.0"}, 3),
        ("loop_seconds_bucket", {"le": "+Inf"}, 4),
        ("loop_seconds_count", {}, 4),
    ):
        assert found[name, tuple(sorted(labels.items()))] == value, (name, labels)
    assert found["loop_seconds_sum", ()] == 102.24
    assert found["process_resident_memory_bytes", ()] > 0


def test_a_node_says_nothing_of_what_it_has_not() -> None:
    counted = Metrics(lambda: Snapshot(node="worker1"))
    names = {name for name, _ in samples(counted)}
    assert {"healthy", "loop_seconds_count"} <= names
    assert not [name for name in names if name.startswith(("postgresql", "redis", "lease", "database"))]
    # The registry is made once.
    assert names == {name for name, _ in samples(counted)}


def test_whoever_is_not_scraped_does_not_load_the_library() -> None:
    program = (
        "import sys, airflow_watchdog.metrics, airflow_watchdog.alerts, airflow_watchdog.agent as a; "
        "sys.exit(bool({'prometheus_client', 'smtplib', 'psycopg', 'urllib.request'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(metrics.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", program], timeout=20, env=environment).returncode == 0
