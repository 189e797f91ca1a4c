"""The command line: what it takes, refuses and prints, and its exit codes, against watchdogs made of HTTPS alone."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from airflow_watchdog import cli, commands, permit
from airflow_watchdog.cli import main, parse_duration
from airflow_watchdog.config import Http
from airflow_watchdog.events import Event
from airflow_watchdog.snapshot import ComponentState, LeaseView, PeerView, Snapshot, State
from airflow_watchdog.store import RefusedError, StoreError
from airflow_watchdog.web import HttpsServer, json_response
from servers import Authority, free_port

Output = pytest.CaptureFixture[str]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}


class Watchdog:
    """Answers GET /health with what the test says."""

    def __init__(self, name: str, authority: Authority) -> None:
        self.name, self.held, self.runs, self.paused, self.able = name, False, State.STOPPED, False, True
        self.epoch, self.holder = 1, "airflow1"
        settings = Http(certificate=authority.certificate, key=authority.key, ca=authority.ca, address="127.0.0.1")
        self.server = HttpsServer(settings.model_copy(update={"port": 0}), {"/health": lambda _query: self.health()})
        self.server.start(look_s=0.02)

    def health(self) -> Any:
        lease = LeaseView(
            mode="active_standby", held=self.held, holder=self.holder, epoch=self.epoch, seen_s=0.1, database="ok",
            paused=self.paused, pause_reason="work", able=self.able, why="" if self.able else "gave it up",
        )  # fmt: skip
        snapshot = Snapshot(
            node=self.name, lease=lease, scheduler=ComponentState(name="scheduler", state=self.runs),
            peers=(PeerView(name="localhost", answering=False, for_s=300.0),),
        )  # fmt: skip
        return json_response(503, snapshot.model_dump(mode="json"))


class Control:
    """The database's side, in memory."""

    def __init__(self, cluster: "Cluster") -> None:
        self._cluster = cluster

    def history(self, limit: int) -> list[Event]:
        if self._cluster.problem:
            raise self._cluster.problem
        at = 1_700_000_000.0
        return [
            Event("takeover", "airflow1", "took over", "scheduler", "warning", at + n) for n in range(min(limit, 3))
        ]

    def pause(self, seconds: float, reason: str, by: str) -> None:
        self._cluster.asked.append(("pause", seconds, reason, by))
        for watchdog in self._cluster.watchdogs:
            watchdog.paused = True

    def resume(self, by: str) -> bool:
        was = self._cluster.watchdogs[0].paused
        for watchdog in self._cluster.watchdogs:
            watchdog.paused = False
        return was

    def switchover(self, target: str | None, by: str) -> None:
        if self._cluster.problem:
            raise self._cluster.problem
        self._cluster.asked.append(("switchover", target, by))
        if self._cluster.follows:
            one, two = self._cluster.watchdogs
            one.held, one.runs, two.held, two.runs = False, State.STOPPED, True, State.RUNNING
            one.epoch = two.epoch = 2
            one.holder = two.holder = "127.0.0.1"

    def withdraw(self) -> None:
        self._cluster.asked.append("withdraw")

    def close(self) -> None:
        self._cluster.asked.append("close")


class Cluster:
    """Two servers; their names are those in the test certificate."""

    def __init__(self, folder: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
        self.watchdogs = [Watchdog("localhost", authority), Watchdog("127.0.0.1", authority)]
        self.asked: list[Any] = []
        self.follows, self.problem = True, None
        for watchdog in self.watchdogs:
            watchdog.holder = "localhost"
        self.watchdogs[0].held, self.watchdogs[0].runs = True, State.RUNNING
        self.config = folder / "config.toml"
        self.text = f"""
            [node]
            name = "localhost"
            [http]
            port = {self.watchdogs[0].server.port}
            certificate = "{authority.certificate}"
            key = "{authority.key}"
            ca = "{authority.ca}"
            [loop]
            interval_s = 0.2
            timeout_s = 0.2
            ttl_s = 1.0
            [scheduler]
            stop_timeout_s = 0.2
            kill_margin_s = 0.1
            start_grace_s = 0.1
            [database]
            hosts = ["nowhere.invalid"]
            [[peer]]
            name = "127.0.0.1"
            address = "127.0.0.1"
            port = {self.watchdogs[1].server.port}
            airflow_server = true
        """
        self.config.write_text(self.text)
        monkeypatch.setattr(commands, "open_control", lambda _config: Control(self))

    def run(self, *words: str) -> int:
        return main(["--config", str(self.config), *words])

    def change(self, old: str, new: str) -> None:
        assert old in self.text
        self.config.write_text(self.text.replace(old, new))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def cluster(tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("SUDO_USER", "ada")
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    made = Cluster(tmp_path, authority, monkeypatch)
    yield made
    for watchdog in made.watchdogs:
        watchdog.server.stop()


# --- status and check ---


def test_status_shows_all_nodes(cluster: Cluster, capsys: Output) -> None:
    assert cluster.run("status") == 0
    shown = capsys.readouterr().out
    assert "Scheduler: localhost in charge (epoch 1" in shown
    assert "127.0.0.1  " in shown
    assert "Everything is well." in shown


@pytest.mark.parametrize("words", [("--json", "status"), ("status", "--json")])
def test_json_may_stand_before_and_after_the_command(words: tuple[str, ...], cluster: Cluster, capsys: Output) -> None:
    assert cluster.run(*words) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["health"], len(shown["nodes"])) == ("OK", 2)


def test_the_configuration_may_stand_after_the_command(cluster: Cluster, capsys: Output) -> None:
    assert main(["check", "--config", str(cluster.config), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lease"]["holder"] == "localhost"


def test_check_has_the_exit_codes_of_monitoring_systems(cluster: Cluster, capsys: Output) -> None:
    assert cluster.run("check") == 0
    assert capsys.readouterr().out == "OK: 2 nodes\n"
    cluster.watchdogs[1].able = False
    assert cluster.run("check") == 1
    assert capsys.readouterr().out.startswith("WARNING: no node could take the scheduler over (127.0.0.1: gave it up)")
    cluster.watchdogs[0].runs = State.FAILED
    assert cluster.run("check") == 2
    assert capsys.readouterr().out.startswith("CRITICAL: localhost: scheduler is failed")
    for watchdog in cluster.watchdogs:
        watchdog.server.stop()
    assert cluster.run("check") == 3
    assert capsys.readouterr().out.startswith("UNKNOWN: localhost: does not answer: Connection refused")
    assert cluster.run("status") == 1
    cluster.change("ca.crt", "none.crt")
    assert cluster.run("check") == 3
    assert cluster.run("status") == 1
    cluster.config.write_text("[node]")
    assert cluster.run("check") == 3


def test_a_node_that_is_silent_or_another_is_shown_as_such(cluster: Cluster, capsys: Output, tmp_path: Path) -> None:
    strange = Authority(tmp_path)
    impostor = Watchdog("127.0.0.1", strange)
    ours, text = cluster.watchdogs[1].server.port, cluster.text
    for port, name, why in (
        (free_port(), "127.0.0.1", "Connection refused"),
        (impostor.server.port, "127.0.0.1", "certificate signature failure"),
        (ours, "airflow9", "Hostname mismatch, certificate is not valid for 'airflow9'."),
    ):
        cluster.text = text.replace(f"port = {ours}", f"port = {port}").replace(
            'name = "127.0.0.1"', f'name = "{name}"'
        )
        cluster.config.write_text(cluster.text)
        assert cluster.run("status") == 0
        shown = capsys.readouterr().out
        assert any(part in shown for part in why.split("|")), shown
    impostor.server.stop()


def test_an_answer_that_is_none_is_told(cluster: Cluster, capsys: Output) -> None:
    cluster.watchdogs[1].server.routes = {"/health": lambda _query: json_response(200, {"no": "node"})}
    assert cluster.run("check") == 1
    assert "127.0.0.1: does not answer: not the answer of a watchdog" in capsys.readouterr().out
    cluster.watchdogs[1].server.routes = {"/health": lambda _query: time.sleep(0.5) or json_response(200, {})}
    assert cluster.run("check") == 1
    assert "no answer in time" in capsys.readouterr().out


def test_colour_is_for_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert commands._colour()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not commands._colour()


# --- history, pause, resume ---


def test_history(cluster: Cluster, capsys: Output) -> None:
    assert cluster.run("history", "--limit", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "2023-11-14 22:13:21  localhost     warning   took over".replace("localhost ", "airflow1  ")
    assert len(lines) == 2
    assert cluster.run("history", "--json") == 0
    (first, *_) = json.loads(capsys.readouterr().out)
    assert first == {"at": "2023-11-14T22:13:20.000+00:00", "kind": "takeover", "severity": "warning",
                     "node": "airflow1", "component": "scheduler", "message": "took over"}  # fmt: skip
    cluster.problem = StoreError("no route to host")
    assert cluster.run("history") == 1
    assert capsys.readouterr().err == "airflow-watchdog: the watchdogs' database: no route to host\n"


def test_pause_and_resume_wait_until_all_know(cluster: Cluster, capsys: Output) -> None:
    assert cluster.run("pause", "--for", "30m", "--reason", "  work   on it ") == 0
    assert cluster.asked[0] == ("pause", 1800.0, "work on it", "ada")
    assert capsys.readouterr().out == "paused for 30 min: work on it\n"
    assert cluster.run("switchover", "scheduler") == 1
    assert "takeovers are paused: work" in capsys.readouterr().err
    assert cluster.run("resume", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"paused": False, "unaware": [], "text": "resumed"}
    assert cluster.run("resume") == 0
    assert capsys.readouterr().out == "there was no pause\n"


def test_a_server_that_does_not_hear_of_a_pause_is_named(
    cluster: Cluster, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Control, "pause", lambda *_arguments: None)
    assert cluster.run("pause", "--for", "1h", "--reason", "x") == 0
    assert "not yet known to" in capsys.readouterr().out


# --- switchover ---


def test_a_switchover_waits_for_the_other_scheduler(cluster: Cluster, capsys: Output) -> None:
    assert cluster.run("switchover", "scheduler", "--to", "127.0.0.1", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["from"], shown["to"], shown["epoch"]) == ("localhost", "127.0.0.1", 2)
    assert cluster.asked == [("switchover", "127.0.0.1", "ada"), "close"]


def test_a_switchover_that_does_not_come_about_is_taken_back(cluster: Cluster, capsys: Output) -> None:
    cluster.follows = False
    assert cluster.run("switchover", "scheduler") == 1
    assert "not done after 3.1 s; in charge now: localhost" in capsys.readouterr().err
    assert "withdraw" in cluster.asked


def test_a_switchover_that_cannot_be_is_refused(cluster: Cluster, capsys: Output) -> None:
    for target, why in (("airflow9", "airflow9: no such node"), ("localhost", "in charge of the scheduler already")):
        assert cluster.run("switchover", "scheduler", "--to", target) == 1
        assert why in capsys.readouterr().err
    cluster.problem = RefusedError("the watchdogs are paused")
    assert cluster.run("switchover", "scheduler") == 1
    assert "refused: the watchdogs are paused" in capsys.readouterr().err
    cluster.watchdogs[1].server.stop()
    assert cluster.run("switchover", "scheduler", "--to", "127.0.0.1") == 1
    assert "127.0.0.1 does not answer" in capsys.readouterr().err
    assert not [what for what in cluster.asked if what[0] == "switchover"]


def test_without_the_database_there_is_nothing_to_command(
    cluster: Cluster, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    begin, end = cluster.text.index("[scheduler]"), cluster.text.index("[[peer]]")
    cluster.config.write_text(cluster.text[:begin] + cluster.text[end:])
    for words in (("history",), ("resume",), ("pause", "--for", "1h", "--reason", "x")):
        assert cluster.run(*words) == 1
        assert "only Airflow servers hold" in capsys.readouterr().err


# --- bad use and bad configuration ---


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ((), "COMMAND"),
        (("dance",), "invalid choice: 'dance'"),
        (("status", "--tables"), "unrecognized arguments: --tables"),
        (("history", "--limit", "0"), "not a number from 1 to 100000"),
        (("history", "--limit", "٣"), "not a number from 1 to 100000"),
        (("pause", "--for", "1h"), "--reason"),
        (("pause", "--for", "1y", "--reason", "x"), "not a time like 90s"),
        (("pause", "--for", "1h", "--reason", " "), "printable"),
        (("pause", "--for", "1h", "--reason", "\x1b[31m"), "printable"),
        (("switchover",), "what"),
        (("switchover", "postgresql"), "invalid choice: 'postgresql'"),
        (("check", "--max-lag", "much"), "not a size like"),
    ],
)
def test_bad_use_is_one_line(words: tuple[str, ...], why: str, capsys: Output) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert why in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("30m", 1800), ("1.5h", 5400), ("2d", 172800), ("30d", 2592000)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


NO_DURATIONS = ["", "s", "0", "-1m", "31d", "1y", "1 h", "nan", "inf", "1e3", "1h30m", "1..5h", "m30", "٣m", "1m\n"]


@pytest.mark.parametrize("text", NO_DURATIONS)
def test_durations_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="not a time"):
        parse_duration(text)


Break = Callable[[Cluster], None]


@pytest.mark.parametrize(
    ("broken", "name"),
    [
        (lambda c: c.change("[node]", "[mode]"), "node: is missing"),
        (lambda c: c.change("ttl_s = 1.0", "ttl_s = 0.1"), "ttl_s"),
        (lambda c: c.change("/node.crt", "/none.crt"), "http.certificate, http.key"),
        (lambda c: c.change("/node.key", "/ca.crt"), "http.certificate, http.key"),
        (lambda c: c.change("/ca.crt", "/node.key"), "http.ca"),
        (lambda c: c.change("/ca.crt", "/none.crt"), "http.ca"),
        (lambda c: c.change('hosts = ["', 'password_file = "/none"\nhosts = ["'), "database.password_file: /none"),
        (lambda c: c.change('hosts = ["', 'password_file = "/dev/null"\nhosts = ["'), "/dev/null: is empty"),
        (lambda c: c.change('hosts = ["', 'ca = "/none"\nhosts = ["'), "database.ca: /none"),
        (lambda c: c.config.unlink(), "config.toml: No such file"),
    ],
)
def test_a_bad_configuration_is_one_line_and_no_start(
    broken: Break, name: str, cluster: Cluster, capsys: Output
) -> None:
    assert cluster.run("run", "--check-config") == 0
    broken(cluster)
    assert cluster.run("run") == 2
    error = capsys.readouterr().err
    assert name in error
    assert error.count("\n") == 1


# --- permit ---


def test_permit(tmp_path: Path, capsys: Output) -> None:
    path = tmp_path / "permit.json"
    assert main(["permit", str(path)]) == 1
    assert "not in charge" in capsys.readouterr().err
    permit.write(path, 3, permit.clock() + 5)
    assert main(["permit", str(path)]) == 0
    permit.write(path, 3, permit.clock() - 1)
    assert main(["permit", str(path)]) == 1
    path.write_text("nonsense")
    assert main(["--json", "permit"]) in (0, 1)
    assert main(["permit", str(path)]) == 1


def test_permit_is_quick_because_it_loads_little() -> None:
    program = (
        "import sys; from airflow_watchdog.cli import main; main(['permit', '/nowhere']); "
        "sys.exit(bool({'pydantic', 'argparse', 'ssl', 'psycopg'} & set(sys.modules)))"
    )
    before = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=20, env=ENVIRONMENT)
    assert done.returncode == 0
    assert time.monotonic() - before < 5


def test_an_interrupted_command_ends_quietly(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(commands.COMMANDS, "status", interrupted)
    assert cluster.run("status") == cli.REFUSED
