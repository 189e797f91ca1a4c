"""The statements against a real PostgreSQL: the rules of the simulation's database, and every call with an end."""

import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from airflow_watchdog import lease, store
from airflow_watchdog.config import Config, ConfigError
from airflow_watchdog.events import Event
from airflow_watchdog.lease import Acquire, Answer, Poll, Release, Renew, Row
from airflow_watchdog.snapshot import State
from servers import PostgresqlServer, postgresql_programs

TTL = 10.0


@pytest.fixture(scope="module")
def postgresql() -> Iterator[PostgresqlServer]:
    programs = postgresql_programs()
    assert programs, "PostgreSQL is not installed: make host"
    # Not in pytest's folder: its path is too long for a socket, and closed to the server's account.
    folder = Path("/tmp") / f"watchdog-store-{os.getpid()}"
    folder.mkdir(mode=0o755)
    server = PostgresqlServer(folder, programs)
    try:
        server.create()
        server.start()
        server.sql("CREATE ROLE watchdog LOGIN")
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder)


@pytest.fixture
def database(postgresql: PostgresqlServer) -> PostgresqlServer:
    """An empty database of the watchdogs."""
    postgresql.sql("DROP DATABASE IF EXISTS watchdog WITH (FORCE)")
    postgresql.sql("CREATE DATABASE watchdog OWNER watchdog")
    return postgresql


def configure(*hosts: object, node: str = "a", port: int = 5432, timeout_s: float = 2.0, **database: object) -> Config:
    return Config.model_validate(
        {
            "node": {"name": node},
            "http": {"certificate": "/c", "key": "/k", "ca": "/a"},
            "loop": {"timeout_s": timeout_s},
            "scheduler": {},
            "database": {"hosts": [str(host) for host in hosts], "port": port, **database},
        }
    )


def a_lease(*servers: PostgresqlServer, node: str = "a", timeout_s: float = 2.0) -> store.Lease:
    return store.Lease(store.Server(configure(*(s.folder for s in servers), node=node, timeout_s=timeout_s)), TTL)


def row(answer: Answer) -> Row:
    assert answer.row is not None, answer.error
    return answer.row


def sql(server: PostgresqlServer, text: str) -> str:
    return server._do("psql", "-h", server.folder, "-U", "postgres", "-XAtq", "-c", text, "watchdog").strip()


def expire(server: PostgresqlServer, seconds: float = 0.0) -> None:
    sql(server, f"UPDATE lease SET expires_at = clock_timestamp() + make_interval(secs => {seconds})")


def take(own: store.Lease) -> Row:
    free = row(own.execute(Poll()))
    taken = own.execute(Acquire(free.version, free.current))
    assert taken.done
    return row(taken)


# --- the lease ---


def test_a_life_of_a_lease(database: PostgresqlServer) -> None:
    own = a_lease(database)
    free = own.execute(Poll())
    # Written on no timeline: nobody trusts that it was given back.
    assert row(free) == Row(None, 0, 0, timeline=0, current=1, ttl_s=0.0)
    assert not free.done
    taken = own.execute(Acquire(0, 1))
    assert taken.done
    assert row(taken) == Row("a", 1 << 32, 1, timeline=1, current=1, ttl_s=TTL)
    assert taken.sent_at <= taken.received_at
    renewed = own.execute(Renew(1 << 32))
    assert renewed.done
    assert row(renewed).version == 2
    assert not own.execute(Renew(1)).done
    assert not own.execute(Release(1, None)).done
    given = own.execute(Release(1 << 32, "b"))
    assert given.done
    assert (row(given).holder, row(given).reserved_for, row(given).version) == (None, "b", 3)
    assert not own.execute(Renew(1 << 32)).done
    again = take(own)
    assert (again.epoch, again.reserved_for) == ((1 << 32) + 1, None)


def test_one_of_two_takes_it(database: PostgresqlServer) -> None:
    own, other = a_lease(database), a_lease(database, node="b")
    own.execute(Poll())
    other.execute(Poll())
    answers = [own.execute(Acquire(0, 1)), other.execute(Acquire(0, 1))]
    assert [answer.done for answer in answers] == [True, False]
    assert row(answers[1]).holder == "a"
    # The right version, but not expired.
    assert not other.execute(Acquire(1, 1)).done
    expire(database)
    assert not other.execute(Acquire(0, 1)).done
    assert not other.execute(Acquire(1, 2)).done
    taken = other.execute(Acquire(1, 1))
    assert taken.done
    assert row(taken).epoch == (1 << 32) + 1


def test_a_clock_that_was_set_back_blocks_nobody_for_long(database: PostgresqlServer) -> None:
    own, other = a_lease(database), a_lease(database, node="b")
    version = take(own).version
    expire(database, 60)
    assert other.execute(Acquire(version, 1)).done
    # A longer lease of another configuration is no such case.
    sql(database, "UPDATE lease SET ttl_s = 100")
    expire(database, 60)
    assert not own.execute(Acquire(version + 1, 1)).done


def test_paused_nobody_takes_it_and_a_switchover_is_shown(database: PostgresqlServer) -> None:
    own, control = a_lease(database), store.Control(configure(database.folder))
    holder = take(own)
    control.pause(60, "work on the racks", "ann")
    paused = row(own.execute(Renew(holder.epoch)))
    assert paused.pause_reason == "work on the racks"
    assert paused.paused_left_s == pytest.approx(60, abs=5)
    with pytest.raises(store.RefusedError, match="paused"):
        control.switchover(None, "ann")
    own.execute(Release(holder.epoch, None))
    assert not own.execute(Acquire(row(own.execute(Poll())).version, 1)).done
    assert control.resume("ann")
    assert not control.resume("ann")
    holder = take(own)
    for target, why in (("a", "in charge already"), ("b", "nothing was heard")):
        with pytest.raises(store.RefusedError, match=why):
            control.switchover(target, "ann")
    beats = store.Heartbeats(store.Server(configure(database.folder)), 2.0)
    beats.write([store.Beat("b", "", "watchdog", State.RUNNING)], [], ["a", "b"])
    control.switchover("b", "ann")
    assert row(own.execute(Renew(holder.epoch))).wanted == "b"
    control.withdraw()
    assert row(own.execute(Poll())).wanted is None
    control.switchover(None, "ann")
    assert row(own.execute(Poll())).wanted == "*"
    # It is followed, or forgotten.
    sql(database, "UPDATE lease SET wanted_until = clock_timestamp()")
    assert row(own.execute(Poll())).wanted is None
    own.execute(Release(holder.epoch, None))
    with pytest.raises(store.RefusedError, match="nobody is in charge"):
        control.switchover(None, "ann")
    kinds = [event.kind for event in control.history(10)]
    assert kinds == ["paused", "resumed", "switchover_asked", "switchover_asked"]
    assert control.history(1)[0].message == "ann asks a to hand the scheduler over to any other node"
    control.close()


def test_what_others_do_is_heard_at_once(database: PostgresqlServer) -> None:
    own, other = a_lease(database), a_lease(database, node="b")
    assert own.link.fileno() is None
    assert own.link.notified()
    epoch = take(other).epoch
    own.execute(Poll())
    assert not own.link.notified()
    other.execute(Renew(epoch))
    time.sleep(0.05)
    assert not own.link.notified()
    other.execute(Release(epoch, None))
    assert wait_for_news(own.link)
    store.Control(configure(database.folder)).pause(1, "a moment", "ann")
    assert wait_for_news(own.link)
    # A connection that was ended is news, too.
    sql(database, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE '%lease a'")
    assert wait_for_news(own.link)
    assert own.execute(Poll()).row


def wait_for_news(link: store.Link) -> bool:
    for _ in range(200):
        if link.notified():
            return True
        time.sleep(0.01)
    return False


def test_tables_are_made_once_whoever_comes_first(database: PostgresqlServer) -> None:
    links = [store.Link(store.Server(configure(database.folder, node=name)), "test") for name in "abc"]
    for link in links:
        link.migrate()
    assert sql(database, "SELECT count(*) FROM migration") == str(len(store.MIGRATIONS))
    assert sql(database, "SELECT count(*) FROM lease") == "1"


def test_lost_tables_and_a_lost_row_are_made_anew(database: PostgresqlServer) -> None:
    own = a_lease(database)
    take(own)
    sql(database, "DROP TABLE lease, heartbeat, event, migration")
    assert "does not exist" in own.execute(Poll()).error
    assert row(own.execute(Poll())).epoch == 0
    sql(database, "DELETE FROM lease")
    assert own.execute(Poll()).error == "the lease's row is missing"


# --- heartbeats and events ---


def beat(node: str, component: str, state: str, age_s: float = 0.0, detail: str = "") -> store.Beat:
    return store.Beat(node, "r", component, state, detail, age_s)


def test_only_the_first_to_bring_a_change_hears_of_it(database: PostgresqlServer) -> None:
    a_lease(database).execute(Poll())
    one, two = (store.Heartbeats(store.Server(configure(database.folder, node=name)), 2.0) for name in "ab")
    known = ["a", "b", "w"]
    assert one.write([beat("w", "worker", "running"), beat("w", "watchdog", "running")], [], known) == []
    (change,) = one.write([beat("w", "worker", "failed", detail="oom")], [], known)
    assert (change.kind, change.node, change.component, change.severity) == ("component", "w", "worker", "warning")
    assert change.message == "w: worker is failed, was running: oom"
    assert two.write([beat("w", "worker", "failed", detail="oom")], [], known) == []
    # What was seen earlier than what is known already does not count.
    assert two.write([beat("w", "worker", "running", age_s=1.5)], [], known) == []
    (change,) = two.write([beat("w", "worker", "running")], [], known)
    assert change.severity == "info"


def test_events_are_kept_with_their_time_and_forgotten_in_time(database: PostgresqlServer) -> None:
    a_lease(database).execute(Poll())
    beats = store.Heartbeats(store.Server(configure(database.folder, event_retention_days=7)), 2.0)
    now = time.time()
    events = [
        Event("later", "a", "second", at=now - 5),
        Event("earlier", "a", "first\0", "scheduler", "critical", at=now - 60),
        Event("ancient", "a", "gone", at=now - 8 * 86400),
    ]
    assert beats.write([], events, ["a"]) == []
    control = store.Control(configure(database.folder))
    assert [event.kind for event in control.history(10)] == ["ancient", "earlier", "later"]
    first = control.history(10)[1]
    assert replace(first, at=0.0) == Event("earlier", "a", "first", "scheduler", "critical")
    assert first.at == pytest.approx(now - 60, abs=5)
    beats.sweep_when_due()
    assert [event.kind for event in control.history(10)] == ["earlier", "later"]
    assert [event.kind for event in control.history(1)] == ["later"]
    sql(database, "UPDATE event SET at = at - interval '8 days'")
    beats.sweep_when_due()
    assert len(control.history(10)) == 2


def test_a_node_that_stops_answering_is_silent_since_it_was_last_heard(database: PostgresqlServer) -> None:
    a_lease(database).execute(Poll())
    beats = store.Heartbeats(store.Server(configure(database.folder)), 0.1)
    known = ["a", "w"]
    beats.write([beat("w", "worker", "running"), beat("w", "watchdog", "running")], [], known)
    time.sleep(0.5)
    (change,) = beats.write([beat("a", "watchdog", "running")], [], known)
    assert (change.kind, change.node, change.severity) == ("node_silent", "w", "critical")
    assert beats.write([beat("a", "watchdog", "running")], [], known) == []
    states = sql(database, "SELECT state, since = seen_at, detail FROM heartbeat WHERE node = 'w'")
    assert set(states.splitlines()) == {"unknown|t|no answer"}
    # It comes back.
    (one, two) = beats.write([beat("w", "worker", "running"), beat("w", "watchdog", "running")], [], known)
    assert {one.message, two.message} == {"w: worker is running, was unknown", "w: watchdog is running, was unknown"}


@pytest.mark.parametrize("hours", [24, 24 * 365])
def test_a_heartbeat_of_exactly_a_day_is_a_day_old(database: PostgresqlServer, hours: int) -> None:
    a_lease(database).execute(Poll())
    beats = store.Heartbeats(store.Server(configure(database.folder)), 2.0)
    beats.write([beat("w", "watchdog", "running", age_s=hours * 3600.0)], [], ["w"])
    age = sql(database, "SELECT round(extract(epoch FROM now() - seen_at) / 3600) FROM heartbeat")
    assert int(age) == hours
    assert [change.kind for change in beats.write([], [], ["w"])] == ["node_silent"]


def test_what_is_gone_for_good_is_forgotten_and_a_future_time_blocks_nothing(database: PostgresqlServer) -> None:
    a_lease(database).execute(Poll())
    beats = store.Heartbeats(store.Server(configure(database.folder)), 2.0)
    beats.write(
        [beat("old", "watchdog", "running"), beat("w", "old", "running"), beat("w", "new", "running")], [], ["w"]
    )
    sql(database, "UPDATE heartbeat SET seen_at = seen_at - interval '1 hour'")
    beats.write([beat("w", "new", "running")], [], ["w"])
    assert sql(database, "SELECT node, component FROM heartbeat") == "w|new"
    # The clock of the database's machine was an hour fast for a while.
    sql(database, "UPDATE heartbeat SET seen_at = seen_at + interval '1 hour'")
    (change,) = beats.write([beat("w", "new", "failed")], [], ["w"])
    assert change.component == "new"


def test_one_statement_writes_hundreds_of_nodes(database: PostgresqlServer) -> None:
    a_lease(database).execute(Poll())
    beats = store.Heartbeats(store.Server(configure(database.folder)), 2.0)
    nodes = [f"n{number}" for number in range(500)]
    many = [beat(node, part, "running") for node in nodes for part in ("watchdog", "worker")]
    for _ in range(2):
        assert beats.write(many, [], nodes) == []
    assert sql(database, "SELECT count(*) FROM heartbeat") == "1000"


# --- failures ---


@pytest.mark.parametrize("behaviour", ["refused", "silent", "reset", "not a name"])
def test_no_kind_of_broken_server_holds_us_up(behaviour: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])
        host = "no-such-host.invalid" if behaviour == "not a name" else "127.0.0.1"
        if behaviour == "refused":
            listener.close()
        elif behaviour == "reset":
            listener.listen(0)
        own = store.Lease(store.Server(configure(host, port=port, timeout_s=0.5)), TTL)
        begin = time.monotonic()
        answer = own.execute(Renew(1))
        assert time.monotonic() - begin < 1.5
    assert answer.row is None
    assert answer.error
    assert "\n" not in answer.error


def test_a_server_that_hangs_in_the_middle_is_given_up_in_time(database: PostgresqlServer) -> None:
    own = a_lease(database, timeout_s=0.5)
    epoch = take(own).epoch
    pid = int(sql(database, "SELECT pid FROM pg_stat_activity WHERE application_name LIKE '%lease a'"))
    os.kill(pid, signal.SIGSTOP)
    try:
        begin = time.monotonic()
        answer = own.execute(Renew(epoch))
        assert 0.4 < time.monotonic() - begin < 1.5
        assert answer.row is None
        assert answer.error == "no answer in time"
        # A new connection works.
        assert row(own.execute(Poll())).holder == "a"
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_dead_host_costs_the_others_no_time(database: PostgresqlServer) -> None:
    # Two folders that are hosts: in one nobody listens, the other is behind it in the list.
    server = store.Server(configure("/nonexistent", database.folder, timeout_s=1.0))
    own = store.Lease(server, TTL)
    begin = time.monotonic()
    assert row(own.execute(Poll())).epoch == 0
    assert time.monotonic() - begin < 1.0


def test_a_statement_that_waits_for_a_lock_ends(database: PostgresqlServer) -> None:
    own = a_lease(database, timeout_s=0.5)
    take(own)
    link = store.Link(store.Server(configure(database.folder)), "test")
    link.fetch("BEGIN")
    link.fetch("LOCK TABLE lease")
    answer = own.execute(Poll())
    assert answer.row is None
    assert "timeout" in answer.error or "in time" in answer.error
    link.close()


def test_an_unreadable_password_and_no_database_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        store.Server(configure("h", password_file=str(tmp_path / "none")))
    bare = Config.model_validate({"node": {"name": "a"}, "http": {"certificate": "/c", "key": "/k", "ca": "/a"}})
    with pytest.raises(ConfigError, match="database: is missing"):
        store.Server(bare)


def test_the_password_and_the_ca_reach_libpq_and_no_error(tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("s3cret'\\ word\n")
    server = store.Server(configure("127.0.0.1", password_file=str(secret), ca="/etc/ca.crt", timeout_s=0.3, port=1))
    told = server._conninfo("127.0.0.1", "lease")
    assert "sslmode=verify-full" in told
    assert "target_session_attrs=read-write" in told
    with pytest.raises(store.StoreError) as error:
        server.connect("lease", 0.3)
    assert "s3cret" not in str(error.value)


# --- promotion ---


@pytest.fixture
def standby(database: PostgresqlServer) -> Iterator[PostgresqlServer]:
    folder = Path("/tmp") / f"watchdog-standby-{os.getpid()}"
    folder.mkdir(mode=0o755)
    server = PostgresqlServer(folder, database._programs)
    try:
        server.clone(database)
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder)


def test_a_promoted_standby_gives_out_greater_epochs_though_it_lacks_the_last_ones(
    database: PostgresqlServer, standby: PostgresqlServer
) -> None:
    own = a_lease(database, standby)
    first = take(own)
    lsn = database.sql("SELECT pg_current_wal_lsn()")
    for _ in range(1000):
        if standby.sql(f"SELECT pg_last_wal_replay_lsn() >= '{lsn}'") == "t":
            break
        time.sleep(0.02)
    # A standby is no server for us, whatever its place in the list.
    assert row(a_lease(standby, database, node="b").execute(Poll())).holder == "a"
    standby.sql("ALTER SYSTEM SET primary_conninfo = ''")
    standby.sql("SELECT pg_reload_conf()")
    time.sleep(0.3)
    # These are lost.
    for _ in range(3):
        given = own.execute(Release(row(own.execute(Poll())).epoch, None))
        assert given.done
        last = take(own)
    assert last.epoch > first.epoch
    standby.sql("SELECT pg_promote()")
    # Both are primaries for a moment: the newer timeline counts, and the older one is nobody for good.
    other = a_lease(database, standby, node="b")
    seen = row(other.execute(Poll()))
    assert (seen.epoch, seen.timeline, seen.current) == (first.epoch, 1, 2)
    # Its holder's renewal goes on, if it was not for the lost ones: here it was.
    database.stop("immediate")
    assert own.execute(Renew(last.epoch)).row is None
    assert not own.execute(Renew(last.epoch)).done
    expire(standby)
    taken = other.execute(Acquire(seen.version, 2))
    assert taken.done
    assert row(taken).epoch == 2 << 32
    assert row(taken).epoch > last.epoch
    assert row(taken).timeline == 2
    database.start()
    # The former primary is up, and writable, and nobody's any more.
    assert other.link.server.newest_timeline == 2
    alone = store.Server(configure(database.folder))
    alone.newest_timeline = 2
    with pytest.raises(store.StoreError, match="a former primary"):
        alone.connect("test", 2.0)
    assert row(other.execute(Poll())).current == 2


def test_a_holder_renews_over_a_promotion_that_lost_nothing(
    database: PostgresqlServer, standby: PostgresqlServer
) -> None:
    own = a_lease(database, standby)
    holder = take(own)
    database.stop("fast")
    assert own.execute(Renew(holder.epoch)).row is None
    standby.sql("SELECT pg_promote()")
    renewed = own.execute(Renew(holder.epoch))
    database.start()
    assert renewed.done
    assert (row(renewed).epoch, row(renewed).timeline, row(renewed).current) == (holder.epoch, 2, 2)
    assert isinstance(renewed.command, lease.Renew)
