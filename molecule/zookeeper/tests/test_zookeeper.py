"""An ensemble of three: it elects a leader, keeps data through a member's restart, and listens where it should."""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Callable, Iterator

import pytest
from scenario import SUBNET
from testinfra.host import Host

# Name to member number and address.
MEMBERS = {
    "zookeeper1": (1, f"{SUBNET}.37"),
    "zookeeper2": (2, f"{SUBNET}.38"),
    "zookeeper3": (7, f"{SUBNET}.39"),
}
CLIENT = (
    "java -Dorg.slf4j.simpleLogger.defaultLogLevel=warn "
    "-cp /usr/share/java/zookeeper.jar:/usr/share/java/slf4j-simple.jar "
    "org.apache.zookeeper.ZooKeeperMain"
)


def ask(member: str, word: str) -> str:
    """The answer to one of ZooKeeper's four-letter words; empty when nobody listens."""
    with contextlib.suppress(OSError), socket.create_connection((MEMBERS[member][1], 2181), timeout=3) as link:
        link.sendall(word.encode())
        answer = b""
        while chunk := link.recv(65536):
            answer += chunk
        return answer.decode()
    return ""


def modes() -> dict[str, str]:
    """Member to "leader" or "follower", or "" for one that does not serve."""
    found = {name: re.search(r"^Mode: (\w+)$", ask(name, "srvr"), re.MULTILINE) for name in MEMBERS}
    return {name: match[1] if match else "" for name, match in found.items()}


def leader() -> str:
    """The name of the one leader, waiting a little while an election goes on."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        now = modes()
        if sorted(now.values()) == ["follower", "follower", "leader"]:
            return next(name for name, mode in now.items() if mode == "leader")
        time.sleep(0.3)
    raise AssertionError(f"no leader with two followers: {modes()}")


@pytest.fixture(autouse=True)
def journal_on_failure(machine: Callable[[str], Host], request: pytest.FixtureRequest) -> Iterator[None]:
    """Print what the members said when a test fails."""
    before = request.session.testsfailed
    yield
    if request.session.testsfailed > before:
        for name in MEMBERS:
            print(machine(name).run("journalctl -u zookeeper -n 30 --no-pager").stdout)


def test_runs_as_its_own_user_without_a_desktops_java(host: Host) -> None:
    unit = host.service("zookeeper")
    assert unit.is_running
    assert unit.is_enabled
    assert "-Xmx256m" in host.process.get(user="zookeeper", comm="java").args
    assert not host.package("default-jre").is_installed


def test_own_number_and_private_data(host: Host) -> None:
    number, _ = MEMBERS[host.check_output("hostname")]
    assert host.file("/var/lib/zookeeper/myid").content_string.strip() == str(number)
    assert host.file("/var/lib/zookeeper").mode == 0o750
    assert host.file("/var/lib/zookeeper").user == "zookeeper"
    assert host.file("/etc").user == "root"
    assert host.file("/var/lib").user == "root"


def test_all_know_the_same_ensemble(host: Host) -> None:
    config = host.file("/etc/zookeeper/zoo.cfg").content_string
    members = re.findall(r"^server\.(\d+)=(\S+):2888:3888$", config, re.MULTILINE)
    assert members == [(str(number), address) for number, address in MEMBERS.values()]


def test_listens_only_on_the_nodes_address(host: Host) -> None:
    name = host.check_output("hostname")
    address = MEMBERS[name][1]
    sockets = host.check_output("ss -Htlnp").splitlines()
    listening = {line.split()[3].removeprefix("[::ffff:").replace("]", "") for line in sockets if '"java"' in line}
    expected = {f"{address}:2181", f"{address}:3888"} | ({f"{address}:2888"} if leader() == name else set())
    assert listening == expected


@pytest.mark.parametrize("name", MEMBERS)
def test_answers_the_allowed_words_only(name: str) -> None:
    assert ask(name, "ruok") == "imok"
    assert "zk_version" in ask(name, "mntr")
    assert "not in the whitelist" in ask(name, "cons")


def test_data_and_quorum_outlive_the_leaders_restart(machine: Callable[[str], Host]) -> None:
    old = leader()
    other = next(name for name in MEMBERS if name != old)
    machine(old).check_output(f"{CLIENT} -server {MEMBERS[old][1]}:2181 create /molecule seen-by-all")
    try:
        machine(old).check_output("systemctl restart zookeeper")
        # `restart` has returned, so the member serves: what makes it safe to go on with the next one. It may lead
        # again: a member that is back before the others have voted wins by its number.
        assert modes()[old] in ("leader", "follower")
        assert leader() in MEMBERS
        assert "seen-by-all" in machine(other).check_output(f"{CLIENT} -server {MEMBERS[other][1]}:2181 get /molecule")
    finally:
        machine(other).run(f"{CLIENT} -server {MEMBERS[other][1]}:2181 delete /molecule")


def test_killed_leader_is_replaced_and_comes_back(machine: Callable[[str], Host]) -> None:
    old = leader()
    machine(old).check_output("systemctl kill --signal=KILL zookeeper")
    assert leader() in MEMBERS
