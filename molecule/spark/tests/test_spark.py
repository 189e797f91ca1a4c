"""A real cluster: a job from a client gives the right numbers, strangers are refused, masters come back."""

import csv
import json
import time
from decimal import Decimal

import pytest

DAY = "2026-03-02"
SHARED = "/srv/landing/spark-test"
MASTERS = ("spark1", "spark2")


@pytest.fixture
def client(host):
    """The machine from which jobs are submitted; it runs a worker as well, as in a real cluster."""
    if host.backend.get_hostname() != "spark2":
        pytest.skip("not the client")
    return host


def run(host, command):
    """Run as root and fail with what the machine says about it."""
    done = host.run(f"sudo sh -c '{command}'")
    if done.rc != 0:
        journal = host.run("sudo journalctl --no-pager --lines=60 --unit=spark-master --unit=spark-worker").stdout
        pytest.fail(f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}\n{journal[-6000:]}")
    return done.stdout


def master_states(host):
    states = {}
    for name in MASTERS:
        done = host.run(f"curl --silent --max-time 5 http://{name}:8081/json/")
        states[name] = json.loads(done.stdout) if done.rc == 0 else {"status": "DOWN"}
    return states


def wait_for_leader(host, workers, timeout=90):
    """Wait until one master leads and sees so many workers; return its name."""
    deadline = time.monotonic() + timeout
    while True:
        states = master_states(host)
        leaders = [name for name, state in states.items() if state["status"] == "ALIVE"]
        if len(leaders) == 1 and states[leaders[0]]["aliveworkers"] == workers:
            return leaders[0]
        if time.monotonic() > deadline:
            pytest.fail(json.dumps(states, indent=1)[-4000:])
        time.sleep(1)


def submit(host, arguments="", name="averages"):
    return run(
        host,
        f"runuser -u submitter -- /opt/spark/bin/spark-submit {arguments} {SHARED}/xetra_daily_average.py"
        f" --date={DAY} --input=file://{SHARED}/bars --output=file:///tmp/{name}.csv",
    )


def test_job_from_a_client_gives_the_right_averages(client):
    wait_for_leader(client, workers=2)
    submit(client)
    rows = list(csv.DictReader(client.file("/tmp/averages.csv").content_string.splitlines()))
    expected = list(csv.DictReader(client.file(f"{SHARED}/expected.csv").content_string.splitlines()))
    assert len(expected) == 20
    assert [(r["ticker"], Decimal(r["avg_price"])) for r in rows] == [
        (r["ticker"], Decimal(r["avg_price"])) for r in expected
    ]
    leader = wait_for_leader(client, workers=2)
    finished = {app["name"]: app for app in master_states(client)[leader]["completedapps"]}
    assert finished[f"xetra_daily_average {DAY}"]["state"] == "FINISHED"


def test_both_workers_ran_an_executor(client):
    for name in MASTERS:
        state = json.loads(client.run(f"curl --silent http://{name}:8082/json/").stdout)
        assert state["finishedexecutors"], f"{name} ran no executor"


def test_a_wrong_secret_is_refused(client):
    leader = wait_for_leader(client, workers=2)
    known = [app["id"] for app in master_states(client)[leader]["completedapps"]]
    done = client.run(
        "sudo runuser -u submitter -- timeout 40 /opt/spark/bin/spark-submit --conf spark.authenticate.secret=wrong"
        f" --conf spark.log.level=INFO {SHARED}/xetra_daily_average.py --date={DAY} --input=file://{SHARED}/bars"
        " --output=file:///tmp/refused.csv"
    )
    assert done.rc != 0
    assert not client.file("/tmp/refused.csv").exists
    assert f"Failed to connect to master {leader}" in done.stderr, done.stderr[-4000:]
    state = master_states(client)[leader]
    assert [app["id"] for app in state["activeapps"] + state["completedapps"]] == known


def test_killed_leader_is_replaced_and_comes_back(host):
    if wait_for_leader(host, workers=2) != host.backend.get_hostname():
        pytest.skip("the leader is the other machine")
    run(host, "systemctl kill --signal=KILL --kill-whom=main spark-master")
    deadline = time.monotonic() + 60
    while not host.service("spark-master").is_running or host.run("curl -sf http://$(hostname):8081/json/").rc != 0:
        assert time.monotonic() < deadline
        time.sleep(1)
    wait_for_leader(host, workers=2)


def test_services_listen_on_the_nodes_address_only(host):
    for unit in ("spark-master", "spark-worker"):
        assert host.service(unit).is_running
        assert host.service(unit).is_enabled
    address = host.interface("eth0").addresses[0]
    listening = {line.split()[3] for line in host.check_output("ss -Hltn").splitlines()}
    for port in (7077, 7078, 8081, 8082):
        (found,) = [local for local in listening if local.endswith(f":{port}")]
        # The JVM's sockets speak both families: this is the IPv4 address as IPv6 writes it.
        assert found in (f"{address}:{port}", f"[::ffff:{address}]:{port}")
    assert not host.socket("tcp://6066").is_listening, "the REST server knows no authentication"


def test_secret_is_only_where_it_belongs(host):
    config = host.file("/etc/spark/spark-defaults.conf")
    assert (config.user, config.group, config.mode) == ("root", "spark", 0o640)
    secret = run(host, "sed -n s/^spark.authenticate.secret.//p /etc/spark/spark-defaults.conf").strip()
    assert len(secret) == 64
    # The pattern must not find the command that looks for it.
    assert host.run(f"ps axww -o args | grep --count [{secret[0]}]{secret[1:]}").stdout.strip() == "0"
    assert host.run(f"sudo journalctl --no-pager | grep --count [{secret[0]}]{secret[1:]}").stdout.strip() == "0"


def test_restarts_for_ever_and_in_order(host):
    shown = host.check_output("systemctl show spark-worker --property=Restart,StartLimitIntervalUSec")
    assert "Restart=always" in shown
    assert "StartLimitIntervalUSec=0" in shown
    for folder in ("/etc", "/usr", "/var/log"):
        assert host.file(folder).user == "root"
