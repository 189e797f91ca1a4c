"""What each path of the HTTPS server answers: Patroni's paths and meanings, 200 or 503 with JSON that says why.

Source: Patroni's documentation, "REST API", "Health check endpoints".
"""

from collections.abc import Callable, Mapping
from typing import Any

from airflow_watchdog.agent import PostgresqlAgent
from airflow_watchdog.snapshot import PostgresqlState, Snapshot
from airflow_watchdog.web import JSON, Response, Route, json_response

UNITS = {"": 1, "b": 1, "kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30, "tb": 1 << 40}
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def is_primary(state: PostgresqlState) -> bool:
    """Whether clients may write here: a primary, and none of the past."""
    return state.role == "primary"


def is_replica(state: PostgresqlState, max_lag_bytes: int | None) -> bool:
    """Whether clients may read here: a standby at most so far behind; unknown lag is too much, if any counts."""
    if state.role != "standby" or max_lag_bytes is None:
        return state.role == "standby"
    return state.streaming is True and state.lag_bytes is not None and state.lag_bytes <= max_lag_bytes


def parse_lag(text: str) -> int:
    """Return bytes from a number with or without a unit: 1048576, 16MB, 1 GB. Raises ValueError."""
    number = text.strip().rstrip("bBkKmMgGtT ")
    unit = text.strip()[len(number) :].strip().lower()
    if not (number.isascii() and number.isdigit() and len(number) <= 18) or unit not in UNITS:
        raise ValueError("lag: not a number of bytes, with or without kB, MB, GB or TB")
    return int(number) * UNITS[unit]


def problems_of_data(snapshot: Snapshot) -> list[str]:
    """Return why this node's PostgreSQL or Redis can't serve what it should; empty on nodes that have neither."""
    found = []
    if (own := snapshot.postgresql) and not (own.role == "primary" or (own.role == "standby" and own.streaming)):
        found.append(f"postgresql is {own.role}: {own.detail}")
    if (redis := snapshot.redis) and not (redis.role == "primary" or (redis.role == "replica" and redis.link_up)):
        found.append(f"redis is {redis.role}: {redis.detail}")
    return found


def routes(
    snapshot: Callable[[], Snapshot],
    loop_age_s: Callable[[], float],
    max_loop_age_s: float,
    postgresql: PostgresqlAgent | None,
    max_lag_bytes: int | None,
    metrics: Callable[[], bytes],
) -> dict[str, Route]:
    """Return the routes of a node.

    `snapshot` is the last loop's; `loop_age_s` how long ago that ended, and beyond `max_loop_age_s` the watchdog does
    not count as alive. /primary and /replica ask PostgreSQL itself.
    """

    def answer(good: bool, content: Mapping[str, Any]) -> Response:
        return json_response(200 if good else 503, content)

    def database(judge: Callable[[PostgresqlState, Mapping[str, str]], bool]) -> Route:
        def route(query: Mapping[str, str]) -> Response:
            if postgresql is None:
                return answer(False, {"role": "none", "detail": "no PostgreSQL on this node"})
            state = postgresql.state()
            return answer(judge(state, query), state.model_dump(mode="json"))

        return route

    def replica(state: PostgresqlState, query: Mapping[str, str]) -> bool:
        return is_replica(state, parse_lag(query["lag"]) if "lag" in query else max_lag_bytes)

    def health(_query: Mapping[str, str]) -> Response:
        now = snapshot()
        return Response(200 if now.healthy else 503, now.model_dump_json().encode() + b"\n", JSON)

    def liveness(_query: Mapping[str, str]) -> Response:
        age = loop_age_s()
        return answer(age <= max_loop_age_s, {"loop_age_s": round(age, 3)})

    def readiness(_query: Mapping[str, str]) -> Response:
        problems = problems_of_data(snapshot())
        if (age := loop_age_s()) > max_loop_age_s:
            problems.append(f"the watchdog's loop ended {age:.1f} s ago")
        return answer(not problems, {"problems": problems})

    def measured(_query: Mapping[str, str]) -> Response:
        return Response(200, metrics(), METRICS_TYPE)

    return {
        "/primary": database(lambda state, _query: is_primary(state)),
        "/replica": database(replica),
        "/health": health,
        "/liveness": liveness,
        "/readiness": readiness,
        "/metrics": measured,
    }
