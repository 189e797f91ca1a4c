"""Two balancers and their local proxies in front of stand-ins that can be told what to say, and a real Redis."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import re
import ssl
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from scenario import CA, SUBNET
from testinfra.host import Host

Machine = Callable[[str], Host]

VIP = f"{SUBNET}.36"
ADDRESS = {"haproxy1": f"{SUBNET}.30", "haproxy2": f"{SUBNET}.31"}
STATS = "admin:" + hashlib.sha256(b"molecule haproxy stats").hexdigest()
AUTH = {"Authorization": "Basic " + base64.b64encode(STATS.encode()).decode()}
REDIS = "redis-cli --no-auth-warning --tls --cacert /etc/airflow-ha/tls/ca.crt --user airflow --pass molecule"


def get(path: str, headers: dict[str, str] | None = None, address: str = VIP, port: int = 443) -> tuple[int, Any, str]:
    """Status, headers and body of a GET over TLS that is verified with the cluster's CA, name included."""
    link = http.client.HTTPSConnection(address, port, timeout=10, context=ssl.create_default_context(cafile=str(CA)))
    with contextlib.closing(link):
        link.request("GET", path, headers=headers or {})
        answer = link.getresponse()
        return answer.status, answer.headers, answer.read().decode()


def until(what: Callable[[], Any], wanted: Any = True, timeout: float = 20) -> float:
    """Wait until `what` returns `wanted`; returns how long that took."""
    start = time.monotonic()
    seen = None
    while time.monotonic() - start < timeout:
        with contextlib.suppress(OSError, http.client.HTTPException):
            seen = what()
            if seen == wanted:
                return time.monotonic() - start
        time.sleep(0.2)
    raise AssertionError(f"after {timeout} s: {seen!r}, not {wanted!r}")


def python(host: Host, code: str) -> str:
    """What a Python program prints on that machine."""
    return str(host.check_output("python3 - <<'PROGRAM'\n" + code + "\nPROGRAM"))


def greeting(host: Host, port: int) -> str:
    """Which server a proxy port leads to; empty when the connection is refused or closed."""
    return python(
        host,
        "import socket\n"
        f"link = socket.create_connection(('127.0.0.1', {port}), timeout=8)\n"
        "link.sendall(b'hello\\n')\n"
        "try:\n    print(link.recv(100).decode().split('\\n')[0])\n"
        "except ConnectionError:\n    print()\n",
    ).strip()


def states(host: Host, backend: str) -> dict[str, str]:
    """Server to state, as HAProxy on that machine sees them."""
    lines = python(
        host,
        "import socket\n"
        "link = socket.socket(socket.AF_UNIX)\n"
        "link.connect('/run/haproxy/admin.sock')\n"
        "link.sendall(b'show stat\\n')\n"
        "print(b''.join(iter(lambda: link.recv(65536), b'')).decode())\n",
    ).splitlines()
    rows = [line.split(",") for line in lines if line.startswith(f"{backend},")]
    return {row[1]: row[17] for row in rows if row[1] not in {"FRONTEND", "BACKEND"}}


def local_api(host: Host, path: str = "/who") -> dict[str, Any]:
    """What the API servers answer through the proxy on that machine."""
    return dict(json.loads(host.check_output(f"curl -sS -m 10 http://127.0.0.1:18080{path}")))


def holders(machine: Machine) -> list[str]:
    """The machines that hold the VIP."""
    return [name for name in ADDRESS if f" {VIP}/" in machine(name).check_output("ip -4 -o address")]


@pytest.fixture
def say(machine: Machine) -> Iterator[Callable[[str, str, str], None]]:
    """A function that tells a machine's stand-in what to say, until the test ends."""

    def tell(name: str, what: str, value: str) -> None:
        machine(name).check_output(f"mkdir -p /run/molecule && echo {value} > /run/molecule/{what}")

    yield tell
    for name in ADDRESS:
        machine(name).check_output("rm -f /run/molecule/*")


@pytest.fixture(autouse=True)
def journal_on_failure(machine: Machine, request: pytest.FixtureRequest) -> Iterator[None]:
    """Print what both machines logged when a test fails."""
    before = request.session.testsfailed
    yield
    if request.session.testsfailed > before:
        for name in ADDRESS:
            print(machine(name).run("journalctl -u haproxy -u keepalived -n 30 --no-pager").stdout)


# --- files and ports ---------------------------------------------------------------------------


def test_configuration_is_valid_and_private(host: Host) -> None:
    config = host.file("/etc/haproxy/haproxy.cfg")
    assert (config.mode, config.user, config.group) == (0o640, "root", "haproxy")
    assert host.run("haproxy -c -f /etc/haproxy/haproxy.cfg").rc == 0
    assert host.run("sudo -u nobody cat /etc/haproxy/haproxy.cfg").rc != 0
    for folder in ("/etc", "/usr", "/etc/haproxy", "/etc/keepalived"):
        assert host.file(folder).user == "root"


def test_both_balancers_have_the_same_configuration(machine: Machine) -> None:
    one, two = (machine(name).file("/etc/haproxy/haproxy.cfg").sha256sum for name in ADDRESS)
    assert one == two
    one, two = (machine(name).file("/etc/keepalived/keepalived.conf").content_string for name in ADDRESS)
    differing = {line.split()[0] for line in set(one.splitlines()) ^ set(two.splitlines())}
    assert differing == {"router_id", "priority", "unicast_src_ip", *ADDRESS.values()}


def test_local_proxies_listen_on_loopback_only(host: Host) -> None:
    sockets = [line.split()[3] for line in host.check_output("ss -Htlnp").splitlines() if "haproxy" in line]
    local = {f"127.0.0.1:{port}" for port in (15432, 15433, 16379, 18080)}
    assert set(sockets) == local | {f"0.0.0.0:{port}" for port in (80, 443, 8404)}


def test_checks_run_unprivileged(host: Host) -> None:
    assert host.user("keepalived_script").shell == "/usr/sbin/nologin"
    assert host.service("keepalived").is_running
    assert host.service("keepalived").is_enabled
    assert host.service("haproxy").is_enabled
    complaints = host.run("journalctl -u keepalived | grep -iE 'unsafe|insecure|not found|error'").stdout
    assert complaints == ""


# --- load balancer -----------------------------------------------------------------------------


def test_api_behind_the_vip_over_verified_tls() -> None:
    status, headers, body = get(
        "/who?x=1", {"X-Forwarded-For": "1.2.3.4", "X-Forwarded-Host": "evil", "Forwarded": "x"}
    )
    assert status == 200
    assert headers["Strict-Transport-Security"] == "max-age=31536000"
    seen = json.loads(body)["headers"]
    assert seen["x-forwarded-for"] == f"{SUBNET}.1"
    assert (seen["x-forwarded-proto"], seen["x-forwarded-host"]) == ("https", VIP)
    assert not {"forwarded", "x-forwarded-prefix"} & set(seen)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_old_tls_is_refused() -> None:
    context = ssl.create_default_context(cafile=str(CA))
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    link = http.client.HTTPSConnection(VIP, timeout=10, context=context)
    with pytest.raises(ssl.SSLError, match=r"(?i)alert protocol version"):
        link.request("GET", "/")


def test_http_is_sent_to_https() -> None:
    link = http.client.HTTPConnection(VIP, 80, timeout=10)
    with contextlib.closing(link):
        link.request("GET", "/dags?x=1")
        answer = link.getresponse()
        assert (answer.status, answer.headers["Location"]) == (301, f"https://{VIP}/dags?x=1")


@pytest.mark.parametrize("path", ["/", "/metrics"])
def test_statistics_need_the_password(path: str) -> None:
    assert get(path, port=8404)[0] == 401
    wrong = {"Authorization": "Basic " + base64.b64encode(b"admin:admin").decode()}
    assert get(path, wrong, port=8404)[0] == 401
    status, _, body = get(path, AUTH, port=8404)
    assert status == 200
    assert "airflow-api" in body


def test_flower_without_its_metrics() -> None:
    status, _, body = get("/flower/tasks")
    assert (status, json.loads(body)["path"]) == (200, "/flower/tasks")
    assert get("/flower")[1]["Location"] == "/flower/"
    for path in ("/flower/metrics", "/flower//metrics", "/flower/./metrics", "/flower/%6Detrics", "/flower/metrics?x"):
        assert get(path)[0] == 403, path


def test_spark_page_is_the_live_masters_behind_a_password(say: Callable[[str, str, str], None]) -> None:
    until(lambda: get("/spark/", AUTH)[0], 503)
    say("haproxy2", "spark", "ALIVE")
    assert get("/spark/")[0] == 401
    until(lambda: get("/spark/app?id=1", AUTH)[0], 200)
    seen = json.loads(get("/spark/app?id=1", AUTH)[2])
    assert seen["address"] == ADDRESS["haproxy2"]
    assert seen["path"] == "/app?id=1"
    assert seen["headers"]["x-forwarded-context"] == "/spark"
    assert "authorization" not in seen["headers"]
    assert get("/spark/move", AUTH)[1]["Location"] == "/spark/moved"
    assert get("/spark")[1]["Location"] == "/spark/"


# --- local proxies -----------------------------------------------------------------------------


def test_connections_follow_the_primary(machine: Machine, say: Callable[[str, str, str], None]) -> None:
    host = machine("haproxy1")
    assert greeting(host, 15432) == "", "no primary, no connection"
    say("haproxy1", "postgresql", "primary")
    until(lambda: greeting(host, 15432), ADDRESS["haproxy1"])
    until(lambda: greeting(host, 15433), ADDRESS["haproxy2"])

    # An open session is closed when its server stops being primary.
    session = (
        "import socket, subprocess, time\n"
        "link = socket.create_connection(('127.0.0.1', 15432), timeout=20)\n"
        "link.sendall(b'x\\n')\n"
        "while b'x\\n' not in link.recv(100): pass\n"
        "start = time.monotonic()\n"
        "open('/run/molecule/postgresql', 'w').write('standby')\n"
        "try:\n    assert link.recv(100) == b''\n"
        "except ConnectionError:\n    pass\n"
        "print(time.monotonic() - start)\n"
    )
    assert float(python(host, session)) < 4
    say("haproxy2", "postgresql", "primary")
    until(lambda: greeting(host, 15432), ADDRESS["haproxy2"])
    until(lambda: greeting(host, 15433), ADDRESS["haproxy1"])


def test_two_primaries_get_no_new_connection(machine: Machine, say: Callable[[str, str, str], None]) -> None:
    host = machine("haproxy1")
    say("haproxy1", "postgresql", "primary")
    until(lambda: greeting(host, 15432), ADDRESS["haproxy1"])
    say("haproxy2", "postgresql", "primary")
    until(lambda: states(host, "postgresql-primary"), {"haproxy1": "UP", "haproxy2": "UP"})
    assert greeting(host, 15432) == ""


def test_readers_fall_back_to_the_primary(machine: Machine, say: Callable[[str, str, str], None]) -> None:
    host = machine("haproxy1")
    say("haproxy1", "postgresql", "primary")
    say("haproxy2", "postgresql", "nothing")
    until(lambda: states(host, "postgresql-standby")["haproxy2"], "DOWN")
    until(lambda: greeting(host, 15433), ADDRESS["haproxy1"])


def test_redis_follows_its_own_role(machine: Machine) -> None:
    host = machine("haproxy2")
    info = f"{REDIS} -h 127.0.0.1 -p 16379"
    until(lambda: "role:master" in host.run(f"{info} info replication").stdout)
    assert "connected_slaves:1" in host.check_output(f"{info} info replication")
    until(lambda: states(host, "redis-primary"), {"haproxy1": "UP", "haproxy2": "DOWN"})
    try:
        machine("haproxy1").check_output(f"{REDIS} -h {ADDRESS['haproxy1']} replicaof {ADDRESS['haproxy2']} 6379")
        machine("haproxy2").check_output(f"{REDIS} -h {ADDRESS['haproxy2']} replicaof no one")
        until(lambda: states(host, "redis-primary"), {"haproxy1": "DOWN", "haproxy2": "UP"})
        assert host.check_output(f"{info} set where here") == "OK"
        assert host.check_output(f"{REDIS} -h {ADDRESS['haproxy2']} get where") == "here"
    finally:
        machine("haproxy2").check_output(f"{REDIS} -h {ADDRESS['haproxy2']} replicaof {ADDRESS['haproxy1']} 6379")
        machine("haproxy1").check_output(f"{REDIS} -h {ADDRESS['haproxy1']} replicaof no one")


def test_sick_api_server_gets_no_traffic(machine: Machine, say: Callable[[str, str, str], None]) -> None:
    host = machine("haproxy1")
    assert {local_api(host)["address"] for _ in range(8)} == set(ADDRESS.values())
    say("haproxy1", "database", "unhealthy")
    until(lambda: states(host, "airflow-api")["haproxy1"], "DOWN")
    assert {local_api(host)["address"] for _ in range(8)} == {ADDRESS["haproxy2"]}


def test_without_the_database_live_api_servers_still_answer(
    machine: Machine, say: Callable[[str, str, str], None]
) -> None:
    host = machine("haproxy1")
    for name in ADDRESS:
        say(name, "database", "unhealthy")
    say("haproxy1", "api", "dead")
    wanted = {
        "haproxy1": "DOWN",
        "haproxy2": "DOWN",
        "haproxy1-without-database": "DOWN",
        "haproxy2-without-database": "UP",
    }
    until(lambda: {k: v.split()[0] for k, v in states(host, "airflow-api").items()}, wanted)
    assert {local_api(host)["address"] for _ in range(8)} == {ADDRESS["haproxy2"]}


# --- what must not disturb users ---------------------------------------------------------------


def test_reload_keeps_open_connections_and_refuses_no_new_one(
    machine: Machine, say: Callable[[str, str, str], None]
) -> None:
    host = machine("haproxy1")
    say("haproxy1", "postgresql", "primary")
    until(lambda: greeting(host, 15432), ADDRESS["haproxy1"])
    program = (
        "import socket, subprocess, time\n"
        "def connect():\n"
        "    link = socket.create_connection(('127.0.0.1', 15432), timeout=10)\n"
        "    link.sendall(b'x\\n')\n"
        "    got = b''\n"
        "    while not got.endswith(b'x\\n'):\n"
        "        part = link.recv(100)\n"
        "        assert part, 'closed'\n"
        "        got += part\n"
        "    return link, got\n"
        "old, _ = connect()\n"
        "subprocess.run(['systemctl', 'reload', 'haproxy'], check=True)\n"
        "end = time.monotonic() + 4\n"
        "greetings = set()\n"
        "while time.monotonic() < end:\n"
        "    link, got = connect()\n"
        "    greetings.add(got)\n"
        "    link.close()\n"
        "    time.sleep(0.02)\n"
        "old.sendall(b'still there\\n')\n"
        "assert old.recv(100) == b'still there\\n'\n"
        "print(len(greetings))\n"
    )
    assert python(host, program).strip() == "1"


def test_vip_moves_once_per_failure(machine: Machine) -> None:
    until(lambda: len(holders(machine)), 1)
    first = holders(machine)[0]
    other = next(name for name in ADDRESS if name != first)
    try:
        machine(first).check_output("systemctl stop haproxy")
        took = until(lambda: holders(machine), [other])
        assert took < 12
        until(lambda: get("/who")[0], 200)
    finally:
        machine(first).check_output("systemctl start haproxy")
    until(lambda: "Entering BACKUP" in machine(first).check_output("journalctl -u keepalived -n 3"))
    for _ in range(8):
        assert holders(machine) == [other], "it went back although nothing failed"
        time.sleep(0.5)
    moves = machine(other).check_output("journalctl -u keepalived --since=-30s")
    assert len(re.findall("Entering MASTER STATE", moves)) == 1
