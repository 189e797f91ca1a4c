"""The daemon as a whole: real threads, a real PostgreSQL, HTTPS; systemd is a bus of our own."""

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from airflow_watchdog import daemon, permit, store
from airflow_watchdog.config import Config
from airflow_watchdog.daemon import Daemon, beats_of, is_healthy
from airflow_watchdog.snapshot import ComponentState, LeaseView, PostgresqlState, RedisState, Snapshot, State
from airflow_watchdog.units import Systemd
from bus import FakeSystemd
from servers import Authority, PostgresqlServer, eventually, free_port, postgresql_programs

SCHEDULER = "airflow-scheduler.service"


@pytest.fixture(scope="module")
def postgresql() -> Iterator[PostgresqlServer]:
    programs = postgresql_programs()
    assert programs, "PostgreSQL is not installed: make host"
    folder = Path("/tmp") / f"watchdog-daemon-{os.getpid()}"
    folder.mkdir(mode=0o755)
    server = PostgresqlServer(folder, programs)
    try:
        server.create()
        server.start()
        server.sql("CREATE ROLE watchdog LOGIN SUPERUSER")
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder)


@pytest.fixture
def database(postgresql: PostgresqlServer) -> PostgresqlServer:
    postgresql.sql("DROP DATABASE IF EXISTS watchdog WITH (FORCE)")
    postgresql.sql("CREATE DATABASE watchdog OWNER watchdog")
    return postgresql


class Machine:
    """One node: its systemd, its configuration, and a daemon in a thread."""

    def __init__(self, name: str, folder: Path, authority: Authority, **sections: Any) -> None:
        self.folder = folder / name
        self.folder.mkdir()
        self.systemd = FakeSystemd(self.folder)
        self.port = free_port()
        self.authority = authority
        self.content: dict[str, Any] = {
            "node": {"name": name, "rack": "a"},
            "http": {
                "address": "127.0.0.1", "port": self.port, "certificate": str(authority.certificate),
                "key": str(authority.key), "ca": str(authority.ca),
            },
            "loop": {"interval_s": 0.1, "timeout_s": 0.6, "ttl_s": 2.0},
            **sections,
        }  # fmt: skip
        self.daemon: Daemon | None = None
        self.result: list[int] = []

    def server(self, database: PostgresqlServer, **changes: Any) -> "Machine":
        """Make it an Airflow server."""
        self.systemd.units[SCHEDULER] = ["loaded", "inactive", "dead", "00" * 16]
        times = {
            "stop_timeout_s": 0.4,
            "kill_margin_s": 0.2,
            "hung_after_s": 0.5,
            "start_grace_s": 0.5,
            "down_after_s": 1,
        }
        self.content["scheduler"] = {
            "health_url": None, "permit_file": str(self.folder / "permit.json"), "cooldown_s": 1, **times, **changes
        }  # fmt: skip
        self.content["database"] = {"hosts": [str(database.folder)]}
        self.content["component"] = [{"name": "scheduler", "unit": SCHEDULER}]
        return self

    def start(self) -> "Machine":
        self.daemon = Daemon(Config.model_validate(self.content), Systemd(0.5, self.systemd.address))
        self.thread = threading.Thread(target=lambda: self.result.append(self.own.run()))
        self.thread.start()
        return self

    @property
    def own(self) -> Daemon:
        assert self.daemon is not None
        return self.daemon

    @property
    def runs(self) -> bool:
        return self.systemd.units[SCHEDULER][1] == "active"

    def get(self, path: str) -> tuple[int, Any]:
        context = ssl.create_default_context(cafile=str(self.authority.ca))
        try:
            answer = urllib.request.urlopen(f"https://127.0.0.1:{self.port}{path}", context=context, timeout=5)
        except urllib.error.HTTPError as error:
            answer = error
        text = answer.read()
        return answer.status, json.loads(text) if path != "/metrics" else text.decode()

    def stop(self) -> int:
        self.own.stop()
        self.thread.join(15)
        assert not self.thread.is_alive()
        self.daemon = None
        return self.result.pop()

    def clean(self) -> None:
        if self.daemon is not None:
            self.stop()
        self.systemd.close()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Callable[..., Machine]]:
    made: list[Machine] = []
    authority = Authority(tmp_path)

    def make(name: str, **sections: Any) -> Machine:
        made.append(Machine(name, tmp_path, authority, **sections))
        return made[-1]

    yield make
    for one in made:
        one.clean()


def ready(database: PostgresqlServer) -> None:
    """Write the lease's row on this timeline, so that nobody has to wait the first time."""
    config = {
        "node": {"name": "setup"},
        "http": {"certificate": "/c", "key": "/k", "ca": "/a"},
        "scheduler": {},
        "database": {"hosts": [str(database.folder)]},
    }
    link = store.Link(store.Server(Config.model_validate(config)), "setup")
    link.migrate()
    link.fetch("UPDATE lease SET timeline = 1")
    link.close()


def events(one: Machine) -> list[str]:
    control = store.Control(one.own.config)
    kinds = [event.kind for event in control.history(100)]
    control.close()
    return kinds


def test_two_servers_one_scheduler_and_a_takeover(database: PostgresqlServer, machine: Callable[..., Machine]) -> None:
    ready(database)
    one = machine("a").server(database).start()
    eventually(lambda: one.runs)
    two = machine("b").server(database).start()
    status, health = one.get("/health")
    assert status == 200
    assert (health["lease"]["held"], health["lease"]["holder"], health["scheduler"]["state"]) == (True, "a", "running")
    path = one.own.config.scheduler.permit_file if one.own.config.scheduler else Path()
    assert permit.refusal(str(path), permit.clock()) == ""
    eventually(lambda: two.get("/health")[1]["lease"]["holder"] == "a")
    eventually(lambda: two.get("/health")[0] == 200)
    assert not two.runs
    # By order of an operator.
    eventually(lambda: "lease_acquired" in events(one))
    control = store.Control(one.own.config)
    eventually(lambda: succeeds(lambda: control.switchover("b", "ann")))
    begin = time.monotonic()
    eventually(lambda: two.runs)
    assert time.monotonic() - begin < 2
    assert not one.runs
    assert permit.refusal(str(path), permit.clock())
    # By a clean end: well before the lease would have ended by itself.
    begin = time.monotonic()
    assert two.stop() == 0
    assert not two.runs
    eventually(lambda: one.runs)
    eventually(lambda: {"switchover_asked", "switchover", "lease_released"} <= set(events(one)))
    control.close()


def succeeds(call: Callable[[], object]) -> bool:
    try:
        call()
    except store.RefusedError:
        return False
    return True


def test_without_the_database_the_scheduler_stops_in_time_and_comes_back(
    database: PostgresqlServer, machine: Callable[..., Machine]
) -> None:
    ready(database)
    one = machine("a").server(database).start()
    eventually(lambda: one.runs)
    database.stop("immediate")
    try:
        begin = time.monotonic()
        eventually(lambda: not one.runs)
        assert time.monotonic() - begin < 2.0
        eventually(lambda: not one.own.snapshot().healthy)
        assert one.own.snapshot().lease is not None
    finally:
        database.start()
    eventually(lambda: one.runs)
    eventually(lambda: {"lease_fenced", "database_lost", "database_back"} <= set(events(one)), 15)


def test_a_start_without_the_database_survives(database: PostgresqlServer, machine: Callable[..., Machine]) -> None:
    database.stop("immediate")
    try:
        one = machine("a").server(database).start()
        time.sleep(1.0)
        assert not one.runs
        lease = one.get("/health")[1]["lease"]
        assert lease["database"] not in ("", "ok")
        assert (lease["seen_s"], lease["holder"]) == (None, None)
    finally:
        database.start()
    # The row is new, so nobody trusts it before its whole time is over.
    eventually(lambda: one.runs, 20)


def test_a_scheduler_that_is_not_installed_is_not_waited_for(
    database: PostgresqlServer, machine: Callable[..., Machine]
) -> None:
    ready(database)
    one = machine("a").server(database)
    del one.systemd.units[SCHEDULER]
    one.start()
    eventually(lambda: one.get("/health")[1]["lease"]["why"] == "the scheduler's unit is not-found")
    eventually(lambda: one.get("/health")[1]["lease"]["database"] == "ok")
    assert one.get("/health")[0] == 503
    time.sleep(0.5)
    assert one.get("/health")[1]["lease"]["holder"] is None
    one.systemd.units[SCHEDULER] = ["loaded", "inactive", "dead", "00" * 16]
    eventually(lambda: one.runs)


def test_a_worker_needs_no_database_and_asks_nobody(machine: Callable[..., Machine]) -> None:
    worker = machine("w", component=[{"name": "worker", "unit": "airflow-worker.service"}])
    worker.systemd.units["airflow-worker.service"] = ["loaded", "active", "running", "aa" * 16]
    worker.start()
    eventually(lambda: worker.get("/health")[0] == 200)
    health = worker.get("/health")[1]
    assert health["components"][0]["state"] == "running"
    assert (health["lease"], health["peers"]) == (None, [])
    assert worker.get("/liveness")[0] == 200
    assert worker.get("/primary")[0] == 503
    assert "airflow_watchdog_healthy 1.0" in worker.get("/metrics")[1]
    worker.systemd.units["airflow-worker.service"][1] = "failed"
    eventually(lambda: worker.get("/health")[0] == 503)
    assert worker.stop() == 0


def test_a_data_node_answers_for_its_postgresql(database: PostgresqlServer, machine: Callable[..., Machine]) -> None:
    data = machine(
        "d",
        postgresql={"unit": "postgresql.service", "socket": str(database.folder), "user": "watchdog"},
        redis={"port": free_port()},
    ).start()
    eventually(lambda: data.get("/primary")[0] == 200)
    assert data.get("/replica")[0] == 503
    eventually(lambda: data.get("/health")[1]["redis"])
    status, health = data.get("/health")
    assert (status, health["postgresql"]["role"], health["redis"]["role"]) == (503, "primary", "down")
    # A peer that answers as the primary of a newer timeline: this one is of the past, and is stopped.
    newer = {"p": PostgresqlState(role="primary", timeline=9)}
    data.own._peers.postgresql = lambda _age: newer  # type: ignore[method-assign]
    eventually(lambda: data.get("/primary")[0] == 503)
    eventually(lambda: ("StopUnit", "postgresql.service") in data.systemd.calls)
    eventually(lambda: data.own.snapshot().postgresql and data.own.snapshot().postgresql.role == "stale")


def test_peers_are_written_as_heartbeats(database: PostgresqlServer, machine: Callable[..., Machine]) -> None:
    ready(database)
    worker = machine("localhost", component=[{"name": "worker", "unit": "w.service"}])
    worker.systemd.units["w.service"] = ["loaded", "active", "running", "aa" * 16]
    worker.start()
    peers = [
        {"name": "localhost", "rack": "b", "address": "127.0.0.1", "port": worker.port},
        {"name": "gone", "address": "127.0.0.1", "port": free_port()},
    ]
    one = machine("a", peer=peers).server(database).start()

    def rows() -> set[str]:
        text = "SELECT node, component, state FROM heartbeat"
        query = ["psql", "-h", database.folder, "-U", "postgres", "-XAtq", "-c", text, "watchdog"]
        return set(subprocess.run(map(str, query), capture_output=True, text=True).stdout.split())

    expected = {"localhost|watchdog|running", "localhost|worker|running", "a|watchdog|running", "a|scheduler|running"}
    eventually(lambda: rows() == expected)
    views = {view.name: view.answering for view in one.own.snapshot().peers}
    assert views == {"localhost": True, "gone": False}
    worker.systemd.units["w.service"][1] = "failed"
    eventually(lambda: "localhost|worker|failed" in rows())
    eventually(lambda: "component" in events(one))


def test_a_thread_that_fails_goes_on_and_one_that_hangs_ends_the_process(
    machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    worker = machine("w")
    worker.start()
    look = worker.own._peers.look
    failing = threading.Event()

    def fail() -> None:
        failing.set()
        raise RuntimeError("a defect")

    worker.own._peers.look = fail  # type: ignore[method-assign]
    assert failing.wait(5)
    eventually(lambda: "survey: unexpected error" in caplog.text)
    worker.own._peers.look = look  # type: ignore[method-assign]
    assert worker.thread.is_alive()
    monkeypatch.setattr(daemon, "STUCK_S", -1.0)
    worker.thread.join(10)
    assert worker.result == [daemon.DIED]
    worker.own._close()
    worker.daemon = None


def test_who_cannot_end_its_scheduler_ends_itself(
    database: PostgresqlServer, machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    ready(database)
    died = threading.Event()
    monkeypatch.setattr(daemon.os, "_exit", lambda _code: died.set())
    one = machine("a").server(database).start()
    eventually(lambda: one.runs)
    one.systemd.mute = True
    database.stop("immediate")
    try:
        assert died.wait(5)
    finally:
        one.systemd.mute = False
        database.start()


def test_the_process_says_ready_feeds_and_ends_on_sigterm(
    database: PostgresqlServer, machine: Callable[..., Machine], tmp_path: Path
) -> None:
    ready(database)
    one = machine("a").server(database)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(one.content))
    code = (
        "import json, sys; from airflow_watchdog import daemon; from airflow_watchdog.config import Config;"
        "sys.exit(daemon.run(Config.model_validate(json.load(open(sys.argv[1])))))"
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(10)
        environment = os.environ | {
            "NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "1000000",
            "DBUS_SYSTEM_BUS_ADDRESS": one.systemd.address,
        }  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(config)], env=environment, cwd=Path(__file__).parents[1],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            heard = ""
            while "READY=1\n" not in heard:
                heard += manager.recv(4096).decode() + "\n"
            for _ in range(200):
                heard += manager.recv(4096).decode() + "\n"
                if "in charge of the scheduler" in heard and "WATCHDOG_USEC" in heard:
                    break
            assert "WATCHDOG=1" in heard
            assert one.runs
            process.send_signal(signal.SIGTERM)
            _, text = process.communicate(timeout=15)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 0
    assert not one.runs
    assert "<6>lease_acquired: a is in charge of the scheduler" in text


def test_an_address_in_use_is_one_line(
    machine: Callable[..., Machine], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = machine("w")
    monkeypatch.setattr(daemon.logging, "basicConfig", lambda **_: None)
    with socket.create_server(("127.0.0.1", worker.port)):
        assert daemon.run(Config.model_validate(worker.content)) == 1
    assert f"port {worker.port} of 127.0.0.1" in caplog.text


# --- what a snapshot means ---


def test_who_is_healthy() -> None:
    def a_server(held: bool, state: State, database: str = "ok", mode: str = "active_standby") -> Snapshot:
        return Snapshot(
            node="a",
            components=(ComponentState(name="scheduler", state=state),),
            lease=LeaseView(mode=mode, held=held, database=database),
        )

    assert is_healthy(a_server(True, State.RUNNING))
    assert is_healthy(a_server(False, State.STOPPED))
    assert not is_healthy(a_server(True, State.STOPPED))
    assert not is_healthy(a_server(False, State.STOPPED, mode="active_active"))
    assert not is_healthy(a_server(False, State.FAILED))
    assert not is_healthy(a_server(False, State.STOPPED, database="refused"))
    assert not is_healthy(Snapshot(node="d", postgresql=PostgresqlState(role="stale")))
    assert not is_healthy(Snapshot(node="w", components=(ComponentState(name="worker", state=State.UNKNOWN),)))


def test_roles_are_heartbeats_too() -> None:
    snapshot = Snapshot(
        node="d", rack="b", postgresql=PostgresqlState(role="standby", timeline=2, lag_bytes=5),
        redis=RedisState(role="replica", lag_bytes=0),
    )  # fmt: skip
    found = {(beat.component, str(beat.state), beat.detail) for beat in beats_of(snapshot, 1.5)}
    assert found == {
        ("watchdog", "running", ""),
        ("postgresql role", "standby", "timeline 2, lag 5"),
        ("redis role", "replica", "lag 0"),
    }
