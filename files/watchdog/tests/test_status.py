"""The view of the whole cluster: what is a problem and how bad, when the scheduler may move, and how it looks."""

from typing import Any

import pytest
from airflow_watchdog.snapshot import ComponentState, LeaseView, PostgresqlState, RedisState, Snapshot, State
from airflow_watchdog.status import (
    Cluster,
    Level,
    NodeView,
    as_dict,
    duration,
    level,
    problems,
    refusal,
    render,
    size,
)

LAG = 1 << 20
ONE = "active_standby"


def part(name: str, state: str = "running", for_s: float = 100, detail: str = "") -> ComponentState:
    return ComponentState(name=name, state=State(state), for_s=for_s, detail=detail)


def server(name: str, held: bool = False, scheduler: str | None = None, **changes: Any) -> NodeView:
    """An Airflow server; `changes` are of its lease, or of the snapshot where LeaseView has no such field."""
    lease = LeaseView(
        mode=changes.pop("mode", ONE), held=held, holder=changes.pop("holder", "airflow1"), epoch=12, seen_s=0.5,
        left_s=8.1 if held else None, database=changes.pop("database", "ok"),
    ).model_copy(update={key: changes.pop(key) for key in list(changes) if key in LeaseView.model_fields})  # fmt: skip
    state = scheduler or ("running" if held else "stopped")
    snapshot = Snapshot(
        node=name, rack="a", uptime_s=7300, healthy=True, lease=lease, scheduler=part("scheduler", state),
        components=changes.pop("components", (part("api-server"), part("scheduler", state))),
    )  # fmt: skip
    assert not changes
    return NodeView(name, "a", snapshot, airflow_server=True)


def data(name: str, postgresql: PostgresqlState | None = None, redis: RedisState | None = None) -> NodeView:
    snapshot = Snapshot(
        node=name, rack="b", uptime_s=50, components=(part("postgresql"),), postgresql=postgresql, redis=redis
    )
    return NodeView(name, "b", snapshot, data_node=True)


def silent(name: str, **kind: bool) -> NodeView:
    return NodeView(name, "c", None, 720, "connection refused", **kind)


PRIMARY = data(
    "data1", PostgresqlState(role="primary", timeline=3), RedisState(role="primary", replicas=1, lag_bytes=0)
)
STANDBY = data(
    "data2", PostgresqlState(role="standby", timeline=3, streaming=True, lag_bytes=10),
    RedisState(role="replica", link_up=True, lag_bytes=0),
)  # fmt: skip


def worker(state: str = "running", for_s: float = 100) -> NodeView:
    return NodeView("worker1", "a", Snapshot(node="worker1", components=(part("worker", state, for_s),)))


WORKER = worker()
WELL = {"airflow1": server("airflow1", True), "airflow2": server("airflow2"), "data1": PRIMARY, "data2": STANDBY,
        "worker1": WORKER}  # fmt: skip


def cluster(**changes: NodeView | None) -> Cluster:
    nodes = {**WELL, **changes}
    return Cluster("airflow1", tuple(node for node in nodes.values() if node))


def pg(name: str, **state: Any) -> NodeView:
    return data(
        name, PostgresqlState(**state), RedisState(role="primary" if name == "data1" else "replica", link_up=True)
    )


def redis(name: str, **state: Any) -> NodeView:
    postgresql = WELL[name].snapshot.postgresql  # type: ignore[union-attr]
    return data(name, postgresql, RedisState(**state))


def test_a_well_cluster_has_no_problems() -> None:
    assert problems(cluster(), LAG) == []
    assert level([]) is Level.OK


@pytest.mark.parametrize(
    ("changes", "worst", "text"),
    [
        # Nodes that do not answer.
        ({"worker1": silent("worker1")}, "WARNING", "worker1: does not answer for 12 min: connection refused"),
        ({"airflow1": silent("airflow1", airflow_server=True)}, "CRITICAL", "no node is in charge of the scheduler; t"),
        # Components.
        (
            {"airflow2": server("airflow2", components=(part("api-server", "failed", detail="exit code 3"),))},
            "WARNING",
            "airflow2: api-server is failed for 100 s: exit code 3",
        ),
        (
            {name: server(name, name == "airflow1", components=(part("api-server", "unhealthy"),))
             for name in ("airflow1", "airflow2")},
            "CRITICAL",
            "airflow1: api-server is unhealthy",
        ),
        (
            {"worker1": worker("starting", 61)},
            "CRITICAL",
            "worker1: worker is starting for 61 s",
        ),
        (
            {"worker1": worker("unknown")},
            "CRITICAL",
            "worker is unknown",
        ),
        # The lease.
        ({"airflow1": server("airflow1")}, "CRITICAL", "no node is in charge of the scheduler; the last known was air"),
        ({"airflow2": server("airflow2", True)}, "CRITICAL", "in the charge of several: airflow1, airflow2"),
        ({"airflow1": server("airflow1", True, "unhealthy")}, "CRITICAL", "airflow1: scheduler is unhealthy"),
        ({"airflow2": server("airflow2", able=False, why="gave it up")}, "WARNING", "(airflow2: gave it up)"),
        ({"airflow2": None}, "WARNING", "no node could take the scheduler over"),
        ({"airflow2": server("airflow2", database="time-out")}, "WARNING", "airflow2: cannot reach the watchdogs' dat"),
        (
            {"airflow1": server("airflow1", True, paused=True, paused_left_s=1500.0, pause_reason="work")},
            "WARNING",
            "takeovers are paused for another 25 min: work",
        ),
        # PostgreSQL.
        ({"data1": pg("data1", role="down")}, "CRITICAL", "PostgreSQL has no primary"),
        ({"data2": pg("data2", role="primary", timeline=3)}, "CRITICAL", "PostgreSQL has several primaries: data1, da"),
        ({"data2": pg("data2", role="stale", timeline=2)}, "CRITICAL", "data2: PostgreSQL is a primary of the past"),
        ({"data2": pg("data2", role="standby", streaming=False)}, "WARNING", "standby is not connected to a primary"),
        ({"data2": pg("data2", role="unknown", detail="hm")}, "WARNING", "data2: PostgreSQL is unknown for 0.0 s: hm"),
        (
            {"data2": pg("data2", role="standby", streaming=True, lag_bytes=LAG + 1)},
            "WARNING",
            "data2: PostgreSQL's standby is 1.0 MB behind",
        ),
        ({"data1": silent("data1", data_node=True)}, "CRITICAL", "Redis has no primary"),
        # Redis.
        ({"data1": redis("data1", role="loading")}, "CRITICAL", "Redis has no primary"),
        ({"data2": redis("data2", role="primary")}, "CRITICAL", "Redis has several primaries: data1, data2"),
        ({"data2": redis("data2", role="replica", link_up=False)}, "WARNING", "data2: Redis: no link to its primary"),
        ({"data2": redis("data2", role="loading", detail="big")}, "WARNING", "data2: Redis is loading for 0.0 s: big"),
        ({"data1": redis("data1", role="primary", lag_bytes=LAG * 3)}, "WARNING", "a replica is 3.0 MB behind"),
    ],
)  # fmt: skip
def test_problems(changes: dict[str, NodeView | None], worst: str, text: str) -> None:
    found = problems(cluster(**changes), LAG)
    assert level(found).name == worst
    assert found[0].level.name == worst
    assert text in "\n".join(map(str, found))


@pytest.mark.parametrize(
    "changes",
    [
        {"airflow1": server("airflow1", True, components=(part("api-server", "starting", 5),))},
        {"data2": None, "airflow1": server("airflow1", True)},
        {"airflow2": server("airflow2", database="unknown")},
    ],
)
def test_what_is_no_problem(changes: dict[str, NodeView | None]) -> None:
    assert problems(cluster(**changes), LAG) == []


def test_with_all_schedulers_running_each_has_to() -> None:
    def both(first: str, second: str) -> Cluster:
        return cluster(
            airflow1=server("airflow1", scheduler=first, mode="active_active", holder=None),
            airflow2=server("airflow2", scheduler=second, mode="active_active", holder=None),
        )

    assert problems(both("running", "running"), LAG) == []
    assert level(problems(both("running", "failed"), LAG)) is Level.WARNING
    assert level(problems(both("failed", "failed"), LAG)) is Level.CRITICAL
    only = Snapshot(node="a", lease=LeaseView(mode="active_active"), scheduler=part("scheduler", "failed"))
    assert level(problems(Cluster("a", (NodeView("a", "", only),)), LAG)) is Level.CRITICAL


def test_who_sees_little_knows_little() -> None:
    # A worker knows of itself; a data node without its peer does not say that there is no primary.
    assert problems(Cluster("worker1", (WORKER,)), LAG) == []
    assert problems(Cluster("data2", (STANDBY,)), LAG) == []
    alone = problems(Cluster("data2", (STANDBY, silent("data1", data_node=True))), LAG)
    assert level(alone) is Level.CRITICAL
    nothing = problems(Cluster("worker1", (silent("worker1"),)), LAG)
    assert level(nothing) is Level.UNKNOWN
    # In charge, but without a word of the scheduler.
    mute = Snapshot(node="airflow1", lease=LeaseView(mode=ONE, held=True, holder="airflow1"))
    assert level(problems(Cluster("airflow1", (NodeView("airflow1", "", mute),)), LAG)) is Level.UNKNOWN


@pytest.mark.parametrize(
    ("changes", "target", "why"),
    [
        ({}, "airflow2", ""),
        ({}, None, ""),
        ({}, "airflow1", "airflow1 is in charge of the scheduler already"),
        ({}, "airflow9", "airflow9: no such node"),
        ({}, "data1", "data1 is not an Airflow server"),
        ({"airflow2": silent("airflow2", airflow_server=True)}, "airflow2", "airflow2 does not answer for 12 min: con"),
        ({"airflow2": silent("airflow2", airflow_server=True)}, None, "no node could take the scheduler over: airflow"),
        ({"airflow2": server("airflow2", able=False, why="gave it up")}, "airflow2", "airflow2: gave it up"),
        ({"airflow2": server("airflow2", database="time-out")}, "airflow2", "airflow2 cannot reach the watchdogs"),
        ({"airflow2": None}, None, "no node could take the scheduler over: no other"),
        ({"airflow1": server("airflow1", True, paused=True, pause_reason="work"),
          "airflow2": server("airflow2", paused=True, pause_reason="work")}, "airflow2", "takeovers are paused: work"),
        ({"airflow1": server("airflow1", holder=None), "airflow2": server("airflow2", holder=None)}, None, "no node i"),
        ({name: server(name, mode="active_active") for name in ("airflow1", "airflow2")}, None, "the mode is active_a"),
        ({"airflow1": None, "airflow2": None}, None, "no Airflow server answers"),
        ({"airflow2": NodeView("airflow2", "b", Snapshot(node="airflow2"), airflow_server=True)}, "airflow2",
         "airflow2 has no scheduler"),
    ],
)  # fmt: skip
def test_refusals_of_a_switchover(changes: dict[str, NodeView | None], target: str | None, why: str) -> None:
    assert refusal(cluster(**changes), target)[: len(why)] == why
    assert bool(refusal(cluster(**changes), target)) is bool(why)


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "?"), (0.04, "0.0 s"), (9.94, "9.9 s"), (10, "10 s"), (119, "119 s"), (720, "12 min"),
                          (7200, "2 h"), (172800, "2 d"), (1e6, "11 d")],
)  # fmt: skip
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "0 B"), (1023, "1023 B"), (1024, "1.0 kB"), (16 << 20, "16.0 MB"), (1 << 40, "1024.0 GB")],
)
def test_sizes(count: int | None, text: str) -> None:
    assert size(count) == text


def test_the_table() -> None:
    changes = {
        "worker1": silent("worker1"),
        "data2": pg("data2", role="standby", timeline=3, streaming=False),
        "data3": pg("data3", role="stale", timeline=2),
        "data4": data("data4", None, RedisState(role="loading")),
        "data5": data("data5", PostgresqlState(role="down"), RedisState(role="replica")),
        "airflow3": server("airflow3", able=False, why="gave it up", components=(part("flower", "failed"),)),
    }
    seen = cluster(**changes)
    lines = render(seen, problems(seen, LAG), colour=False).splitlines()
    assert lines[0] == "Scheduler: airflow1 in charge (epoch 12, lease ends in 8.1 s)"
    rows = {line.split()[0]: line for line in lines if line}
    for name, words in {
        "NODE": ("RACK", "WATCHDOG", "SCHEDULER", "POSTGRESQL", "REDIS", "COMPONENTS"),
        "airflow1": ("up 2 h", "in charge, running", "1 of 1 running"),
        "airflow2": ("standby",),
        "airflow3": ("out: gave it up", "0 of 1 running: flower failed 100 s"),
        "data1": ("up 50 s", "primary, timeline 3"),
        "data2": ("standby, timeline 3, not streaming",),
        "data3": ("stale, timeline 2",),
        "data4": ("loading",),
        "data5": ("down", "replica, no link"),
        "worker1": ("does not answer for 12 min: connection refused",),
        "CRITICAL": (),
    }.items():
        assert all(word in rows[name] for word in words), rows[name]
    # All columns begin where their heads do.
    assert rows["data1"].index("primary") == rows["NODE"].index("POSTGRESQL")
    assert "\033" not in "".join(lines)
    coloured = render(seen, problems(seen, LAG), colour=True)
    assert "\033[32min charge, running" in coloured
    assert "\033[31mdoes not answer" in coloured


def test_the_table_of_a_node_that_has_little_is_small() -> None:
    text = render(Cluster("worker1", (WORKER,)), [], colour=False)
    assert text.splitlines()[0].split() == ["NODE", "RACK", "WATCHDOG", "COMPONENTS"]
    assert text.splitlines()[-1] == "Everything is well."


def test_the_first_line_says_who_is_in_charge() -> None:
    def first(**changes: NodeView | None) -> str:
        return render(cluster(**changes), [], colour=False).splitlines()[0]

    paused = server("airflow1", True, paused=True, paused_left_s=90.0, pause_reason="work")
    assert first(airflow1=paused).endswith(", paused for 90 s: work")
    nobody = {name: server(name, holder=None) for name in ("airflow1", "airflow2")}
    assert first(**nobody) == "Scheduler: nobody in charge (epoch 12)"
    every = {name: server(name, mode="active_active") for name in ("airflow1", "airflow2")}
    assert first(**every) == "Scheduler: active_active, every node's runs"
    assert "running" in render(cluster(**every), [], colour=False)


def test_json_holds_everything_once() -> None:
    seen = cluster(worker1=silent("worker1"))
    shown = as_dict(seen, problems(seen, LAG))
    assert (shown["health"], shown["lease"]["holder"]) == ("WARNING", "airflow1")
    assert shown["problems"][0]["node"] == "worker1"
    nodes = {node["name"]: node for node in shown["nodes"]}
    assert nodes["worker1"]["silent_for_s"] == 720
    assert nodes["data1"]["snapshot"]["postgresql"]["role"] == "primary"
    assert as_dict(Cluster("x", (silent("x"),)), [])["lease"] is None
