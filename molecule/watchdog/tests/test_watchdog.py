"""One scheduler in charge, whatever is killed, hung or cut off; and who is the primary of PostgreSQL."""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from scenario import CA, PROJECT, SUBNET
from testinfra.host import Host

SCENARIO = Path(__file__).resolve().parents[1]
NODES = {"watchdog1": f"{SUBNET}.90", "watchdog2": f"{SUBNET}.91", "watchdog3": f"{SUBNET}.92"}
SERVERS = ("watchdog1", "watchdog2")
MEMBERS = ("watchdog2", "watchdog3")
POSTGRESQL = "postgresql@17-main"
SCHEDULER = "airflow-scheduler"
RECORDER = "/var/lib/airflow/recorder"
# TTL and a loop, and what two busy cores may add.
TAKEOVER_S = 20
Machine = Callable[[str], Host]


# --- what is where -----------------------------------------------------------------------------


def active(machine: Machine) -> list[str]:
    """Servers on which the scheduler's unit is active."""
    return [
        name for name in SERVERS if machine(name).run(f"systemctl is-active {SCHEDULER}").stdout.strip() == "active"
    ]


def until(what: str, question: Callable[[], Any], seconds: float = TAKEOVER_S) -> Any:
    """The question's first true answer; fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (answer := question()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.2)
    return answer


def settled(machine: Machine) -> str:
    """The one server with an active scheduler, once there is one."""
    (name,) = until("one active scheduler", lambda: active(machine))
    return str(name)


def other(name: str) -> str:
    """The other server."""
    return next(server for server in SERVERS if server != name)


def main_pid(host: Host, unit: str) -> int:
    """The unit's main process; 0 when there is none."""
    return int(host.check_output(f"systemctl show -p MainPID --value {unit}"))


def signal(host: Host, unit: str, name: str) -> int:
    """Send a signal to the unit's main process alone, as whatever kills in real life does; returns its id."""
    pid = main_pid(host, unit)
    assert pid
    host.check_output(f"kill -{name} {pid}")
    return pid


def intervals(host: Host) -> list[tuple[int, float]]:
    """From before each start of the scheduler to after its end, in nanoseconds of the clock that all machines share."""
    found: list[tuple[int, float]] = []
    for line in host.check_output(f"cat {RECORDER} 2>/dev/null || true").splitlines():
        event, moment = line.split()
        # A start ends what was there before, too: the recorder of its end may have been killed with it.
        if found and found[-1][1] == float("inf"):
            found[-1] = (found[-1][0], int(moment))
        if event == "start":
            found.append((int(moment), float("inf")))
    return found


def overlap_ms(machine: Machine) -> float:
    """For how long two schedulers were there at once, over all that has happened so far."""
    one, two = (intervals(machine(name)) for name in SERVERS)
    assert one or two, "the recorder has seen nothing"
    now = time.time_ns()
    return sum(max(0.0, min(b, d, now) - max(a, c)) for a, b in one for c, d in two) / 1e6


def ask(name: str, path: str, method: str = "GET") -> tuple[int, dict[str, Any]]:
    """Status and body of a watchdog's answer, over verified TLS."""
    trusted = ssl.create_default_context(cafile=str(CA))
    request = urllib.request.Request(f"https://{NODES[name]}:8008{path}", method=method)
    try:
        with urllib.request.urlopen(request, timeout=10, context=trusted) as answer:
            return answer.status, json.loads(answer.read() or b"{}")
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"{}")


def sql(host: Host, statement: str, database: str = "postgres") -> str:
    """The answer of the local PostgreSQL to its superuser."""
    return str(host.check_output("runuser -u postgres -- psql -XAtqd %s -c %s", database, statement)).strip()


@pytest.fixture(autouse=True)
def always(machine: Machine, request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test: never two schedulers, one in the end; and what was said, when the test failed."""
    before = request.session.testsfailed
    yield
    try:
        settled(machine)
        assert overlap_ms(machine) == 0
    finally:
        if request.session.testsfailed > before:
            for name in SERVERS:
                print(name, intervals(machine(name))[-3:])
                units = "-u airflow-watchdog -u airflow-scheduler"
                print(machine(name).run(f"journalctl {units} -n 40 --no-pager -o short-precise").stdout)


# --- how it is installed -------------------------------------------------------------------------


def test_it_runs_everywhere_and_comes_back_after_a_boot(host: Host) -> None:
    assert host.service("airflow-watchdog").is_running
    assert host.service("airflow-watchdog").is_enabled


def test_the_unit_is_closed(host: Host) -> None:
    lines = host.run("systemd-analyze security --no-pager airflow-watchdog.service").stdout.splitlines()
    score = float(lines[-1].split("airflow-watchdog.service:")[1].split()[0])
    assert score < 3, "\n".join(lines)


def test_secrets_are_closed(host: Host) -> None:
    folder = host.file("/etc/airflow-watchdog")
    assert (folder.user, folder.group, folder.mode) == ("root", "airflow-watchdog", 0o750)
    for name in folder.listdir():
        file = host.file(f"/etc/airflow-watchdog/{name}")
        assert (file.user, file.group, file.mode) == ("root", "airflow-watchdog", 0o640), name
    server = host.backend.get_hostname() in SERVERS
    assert ("database-password" in folder.listdir()) is server


def test_it_may_do_what_it_needs_and_no_more(machine: Machine) -> None:
    standby = other(settled(machine))
    # What is refused for want of a right says so; what is allowed gets as far as systemd.
    for name, verb, unit, allowed in (
        (standby, "stop", "airflow-scheduler.service", True),
        (standby, "reset-failed", "airflow-scheduler.service", True),
        (standby, "start", "chrony.service", False),
        (standby, "stop", "ssh.service", False),
        (standby, "restart", "airflow-watchdog.service", False),
        ("watchdog3", "stop", "airflow-scheduler.service", False),
        ("watchdog3", "start", f"{POSTGRESQL}.service", False),
        ("watchdog3", "restart", f"{POSTGRESQL}.service", False),
    ):
        tried = machine(name).run(f"runuser -u airflow-watchdog -- systemctl --no-ask-password {verb} {unit}")
        assert ("enied" in tried.stderr or "authentication" in tried.stderr) is not allowed, (verb, unit, tried.stderr)
    refused = machine(standby).run("runuser -u airflow-watchdog -- systemctl --no-ask-password disable ssh.service")
    assert refused.rc != 0


def test_a_wrong_configuration_is_named_and_nothing_starts(machine: Machine) -> None:
    host = machine("watchdog3")
    host.check_output("sed 's/^ttl_s = .*/ttl_s = 1/' /etc/airflow-watchdog/config.toml > /tmp/config.toml")
    refused = host.run("airflow-watchdog run --check-config --config /tmp/config.toml")
    assert refused.rc == 2
    assert "ttl_s" in refused.stderr
    assert refused.stderr.strip().count("\n") == 0


# --- one scheduler -------------------------------------------------------------------------------


def test_one_runs_and_the_other_cannot_be_started_by_hand(machine: Machine) -> None:
    standby = other(settled(machine))
    machine(standby).run(f"systemctl start {SCHEDULER}")
    assert active(machine) == [other(standby)]
    # Nobody but the watchdog starts it, not even a boot.
    assert not machine(standby).service(SCHEDULER).is_enabled


def test_status_and_check(machine: Machine) -> None:
    holder = settled(machine)
    shown = json.loads(machine(holder).check_output("airflow-watchdog status --json"))
    assert holder in json.dumps(shown)
    until("all is well", lambda: machine(holder).run("airflow-watchdog check").rc == 0)
    table = machine(holder).check_output("airflow-watchdog status")
    assert all(name in table for name in NODES)


def test_a_killed_scheduler_comes_back(machine: Machine) -> None:
    holder = settled(machine)
    pid = signal(machine(holder), SCHEDULER, "KILL")
    until("another process", lambda: any(main_pid(machine(n), SCHEDULER) not in (0, pid) for n in active(machine)), 10)


def test_a_hung_scheduler_is_replaced(machine: Machine) -> None:
    holder = settled(machine)
    pid = signal(machine(holder), SCHEDULER, "STOP")
    until("another process", lambda: any(main_pid(machine(n), SCHEDULER) not in (0, pid) for n in active(machine)), 30)
    assert not machine(holder).process.filter(pid=pid)


@pytest.mark.parametrize("how", ["KILL", "STOP"])
def test_a_dead_or_hung_watchdog_takes_its_scheduler_with_it(how: str, machine: Machine) -> None:
    holder = settled(machine)
    pid = main_pid(machine(holder), SCHEDULER)
    signal(machine(holder), "airflow-watchdog", how)
    until("the scheduler's end", lambda: main_pid(machine(holder), SCHEDULER) != pid)
    settled(machine)
    until("the watchdog", lambda: machine(holder).service("airflow-watchdog").is_running)


def test_a_node_that_is_cut_off_stops_before_the_other_starts(machine: Machine) -> None:
    holder = settled(machine)
    host = machine(holder)
    peers = ", ".join(address for name, address in NODES.items() if name != holder)
    rules = "; ".join([
        "add table inet cut",
        "add chain inet cut in { type filter hook input priority 0; }",
        "add chain inet cut out { type filter hook output priority 0; }",
        f"add rule inet cut in ip saddr {{ {peers} }} drop",
        f"add rule inet cut out ip daddr {{ {peers} }} drop",
    ])  # fmt: skip
    host.check_output("nft %s", rules)
    try:
        until("a takeover", lambda: active(machine) == [other(holder)])
    finally:
        host.check_output("nft delete table inet cut")
    time.sleep(5)
    assert active(machine) == [other(holder)]


def test_both_at_once_are_one(machine: Machine) -> None:
    for name in SERVERS:
        machine(name).check_output("systemctl stop airflow-watchdog")
    assert active(machine) == []
    at = time.time_ns() + 3 * 10**9
    wait = f"while [ $(date +%s%N) -lt {at} ]; do sleep 0.01; done; systemctl start airflow-watchdog"
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda name: machine(name).check_output(f"sh -c '{wait}'"), SERVERS))
    settled(machine)
    time.sleep(3)
    assert len(active(machine)) == 1


def test_a_database_that_is_away_longer_than_the_lease(machine: Machine) -> None:
    settled(machine)
    host = machine("watchdog3" if ask("watchdog3", "/primary")[0] == 200 else "watchdog2")
    host.check_output(f"systemctl stop {POSTGRESQL}")
    try:
        until("the scheduler's end", lambda: active(machine) == [], 12)
        for name in SERVERS:
            assert machine(name).service("airflow-watchdog").is_running
        refused = machine("watchdog1").run(f"systemctl start {SCHEDULER}")
        assert active(machine) == [], refused.stderr
    finally:
        host.check_output(f"systemctl start {POSTGRESQL}")
    settled(machine)


def test_switchover_moves_it_and_refuses_nonsense(machine: Machine) -> None:
    holder = settled(machine)
    assert "no-such-node" in machine(holder).run("airflow-watchdog switchover scheduler --to no-such-node").stderr
    machine(holder).check_output("airflow-watchdog switchover scheduler")
    until("a takeover", lambda: active(machine) == [other(holder)], 10)


def test_a_pause_keeps_everything_as_it_is(machine: Machine) -> None:
    holder = settled(machine)
    host = machine(holder)
    host.check_output("airflow-watchdog pause --for 5m --reason molecule")
    try:
        assert "molecule" in machine(other(holder)).check_output("airflow-watchdog status")
        refused = host.run("airflow-watchdog switchover scheduler")
        assert refused.rc != 0
    finally:
        host.check_output("airflow-watchdog resume")
    time.sleep(3)
    assert active(machine) == [holder]


def test_changes_are_told_and_kept(machine: Machine) -> None:
    kept = machine("watchdog1").check_output("airflow-watchdog history --json")
    assert any(name in kept for name in SERVERS)
    # PrivateTmp: the alert's own /tmp.
    told = machine("watchdog1").run("cat /tmp/systemd-private-*-airflow-watchdog.service-*/tmp/alerts").stdout
    assert [json.loads(line) for line in told.splitlines() if line.strip()]


# --- the data nodes' answers ----------------------------------------------------------------------


def roles() -> tuple[str, str]:
    """Names of primary and standby, as HAProxy would see them."""
    primary = [name for name in MEMBERS if ask(name, "/primary")[0] == 200]
    standby = [name for name in MEMBERS if ask(name, "/replica")[0] == 200]
    assert (len(primary), len(standby)) == (1, 1)
    return primary[0], standby[0]


def test_data_nodes_tell_who_is_who() -> None:
    primary, standby = roles()
    assert ask(primary, "/replica")[0] == 503
    assert ask(standby, "/primary")[0] == 503
    assert ask(standby, "/replica?lag=1000000000")[0] == 200
    assert ask(standby, "/replica?lag=nonsense")[0] == 400
    assert ask("watchdog1", "/primary")[0] in (404, 503)
    assert [ask(name, "/liveness")[0] for name in NODES] == [200, 200, 200]
    assert ask(primary, "/no-such-thing")[0] == 404
    assert ask(primary, "/primary", "POST")[0] == 405
    assert ask(primary, "/primary", "HEAD")[0] == 200


def test_answers_come_beside_stuck_clients_and_without_postgresql(machine: Machine) -> None:
    _, standby = roles()
    stuck = [socket.create_connection((NODES[standby], 8008), timeout=5) for _ in range(20)]
    try:
        before = time.monotonic()
        assert ask(standby, "/replica")[0] == 200
        assert time.monotonic() - before < 2
        machine(standby).check_output(f"systemctl stop {POSTGRESQL}")
        until("503", lambda: ask(standby, "/replica")[0] == 503, 5)
    finally:
        machine(standby).check_output(f"systemctl start {POSTGRESQL}")
        for connection in stuck:
            connection.close()
    until("the standby", lambda: ask(standby, "/replica")[0] == 200)


def test_a_restart_of_the_watchdog_is_no_outage_for_load_balancers(machine: Machine) -> None:
    primary, _ = roles()
    machine(primary).check_output("systemd-run systemctl restart airflow-watchdog")
    answers: list[int] = []
    for _ in range(30):
        try:
            answers.append(ask(primary, "/primary")[0])
        except (OSError, http.client.HTTPException):
            answers.append(0)
        time.sleep(0.1)
    # One that was being answered may be cut off; HAProxy needs two in a row.
    assert answers.count(200) >= len(answers) - 1, answers


def test_a_run_with_another_setting_moves_the_scheduler_on_purpose(machine: Machine) -> None:
    holder = settled(machine)
    command = [
        "ansible-playbook", f"--inventory={PROJECT}/molecule/shared/inventory/hosts.yml",
        f"--inventory={SCENARIO}/inventory.yml", str(SCENARIO / "converge.yml"), "-ewatchdog_ttl=11",
        "--tags=watchdog",
    ]  # fmt: skip
    environment = os.environ | {
        "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"),
        "ANSIBLE_ROLES_PATH": f"{PROJECT}/roles",
    }
    run = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert settled(machine) == other(holder)
    assert "ttl_s = 11.0" in machine("watchdog3").file("/etc/airflow-watchdog/config.toml").content_string


# Last: it leaves a standby that has to be made anew.
def test_a_stale_primary_is_fenced_and_the_lease_goes_on_with_the_new_one(machine: Machine) -> None:
    old, new = roles()
    epoch = int(sql(machine(old), "select epoch from lease", "watchdog"))
    sql(machine(new), "select pg_promote()")
    until("no answer for the old primary", lambda: ask(old, "/primary")[0] == 503, 10)
    until("its end", lambda: not machine(old).service(POSTGRESQL).is_running, 15)
    assert ask(new, "/primary")[0] == 200
    holder = settled(machine)
    until(
        "a renewal by the new primary", lambda: machine(holder).run("airflow-watchdog switchover scheduler").rc == 0, 40
    )
    # Past anything that the old primary, which lived on for a while, can have given out.
    assert int(sql(machine(new), "select epoch >> 32 from lease", "watchdog")) == 2 > epoch >> 32
