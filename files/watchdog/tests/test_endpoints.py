"""Which path answers what, for each state of the data."""

import json
from types import SimpleNamespace
from typing import Any, cast

import pytest
from airflow_watchdog.agent import PostgresqlAgent
from airflow_watchdog.endpoints import is_replica, parse_lag, routes
from airflow_watchdog.snapshot import PostgresqlState, RedisState, Snapshot

PRIMARY = PostgresqlState(role="primary", timeline=3)
STANDBY = PostgresqlState(role="standby", timeline=3, streaming=True, lag_bytes=1000)
ADRIFT = PostgresqlState(role="standby", timeline=3, streaming=False, lag_bytes=0)
STALE = PostgresqlState(role="stale", timeline=2)
DOWN, UNKNOWN = PostgresqlState(role="down"), PostgresqlState(role="unknown")


def serve(
    postgresql: PostgresqlState | None = None,
    redis: RedisState | None = None,
    healthy: bool = True,
    age_s: float = 0.1,
    max_lag: int | None = None,
) -> Any:
    agent = cast(PostgresqlAgent, SimpleNamespace(state=lambda: postgresql)) if postgresql else None
    snapshot = Snapshot(node="data1", healthy=healthy, postgresql=postgresql, redis=redis)
    found = routes(lambda: snapshot, lambda: age_s, 10.0, agent, max_lag, lambda: b"# metrics\n")

    def get(path: str, **query: str) -> tuple[int, Any]:
        response = found[path](query)
        return response.status, json.loads(response.body) if path != "/metrics" else response.body

    return get


@pytest.mark.parametrize(
    ("state", "primary", "replica", "ready"),
    [(PRIMARY, 200, 503, 200), (STANDBY, 503, 200, 200), (ADRIFT, 503, 200, 503), (STALE, 503, 503, 503),
     (DOWN, 503, 503, 503), (UNKNOWN, 503, 503, 503), (None, 503, 503, 200)],
)  # fmt: skip
def test_roles(state: PostgresqlState | None, primary: int, replica: int, ready: int) -> None:
    get = serve(state)
    assert (get("/primary")[0], get("/replica")[0], get("/readiness")[0]) == (primary, replica, ready)
    assert get("/primary")[1]["role"] == (state.role if state else "none")


@pytest.mark.parametrize(
    ("state", "limit", "good"),
    [(STANDBY, 1000, True), (STANDBY, 999, False), (STANDBY, None, True), (ADRIFT, 10**9, False), (ADRIFT, None, True),
     (STANDBY.model_copy(update={"lag_bytes": None}), 10**9, False), (PRIMARY, None, False), (PRIMARY, 10**9, False)],
)  # fmt: skip
def test_lag(state: PostgresqlState, limit: int | None, good: bool) -> None:
    assert is_replica(state, limit) is good
    assert serve(state, max_lag=limit)("/replica")[0] == (200 if good else 503)
    if limit is not None:
        # What the client asks for counts, whatever the configuration says.
        assert serve(state, max_lag=0)("/replica", lag=str(limit))[0] == (200 if good else 503)


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("1048576", 1 << 20), ("16MB", 16 << 20), ("16 mb", 16 << 20), ("1kB", 1024),
                       ("2GB", 2 << 30), ("1TB", 1 << 40), ("12B", 12)],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_lag(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1", "1.5MB", "1XB", "1BM", "٣", "1e3", "9" * 19, "1MBMB", "0x10"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="lag"):
        serve(STANDBY)("/replica", lag=text)


def test_health_has_the_same_body_whatever_the_status() -> None:
    assert serve(PRIMARY)("/health") == (200, {**serve(PRIMARY, healthy=False)("/health")[1], "healthy": True})
    status, body = serve(PRIMARY, healthy=False)("/health")
    assert (status, body["node"], body["postgresql"]["role"]) == (503, "data1", "primary")
    assert Snapshot.model_validate(body).node == "data1"


def test_a_loop_that_stands_still_is_neither_alive_nor_ready() -> None:
    assert serve()("/liveness") == (200, {"loop_age_s": 0.1})
    assert serve(age_s=10.1)("/liveness")[0] == 503
    assert serve(age_s=10.1)("/readiness") == (503, {"problems": ["the watchdog's loop ended 10.1 s ago"]})


@pytest.mark.parametrize(
    ("redis", "ready"),
    [(RedisState(role="primary"), 200), (RedisState(role="replica", link_up=True), 200),
     (RedisState(role="replica", link_up=False), 503), (RedisState(role="loading"), 503), (RedisState(), 503)],
)  # fmt: skip
def test_redis_counts_for_readiness(redis: RedisState, ready: int) -> None:
    assert serve(PRIMARY, redis)("/readiness")[0] == ready


def test_metrics_are_passed_on() -> None:
    assert serve()("/metrics") == (200, b"# metrics\n")
