"""A primary and a replica: replication over TLS, what each user may do, and roles that a restart and a run keep."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from scenario import SUBNET
from testinfra.host import Host

PROJECT = Path(__file__).resolve().parents[3]
SCENARIO = Path(__file__).resolve().parents[1]
MEMBERS = {"redis1": f"{SUBNET}.25", "redis2": f"{SUBNET}.26"}
PASSWORDS = {
    name: hashlib.sha256(f"molecule {name}".encode()).hexdigest()
    for name in ("admin", "airflow", "monitor", "replication")
}
Machine = Callable[[str], Host]


def ask(client: Host, server: str, user: str, *commands: str, tls: str = "--cacert /etc/airflow-ha/tls/ca.crt") -> str:
    """The answers to the commands, over the network, after a log-in."""
    lines = "\n".join([f"AUTH {user} {PASSWORDS.get(user, 'guess')}", *commands])
    result = client.run(f"printf '%%s' %s | timeout 5 redis-cli --tls {tls} -h {MEMBERS[server]} -p 6379", lines)
    return str(result.stdout + result.stderr).strip().removeprefix("OK\n")


def roles(machine: Machine) -> tuple[str, str]:
    """Names of the primary and of the replica."""
    found = {ask(machine(name), name, "monitor", "ROLE").split()[0]: name for name in MEMBERS}
    return found["master"], found["slave"]


def eventually(question: Callable[[], object], seconds: float = 20) -> None:
    """Fail unless the question becomes true in time."""
    deadline = time.monotonic() + seconds
    while not question():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.2)


def linked(machine: Machine) -> bool:
    """True when the replica's link to the primary is up."""
    _, replica = roles(machine)
    return "master_link_status:up" in ask(machine(replica), replica, "monitor", "INFO replication")


def converge(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the role again."""
    command = [
        "ansible-playbook", f"--inventory={PROJECT}/molecule/shared/inventory/hosts.yml",
        f"--inventory={SCENARIO}/inventory.yml", str(SCENARIO / "converge.yml"), *arguments,
    ]  # fmt: skip
    environment = os.environ | {
        "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"),
        "ANSIBLE_ROLES_PATH": f"{PROJECT}/roles",
    }
    return subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(autouse=True)
def log_on_failure(machine: Machine, request: pytest.FixtureRequest) -> Iterator[None]:
    """Print what the servers said when a test fails."""
    before = request.session.testsfailed
    yield
    if request.session.testsfailed > before:
        for name in MEMBERS:
            print(machine(name).run("tail -n 30 /var/log/redis/redis-server.log").stdout)
            print(machine(name).run("journalctl -u redis-server -n 20 --no-pager").stdout)


def test_unit_runs_and_comes_back_after_a_boot(host: Host) -> None:
    assert host.service("redis-server").is_running
    assert host.service("redis-server").is_enabled


def test_secrets_are_closed_and_hashed(host: Host) -> None:
    for name, user in {"users.acl": "root", "airflow-ha.conf": "root", "redis.conf": "redis"}.items():
        file = host.file(f"/etc/redis/{name}")
        assert (file.user, file.group, file.mode) == (user, "redis", 0o640)
    users = host.file("/etc/redis/users.acl").content_string
    assert not any(password in users for password in PASSWORDS.values())
    assert host.file("/run/redis/redis-server.sock").mode == 0o700
    for place in ("journalctl --no-pager", "ps axwwe", "cat /var/log/redis/redis-server.log"):
        # sudo logs what these tests themselves run, with printf.
        lines = [line for line in host.check_output(place).splitlines() if "printf" not in line]
        assert not [line for line in lines if any(password in line for password in PASSWORDS.values())], place
    for folder in ("/etc", "/var/lib", "/etc/systemd/system"):
        assert host.file(folder).user == "root"


def test_listens_with_tls_on_its_own_address_only(host: Host) -> None:
    name = host.check_output("hostname")
    sockets = host.check_output("ss -Htlnp").splitlines()
    assert {line.split()[3] for line in sockets if "redis-server" in line} == {
        "127.0.0.1:6379",
        f"{MEMBERS[name]}:6379",
    }
    with socket.create_connection((MEMBERS[name], 6379), timeout=3) as plain, contextlib.suppress(ConnectionError):
        plain.sendall(b"PING\r\n")
        assert not plain.recv(100)
    assert "certificate verify failed" in ask(host, name, "airflow", "PING", tls="")


def test_a_write_on_the_primary_reaches_the_replica(machine: Machine) -> None:
    primary, replica = roles(machine)
    assert linked(machine)
    assert ask(machine(replica), primary, "airflow", "LPUSH molecule:list seen-by-all", "WAIT 1 2000").split() == [
        "1",
        "1",
    ]
    assert ask(machine(primary), replica, "airflow", "LRANGE molecule:list 0 -1") == "seen-by-all"
    assert "READONLY" in ask(machine(primary), replica, "airflow", "DEL molecule:list")
    assert ask(machine(replica), primary, "airflow", "DEL molecule:list") == "1"


def test_settings_are_those_of_a_queue(host: Host) -> None:
    name = host.check_output("hostname")
    for setting, value in {
        "appendonly": "yes",
        "appendfsync": "everysec",
        "maxmemory-policy": "noeviction",
        "port": "0",
        "tls-replication": "yes",
        "requirepass": "",
    }.items():
        assert ask(host, name, "admin", f"CONFIG GET {setting}").splitlines()[1:] == ([value] if value else [])
    assert "aof_enabled:1" in ask(host, name, "admin", "INFO persistence")
    assert host.run("test -s /var/lib/redis/appendonlydir/appendonly.aof.manifest").rc == 0


def test_airflow_may_do_what_celery_does(machine: Machine) -> None:
    primary, _ = roles(machine)
    # What kombu, Celery's result backend, redis-py's locks and Flower send.
    answer = ask(
        machine(primary), primary, "airflow",
        "CLIENT SETINFO LIB-NAME redis-py", "CLIENT SETNAME molecule", "SELECT 1", "INFO server", "LLEN molecule:queue",
        "SADD _kombu.binding.molecule celery", "SMEMBERS _kombu.binding.molecule", "ZADD molecule:index 1 tag",
        "ZREVRANGEBYSCORE molecule:index 2 0 LIMIT 0 10", "HSET molecule:unacked tag message",
        "HDEL molecule:unacked tag", "BRPOP molecule:queue 0.01", "SET molecule:mutex owner NX EX 10",
        "SETEX molecule:result 10 done", "MGET molecule:result molecule:mutex", "PUBLISH molecule:result done",
        "EVAL 'return 1' 0", "SCRIPT LOAD 'return 1'", "WATCH molecule:mutex", "MULTI", "GET molecule:result", "EXEC",
        "DEL molecule:unacked molecule:index _kombu.binding.molecule molecule:result molecule:mutex",
    )  # fmt: skip
    assert "NOPERM" not in answer
    assert "ERR" not in answer
    assert answer.count("done") == 2


@pytest.mark.parametrize(
    ("user", "commands"),
    [
        (
            "airflow",
            [
                "CONFIG GET masterauth", "CONFIG SET port 1", "ACL LIST", "KEYS *", "FLUSHALL", "FLUSHDB", "SAVE",
                "REPLICAOF NO ONE", "SHUTDOWN NOSAVE", "CLIENT LIST", "MONITOR", "FUNCTION LIST", "FAILOVER",
                "MODULE LIST", "REPLCONF capa eof", "MIGRATE 192.0.2.1 6379 a 0 10",
            ],
        ),
        ("monitor", ["GET a", "SET a b", "CONFIG GET port", "KEYS *", "SUBSCRIBE a"]),
        ("replication", ["GET a", "INFO", "CONFIG GET port", "REPLICAOF NO ONE"]),
    ],
)  # fmt: skip
def test_nobody_may_do_more_than_he_needs(machine: Machine, user: str, commands: list[str]) -> None:
    primary, _ = roles(machine)
    answer = ask(machine(primary), primary, user, *commands)
    assert answer.count("NOPERM") == len(commands), answer


def test_nobody_gets_in_without_a_password(machine: Machine) -> None:
    primary, _ = roles(machine)
    assert "WRONGPASS" in ask(machine(primary), primary, "default", "PING")
    answer = machine(primary).run("redis-cli -s /run/redis/redis-server.sock PING").stdout
    assert "NOAUTH" in answer


def test_swapped_roles_outlive_restarts_and_a_run(machine: Machine) -> None:
    old, new = roles(machine)
    ask(machine(new), old, "airflow", "SET molecule kept", "WAIT 1 2000")
    assert ask(machine(new), new, "admin", "REPLICAOF NO ONE", "CONFIG REWRITE") == "OK\nOK"
    assert ask(machine(old), old, "admin", f"REPLICAOF {MEMBERS[new]} 6379", "CONFIG REWRITE") == "OK\nOK"
    eventually(lambda: linked(machine))
    for name in MEMBERS:
        machine(name).check_output("systemctl restart redis-server")
    eventually(lambda: linked(machine))
    assert roles(machine) == (new, old)
    run = converge()
    assert re.findall(r"changed=(\d+) .*failed=(\d+)", run.stdout) == [("0", "0")] * 2, run.stdout + run.stderr
    assert roles(machine) == (new, old)
    assert ask(machine(old), old, "airflow", "GET molecule") == "kept"


def test_without_enough_replicas_writes_are_refused_and_a_bad_setting_does_not_stay(machine: Machine) -> None:
    primary, replica = roles(machine)
    file = machine(primary).file("/etc/redis/airflow-ha.conf")
    run = converge("-eredis_min_replicas_to_write=1", "-eredis_min_replicas_max_lag=3")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "min-replicas-to-write" in file.content_string
    assert ask(machine(primary), primary, "airflow", "SET molecule replicated") == "OK"
    machine(replica).check_output("systemctl stop redis-server")
    try:
        eventually(lambda: "NOREPLICAS" in ask(machine(primary), primary, "airflow", "SET molecule alone"))
    finally:
        machine(replica).check_output("systemctl start redis-server")
    eventually(lambda: ask(machine(primary), primary, "airflow", "SET molecule again") == "OK")
    accepted = file.content_string
    run = converge("-eredis_min_replicas_to_write=-1")
    assert "Redis refuses the settings" in run.stdout
    assert machine(primary).file("/etc/redis/airflow-ha.conf").content_string == accepted
    run = converge()
    assert run.returncode == 0, run.stdout + run.stderr
    assert ask(machine(primary), primary, "admin", "CONFIG GET min-replicas-to-write").split()[1] == "0"
