"""What a failover decides from what the members say, and the lock and the journal on the nodes."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from pathlib import Path
from typing import Any

import failover
import fence
import journal
import pytest
import wal

MIB = 1 << 20
_spec = importlib.util.spec_from_file_location("steps", Path(journal.__file__).with_name("__main__.py"))
assert _spec
assert _spec.loader
steps = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(steps)


def primary(**more: Any) -> dict[str, Any]:
    return {"role": "primary", "system_id": "7", "timeline": 3, "lsn": 100 * MIB, "lock": {}, "standbys": []} | more


def standby(**more: Any) -> dict[str, Any]:
    receiver = {"status": "streaming", "behind": 0}
    return {
        "role": "standby", "system_id": "7", "timeline": 3, "lsn": 100 * MIB, "receiver": receiver, "lock": {},
        "replay_paused": False, "standby_signal": True, "disk_free_mb": 9000,
    } | more  # fmt: skip


GONE = {"reachable": False, "problem": "No route to host"}
STOPPED = {"role": "stopped", "lock": {}, "problem": "connection refused", "timeline": 3, "standby_signal": False}
SEEN = {"data1": {"role": "primary"}}
BUSY = {"run": "other", "by": "eve@bastion", "age": 2.0}


def plan(states: dict[str, Any], service: str = "postgresql", **options: Any) -> dict[str, Any]:
    return failover.failover_plan(states, service, {"run": "me", "max_lag": 16 * MIB} | options)


def test_planned_takes_the_standby() -> None:
    decided = plan({"data1": primary(), "data2": standby(lsn=100 * MIB - 512)})
    assert decided["refusals"] == []
    assert (decided["kind"], decided["primary"], decided["candidate"]) == ("planned", "data1", "data2")
    assert decided["lag"] == 512


def test_the_inventory_order_does_not_matter() -> None:
    decided = plan({"data1": standby(), "data2": primary()})
    assert (decided["primary"], decided["candidate"]) == ("data2", "data1")


def test_planned_takes_the_standby_with_most_and_has_the_others_follow() -> None:
    decided = plan({"data1": primary(), "data2": standby(lsn=90 * MIB), "data3": standby()})
    assert (decided["candidate"], decided["followers"]) == ("data3", ["data2"])


def test_a_standby_of_the_primary_goes_before_one_of_a_standby() -> None:
    states = {"data1": primary(standbys=[{"name": "data2"}]), "data2": standby(lsn=90 * MIB), "data3": standby()}
    assert plan(states)["candidate"] == "data2"
    assert plan(states, candidate="data3")["candidate"] == "data3"


@pytest.mark.parametrize(("candidate", "alone"), [("data2", False), ("data3", True)])
def test_forced_knows_who_is_left_to_acknowledge(candidate: str, alone: bool) -> None:
    states = {"data1": GONE, "data2": standby(upstream="data1"), "data3": standby(upstream="data2")}
    assert plan(states, force=True, candidate=candidate)["alone"] is alone
    assert plan({"data1": GONE, "data2": standby()}, force=True)["alone"] is True


STREAMING = [{"state": "streaming", "sync": "quorum"}]


@pytest.mark.parametrize(
    ("states", "enabled", "mode", "hosts", "says"),
    [
        ({}, False, "on", ["data1", "data2"], "suspended on data1, data2"),
        ({"data2": GONE}, False, "on", ["data1"], "suspended on data1"),
        ({"data1": primary(suspended=True, standbys=STREAMING)}, True, "on", ["data1"], "resumed on data1"),
        ({}, True, "off", [], "nothing to do"),
        ({}, True, "on", [], "no standby streams from the primary"),
        ({}, False, "off", [], "postgresql_synchronous_mode is off"),
        ({"data2": standby(lock=BUSY)}, False, "on", [], "another failover"),
    ],
)
def test_synchronous(states: dict[str, Any], enabled: bool, mode: str, hosts: list[str], says: str) -> None:
    members = {"data1": primary(suspended=False), "data2": standby(suspended=False)} | states
    decided = failover.synchronous_plan(members, enabled, mode, {"run": "me"})
    assert decided["hosts"] == hosts
    assert says in (decided["refusals"] or decided["says"])[0]


REFUSED = [
    ({}, {"data2": standby(lsn=10 * MIB)}, "data2 lags by 94371840 bytes, max_lag allows 16777216"),
    ({}, {"data2": standby(receiver=None)}, "data2 does not stream"),
    ({}, {"data2": standby(replay_paused=True)}, "replay is paused on data2"),
    ({}, {"data2": standby(timeline=2)}, "data2 is on timeline 2, the primary on 3"),
    ({}, {"data2": standby(system_id="8")}, "data2 belongs to another cluster"),
    ({}, {"data2": standby(disk_free_mb=100)}, "data2 has 100 MiB of disk left"),
    ({}, {"data2": GONE}, "data2 cannot be reached: No route to host"),
    ({}, {"data2": STOPPED}, "data2 is no running standby"),
    ({"candidate": "data1"}, {}, "it is the primary already"),
    ({"candidate": "data9"}, {}, "candidate=data9: not a member of postgresql (data1, data2)"),
    ({"force": True}, {}, "data1 is a live primary"),
    ({"force": True, "confirm": "data2"}, {}, "data1 is a live primary"),
    ({"confirm": "data1"}, {}, "only with force=true"),
    ({}, {"data2": standby(lock=BUSY)}, "another failover, started by eve@bastion, is running (heard of 2.0 s ago)"),
    ({}, {"data2": primary()}, "two primaries: data1 and data2"),
    ({}, {"data1": GONE}, "no primary of PostgreSQL runs (data1: unreachable, data2: standby)"),
    ({}, {"data1": STOPPED}, "no primary of PostgreSQL runs"),
    ({"force": True}, {"data1": GONE, "data2": GONE}, "no standby runs"),
    ({}, {"data1": GONE, "data2": standby(seen=SEEN)}, "data1 is the primary but cannot be reached"),
    ({"force": True}, {"data1": GONE, "data2": standby(seen=SEEN)}, "data1 is a live primary"),
]


@pytest.mark.parametrize(("options", "states", "says"), REFUSED)
def test_refused_before_anything_changes(options: dict[str, Any], states: dict[str, Any], says: str) -> None:
    decided = plan({"data1": primary(), "data2": standby()} | states, **options)
    assert decided["kind"] == "none"
    assert any(says in reason for reason in decided["refusals"]), decided["refusals"]


def test_forced_fences_what_can_be_reached() -> None:
    decided = plan({"data1": STOPPED, "data2": standby()}, force=True)
    assert (decided["kind"], decided["candidate"], decided["fence"]) == ("forced", "data2", ["data1"])


def test_forced_says_what_cannot_be_fenced_and_what_is_missing() -> None:
    receiver = {"status": "streaming", "behind": 4096}
    decided = plan({"data1": GONE, "data2": standby(receiver=receiver)}, force=True)
    assert (decided["kind"], decided["fence"], decided["lag"]) == ("forced", [], 4096)
    assert any("data1 cannot be reached and is not fenced" in line for line in decided["says"])


def test_forced_on_a_live_primary_needs_its_name() -> None:
    decided = plan({"data1": primary(), "data2": standby()}, force=True, confirm="data1")
    assert (decided["kind"], decided["fence"]) == ("forced", ["data1"])


def test_forced_never_takes_a_standby_that_has_less_than_another() -> None:
    states = {"data1": GONE, "data2": standby(lsn=5), "data3": standby(lsn=9)}
    assert plan(states, force=True)["candidate"] == "data3"
    assert "they would be lost, use candidate=data3" in plan(states, force=True, candidate="data2")["refusals"][0]


def test_a_switchover_that_broke_off_is_finished_by_whoever_has_most() -> None:
    states = {"data1": standby(receiver=None, lsn=9), "data2": standby(receiver=None, lsn=7)}
    decided = plan(states)
    assert (decided["kind"], decided["candidate"], decided["followers"]) == ("resume", "data1", ["data2"])
    assert plan(states, candidate="data2")["candidate"] == "data1", "what only data1 has would be lost"


def test_a_member_that_was_left_stopped_is_started_first() -> None:
    decided = plan({"data1": STOPPED | {"standby_signal": True}, "data2": standby(receiver=None)})
    assert (decided["kind"], decided["followers"]) == ("wake", ["data1"])


def test_a_fenced_member_is_not_started() -> None:
    decided = plan({"data1": STOPPED | {"standby_signal": True, "masked": True}, "data2": standby(receiver=None)})
    assert "no primary of PostgreSQL runs" in decided["refusals"][0]


def test_a_candidate_that_is_primary_is_fine_for_a_failback() -> None:
    decided = plan({"data1": primary(), "data2": standby()}, candidate="data1", only_if_needed=True)
    assert (decided["kind"], decided["refusals"]) == ("none", [])


def test_redis_replicas_must_share_the_history() -> None:
    states = {"data1": primary(replication_id="a"), "data2": standby(replication_id="b")}
    assert "data2 replicates another history" in plan(states, "redis")["refusals"][0]


@pytest.mark.parametrize(
    ("states", "options", "kind", "says"),
    [
        ({"data1": STOPPED, "data2": primary()}, {}, "rewind", "data1 becomes a standby of data2"),
        ({"data1": standby(), "data2": primary()}, {}, "none", "nothing to do"),
        ({"data1": standby(firewalled=True), "data2": primary()}, {}, "rewind", "data1 becomes a standby of data2"),
        ({"data1": standby(receiver=None), "data2": primary()}, {}, "rewind", "data1 becomes a standby"),
        ({"data1": primary(), "data2": primary(timeline=4)}, {"confirm": "data1"}, "rewind", "data1 becomes a standby"),
        ({"data1": primary(), "data2": standby()}, {"only_if_needed": True}, "none", "data1 is the primary"),
    ],
)
def test_rejoin(states: dict[str, Any], options: dict[str, Any], kind: str, says: str) -> None:
    decided = failover.rejoin_plan(states, "postgresql", "data1", {"run": "me"} | options)
    assert (decided["kind"], decided["refusals"]) == (kind, [])
    assert says in decided["says"][0]


@pytest.mark.parametrize(
    ("states", "host", "says"),
    [
        ({"data1": STOPPED, "data2": primary()}, "data9", "not a member"),
        ({"data1": GONE, "data2": primary()}, "data1", "cannot be reached"),
        ({"data1": STOPPED, "data2": standby()}, "data1", "needs one live primary to join: none runs"),
        ({"data1": primary(), "data2": standby()}, "data1", "data1 is the primary itself"),
        ({"data1": primary(), "data2": primary()}, "data1", "say so with confirm=data1"),
        ({"data1": {"role": "none", "lock": {}}, "data2": primary()}, "data1", "has no data"),
        ({"data1": STOPPED | {"lock": BUSY}, "data2": primary()}, "data1", "another failover"),
    ],
)
def test_rejoin_is_refused(states: dict[str, Any], host: str, says: str) -> None:
    decided = failover.rejoin_plan(states, "postgresql", host, {"run": "me"})
    assert decided["kind"] == "none"
    assert says in decided["refusals"][0]


def status(states: dict[str, Any], uses: list[str]) -> dict[str, Any]:
    return failover.failover_status({"postgresql": states}, {"worker1": {"postgresql-primary": uses}})


def test_status_of_a_healthy_cluster() -> None:
    answer = status({"data1": primary(), "data2": standby(lsn=100 * MIB - 7)}, ["data1"])
    assert answer["healthy"], answer["problems"]
    assert "streaming, 7 bytes and 0.0 s behind" in answer["table"][1]


@pytest.mark.parametrize(
    ("states", "uses", "says"),
    [
        ({"data2": standby(receiver=None)}, ["data1"], "data2: the standby of PostgreSQL does not stream"),
        ({"data2": standby(timeline=2)}, ["data1"], "data2: PostgreSQL is on timeline 2"),
        ({"data2": standby(masked=True)}, ["data1"], "data2: PostgreSQL is fenced"),
        ({"data2": GONE}, ["data1"], "data2: PostgreSQL unreachable: No route to host"),
        ({"data2": primary()}, ["data1"], "PostgreSQL: 2 primaries"),
        ({"data1": STOPPED}, [], "PostgreSQL: no primary"),
        ({"data2": standby(suspended=True)}, ["data1"], "data2: synchronous replication is suspended"),
        ({"data1": primary(synchronous="ANY 1 (data2)")}, ["data1"], "data1: writes wait for a synchronous standby"),
        ({"data2": standby(firewalled=True)}, ["data1"], "data2: PostgreSQL is fenced (firewall)"),
        ({}, ["data2"], "worker1: the local proxy has ['data2'] as primary"),
        ({}, [], "worker1: the local proxy has no server as primary"),
        ({"data1": primary(slots=[{"name": "standby_data2", "active": False, "wal_status": "lost", "retained": 1}])},
         ["data1"], "has lost WAL"),
    ],
)  # fmt: skip
def test_status_names_what_is_wrong(states: dict[str, Any], uses: list[str], says: str) -> None:
    answer = status({"data1": primary(), "data2": standby()} | states, uses)
    assert not answer["healthy"]
    assert any(says in problem for problem in answer["problems"]), answer["problems"]


def test_one_failover_at_a_time(tmp_path: Path) -> None:
    first, second = journal.Lock("a", "ann@bastion", tmp_path), journal.Lock("b", "bob@laptop", tmp_path)
    first.take()
    first.take()
    with pytest.raises(journal.FailoverError, match="started by ann@bastion"):
        second.take()
    second.release()
    assert second.owner()["run"] == "a", "only its owner gives a lock back"
    first.release()
    second.take()


def test_the_lock_of_a_killed_run_goes_stale(tmp_path: Path) -> None:
    journal.Lock("a", "ann", tmp_path).take()
    old = time.time() - journal.STALE_S - 1
    os.utime(tmp_path / "failover.lock", (old, old))
    journal.Lock("b", "bob", tmp_path).take()


def test_a_held_lock_stays_fresh(tmp_path: Path) -> None:
    lock = journal.Lock("a", "ann", tmp_path)
    with lock.held():
        old = time.time() - journal.STALE_S
        os.utime(tmp_path / "failover.lock", (old, old))
        time.sleep(1.3)
        assert lock.owner()["age"] < 2


def test_journal_is_kept_on_the_node(tmp_path: Path) -> None:
    book = journal.Journal("a", "redis", tmp_path)
    book.step("promoted")
    (line,) = (tmp_path / "failover.jsonl").read_text().splitlines()
    assert json.loads(line) | {"at": 0} == {"at": 0, "run": "a", "service": "redis", "step": "promoted"}
    assert (tmp_path / "failover.jsonl").stat().st_mode & 0o777 == 0o640


def test_account_is_in_the_order_of_time() -> None:
    def answer(*steps: tuple[float, str]) -> dict[str, Any]:
        return {"stdout": json.dumps({"steps": [{"at": at, "step": step} for at, step in steps]})}

    hostvars = {"data1": {"x": answer((10.0, "stopped"))}, "data2": {"x": answer((9.5, "watches"), (11.0, "promoted"))}}
    assert failover.failover_account(hostvars, ["data1", "data2"], ["x", "y"]) == [
        "   0.00 s  data2: watches",
        "   0.50 s  data1: stopped",
        "   1.50 s  data2: promoted",
    ]


def test_peers_are_never_asked_while_the_process_is_another_user() -> None:
    class Member:
        acting = 0

        def probe(self, _address: str) -> dict[str, Any]:
            for _ in range(20):
                assert not self.acting
                time.sleep(0.005)
            return {"role": "standby"}

        def state(self, _seen: dict[str, Any]) -> dict[str, Any]:
            self.acting = 1
            time.sleep(0.05)
            self.acting = 0
            return {"role": "primary"}

    began = time.monotonic()
    said = steps.look(Member(), {"data2": "192.0.2.2", "data3": "192.0.2.3"})
    assert said == {"role": "primary", "seen": {"data2": {"role": "standby"}, "data3": {"role": "standby"}}}
    assert time.monotonic() - began < 0.25, "one peer after the other"


def test_a_fence_closes_the_ports_to_all_but_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(fence, "_nft", lambda *arguments: asked.append(arguments))
    assert fence.close("redis", [6379], tmp_path) == "fenced: 6379 closed by the firewall"
    assert 'iifname != "lo" tcp dport { 6379 } drop' in (tmp_path / "redis.nft").read_text()
    assert (fence.closed("redis", tmp_path), fence.closed("postgresql", tmp_path)) == (True, False)
    fence.release("redis", tmp_path)
    fence.release("postgresql", tmp_path)
    assert not fence.closed("redis", tmp_path)
    table = "table inet airflow_ha_fence_redis"
    assert asked == [("--file", str(tmp_path / "redis.nft")), (f"{table}; delete {table}",)]


def test_a_firewall_that_refuses_does_not_hold_up_a_failover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: str) -> None:
        raise journal.FailoverError("nft is not installed")

    monkeypatch.setattr(fence, "_nft", refuse)
    assert "not by the firewall: nft is not installed" in fence.close("redis", [6379], tmp_path)


@pytest.mark.parametrize(
    ("primary_name", "slots"),
    [
        ("data1", {"data1": {"standby_data2"}, "data2": {"standby_data3"}, "data3": set()}),
        ("data2", {"data1": set(), "data2": {"standby_data1", "standby_data3"}, "data3": set()}),
        ("data3", {"data1": set(), "data2": set(), "data3": {"standby_data1", "standby_data2"}}),
    ],
)
def test_slots_are_where_the_standbys_look_for_them(primary_name: str, slots: dict[str, set[str]]) -> None:
    upstreams = {"data1": "", "data2": "", "data3": "data2"}
    for name, wanted in slots.items():
        others = {host: f"standby_{host}" for host in upstreams if host != name}
        assert wal.wanted_slots(name, primary_name, others, upstreams) == wanted


def test_the_end_of_the_wal_is_where_pg_waldump_gives_up() -> None:
    said = (
        "pg_waldump: error: error in WAL record at 0/30000D8: invalid record length at 1/3000110: expected at least 24"
    )
    assert wal.end_of_wal(0, said) == 0x1_0300_0110
    assert wal.end_of_wal(7, "pg_waldump: error: could not find file") == 7
    assert wal.lsn_text(0x1_0300_0110) == "1/3000110"


def test_a_warm_standby_says_where_it_replays() -> None:
    replay = wal.REPLAYING.search("postgres: data2: startup waiting for 00000003000000010000000A")
    assert replay
    assert int(replay[1], 16) == 3
    assert wal.segment_start(replay, 16 * MIB) == 0x1_0A00_0000
