"""The data node's agent: pure rules by table, and a real primary with its standby, hung, stopped and of the past."""

import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from airflow_watchdog import agent
from airflow_watchdog.agent import AskError, PostgresqlAgent, Watched, compare
from airflow_watchdog.config import Postgresql
from airflow_watchdog.snapshot import PostgresqlState
from servers import PostgresqlServer, eventually, postgresql_programs

PROGRAMS = postgresql_programs()
UNIT = "postgresql@17-main.service"


def pg(role: str = "primary", timeline: int | None = 1) -> PostgresqlState:
    return PostgresqlState(role=role, timeline=timeline)


@pytest.mark.parametrize(
    ("own", "peers", "newer", "rivals"),
    [
        (pg(timeline=2), {}, None, ()),
        (pg(timeline=2), {"b": pg(timeline=3)}, ("b", 3), ()),
        (pg(timeline=2), {"b": pg(timeline=3), "c": pg(timeline=4)}, ("c", 4), ()),
        (pg(timeline=2), {"b": pg(timeline=1)}, None, ()),
        (pg(timeline=2), {"b": pg(timeline=2), "c": pg(timeline=1)}, None, ("b",)),
        # Only who is primary, and says on which timeline, is evidence.
        (pg(timeline=2), {"b": pg("standby", 3), "c": pg("stale", 3), "d": pg("unknown", 3)}, None, ()),
        (pg(timeline=2), {"b": pg("down", 9), "c": pg("primary", None)}, None, ()),
        (pg("standby", 2), {"b": pg(timeline=3)}, None, ()),
        (pg("unknown", None), {"b": pg(timeline=3)}, None, ()),
        (pg("primary", None), {"b": pg(timeline=3)}, None, ()),
    ],
)
def test_only_an_answering_primary_of_a_newer_timeline_makes_a_primary_one_of_the_past(
    own: PostgresqlState,
    peers: dict[str, PostgresqlState],
    newer: tuple[str, int] | None,
    rivals: tuple[str, ...],
) -> None:
    assert compare(own, peers) == (newer, rivals)


class Fake:
    """An agent whose PostgreSQL says what the test wants."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path | None = None, fence: bool = True) -> None:
        self.says: PostgresqlState | AskError = pg()
        self.stopped: list[str] = []
        self.problem: Exception | None = None
        monkeypatch.setattr(agent, "CACHE_S", -1.0)
        self.agent = PostgresqlAgent(Postgresql(unit=UNIT, fence=fence), 1.0, self.stop, folder)
        monkeypatch.setattr(self.agent._watched, "_ask", self.ask)

    def ask(self) -> PostgresqlState:
        if isinstance(self.says, AskError):
            raise self.says
        return self.says

    def stop(self, unit: str) -> None:
        self.stopped.append(unit)
        if self.problem:
            raise self.problem


def test_a_primary_of_the_past_is_stopped_once_and_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = Fake(monkeypatch, tmp_path)
    marker = tmp_path / "postgresql-fenced.json"
    assert fake.agent.judge({"b": pg("standby")}).role == "primary"
    assert fake.agent.judge({}).role == "primary"
    assert not fake.stopped
    state = fake.agent.judge({"b": pg(timeline=2)})
    assert (state.role, state.detail) == ("stale", "b is primary on the newer timeline 2")
    assert fake.agent.state().role == "stale"
    assert fake.agent.judge({"b": pg(timeline=2)}).role == "stale"
    assert fake.stopped == [UNIT]
    assert json.loads(marker.read_text()) == {"own_timeline": 1, "peer": "b", "peer_timeline": 2}
    fake.says = AskError("down", "no such file")
    assert "it was the primary of an older timeline" in fake.agent.judge({"b": pg(timeline=2)}).detail
    # Nothing is known against its marker while nobody answers.
    fake.says = pg()
    fake.agent.judge({})
    assert marker.exists()
    fake.says = pg("standby", 2)
    assert fake.agent.judge({"b": pg(timeline=2)}).role == "standby"
    assert not marker.exists()
    fake.says = AskError("down", "no such file")
    assert fake.agent.state().detail == "no such file"


def test_a_cluster_restored_onto_a_lower_timeline_is_welcome(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = Fake(monkeypatch, tmp_path)
    assert fake.agent.judge({"b": pg(timeline=7)}).role == "stale"
    # The other member stops being primary, or stops answering: what it said counts no more.
    assert fake.agent.judge({"b": pg("standby", 7)}).role == "primary"
    assert fake.agent.judge({"b": pg(timeline=7)}).role == "stale"
    assert fake.agent.judge({}).role == "primary"
    fake.agent.judge({"b": pg("down", None)})
    assert not (tmp_path / "postgresql-fenced.json").exists()
    assert fake.agent.state().role == "primary"


def test_a_stop_that_fails_is_tried_again_later(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = Fake(monkeypatch, tmp_path / "not there")
    fake.problem = RuntimeError("not allowed")
    monkeypatch.setattr(agent, "FENCE_PERIOD_S", 0.1)
    for _ in range(3):
        assert fake.agent.judge({"b": pg(timeline=2)}).role == "stale"
    assert fake.stopped == [UNIT]
    time.sleep(0.11)
    fake.agent.judge({"b": pg(timeline=2)})
    assert fake.stopped == [UNIT] * 2


def test_without_fence_it_is_only_told(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(monkeypatch, fence=False)
    assert fake.agent.judge({"b": pg(timeline=2)}).role == "stale"
    assert not fake.stopped


def test_two_primaries_of_one_timeline_are_told_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(monkeypatch)
    state = fake.agent.judge({"b": pg(), "c": pg("standby")})
    assert (state.role, state.detail) == ("primary", "also primary on this timeline: b")
    assert not fake.stopped


def test_a_state_is_kept_for_a_moment_and_nobody_waits_long_for_a_slow_question() -> None:
    asked = []
    go, inside = threading.Event(), threading.Event()

    def ask() -> PostgresqlState:
        asked.append(1)
        if len(asked) == 2:
            inside.set()
            go.wait(5)
        return pg()

    watched = Watched[PostgresqlState](ask, lambda role, detail: PostgresqlState(role=role, detail=detail), 0.1)
    assert [watched.state(max_age_s=60).role for _ in range(5)] == ["primary"] * 5
    assert len(asked) == 1
    slow = threading.Thread(target=lambda: watched.state(max_age_s=0))
    slow.start()
    inside.wait(5)
    assert (watched.state().role, watched.state().detail) == ("unknown", "no answer in time")
    go.set()
    slow.join()
    assert watched.state().role == "primary"
    # The role did not change: its age is that of the first answer.
    assert watched.state().for_s > 0.2


# --- with PostgreSQL ---


@dataclass
class Pair:
    primary: PostgresqlServer
    standby: PostgresqlServer


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    if PROGRAMS is None:
        pytest.skip("PostgreSQL is not installed")
    # In /tmp, for the length of a socket's name, and since PostgreSQL's account must reach it.
    folder = Path(tempfile.mkdtemp(prefix="wd-agent-", dir="/tmp"))
    folder.chmod(0o755)
    for name in ("a", "b"):
        (folder / name).mkdir()
    servers = Pair(PostgresqlServer(folder / "a", PROGRAMS), PostgresqlServer(folder / "b", PROGRAMS))
    try:
        servers.primary.create()
        servers.primary.start()
        servers.primary.sql('create role "airflow-watchdog" login in role pg_monitor')
        servers.standby.clone(servers.primary)
        servers.standby.start()
        yield servers
    finally:
        servers.standby.stop()
        servers.primary.stop()
        shutil.rmtree(folder)


def watch(server: PostgresqlServer, stopped: list[str] | None = None) -> PostgresqlAgent:
    def stop(unit: str) -> None:
        assert stopped is not None
        stopped.append(unit)
        server.stop()

    return PostgresqlAgent(Postgresql(unit=UNIT, socket=server.folder), 0.5, stop)


def test_roles_timeline_and_lag_of_a_real_pair(pair: Pair) -> None:
    primary, standby = watch(pair.primary), watch(pair.standby)
    state = primary.state()
    assert (state.role, state.timeline, state.lag_bytes, state.streaming) == ("primary", 1, None, None)
    state = eventually(lambda: (s := standby.state()).streaming and s)
    assert (state.role, state.timeline, state.detail) == ("standby", 1, "")
    eventually(lambda: standby.state().lag_bytes == 0)
    pair.standby.sql("select pg_wal_replay_pause()")
    pair.primary.sql("create table t as select generate_series(1, 10000) n")
    state = eventually(lambda: (s := standby.state()).lag_bytes and s)
    assert state.lag_bytes > 100_000
    assert state.detail == "replay is paused"
    pair.standby.sql("select pg_wal_replay_resume()")
    eventually(lambda: standby.state().lag_bytes == 0)
    primary.close()
    standby.close()


def test_one_connection_is_kept_and_renewed(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    primary = watch(pair.primary)
    backends = (
        "select string_agg(pid::text, ',') from pg_stat_activity where application_name = 'airflow-watchdog agent'"
    )
    monkeypatch.setattr(agent, "CACHE_S", 0.0)
    assert primary.state().role == "primary"
    before = eventually(lambda: pair.primary.sql(backends))
    assert "," not in before
    for _ in range(20):
        assert primary.state().role == "primary"
    assert pair.primary.sql(backends) == before
    monkeypatch.setattr(agent, "RECONNECT_S", 0.0)
    assert primary.state().role == "primary"
    eventually(lambda: pair.primary.sql(backends) not in ("", before))
    # That somebody ends our connection says nothing of the server.
    monkeypatch.setattr(agent, "RECONNECT_S", 60.0)
    pair.primary.sql(
        "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'airflow-watchdog agent'"
    )
    assert primary.state().role == "primary"
    primary.close()


def test_a_server_that_hangs_is_unknown_in_time_and_comes_back(pair: Pair) -> None:
    primary = watch(pair.primary)
    assert primary.state().role == "primary"
    pid = int(pair.primary.sql("select pid from pg_stat_activity where application_name = 'airflow-watchdog agent'"))
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(agent.CACHE_S)
        before = time.monotonic()
        state = primary.state()
        assert (state.role, state.detail) == ("unknown", "no answer in time")
        assert time.monotonic() - before < 1
    finally:
        os.kill(pid, signal.SIGCONT)
    eventually(lambda: primary.state().role == "primary")
    primary.close()


def test_a_server_that_is_not_there_is_down(tmp_path: Path) -> None:
    absent = PostgresqlAgent(Postgresql(unit=UNIT, socket=tmp_path), 0.5, lambda _unit: None)
    assert absent.state().role == "down"
    assert absent.judge({"b": pg(timeline=9)}).role == "down"


def test_a_former_primary_that_comes_back_is_stopped_and_the_new_one_is_not(pair: Pair) -> None:
    """Last in this module: the pair is apart after it. Fault cases 13 and 17: promoted behind the cluster's back."""
    stopped_old: list[str] = []
    stopped_new: list[str] = []
    old, new = watch(pair.primary, stopped_old), watch(pair.standby, stopped_new)
    assert old.judge({"new": new.state()}).role == "primary"
    assert new.judge({"old": old.state()}).role == "standby"
    pair.standby.sql("select pg_promote()")
    eventually(lambda: new.judge({"old": old.state()}).role == "primary")
    assert (new.state().timeline, old.state().timeline) == (2, 1)
    assert old.judge({"new": new.state()}).role == "stale"
    assert (stopped_old, stopped_new) == ([UNIT], [])
    assert old.judge({"new": new.state()}).role == "down"
    assert new.judge({"old": old.state()}).role == "primary"
    old.close()
    new.close()
